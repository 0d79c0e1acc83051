"""Records that several stages share: an estimate with its error, a linear operator, and the warning of a fit."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Shaped

# An array as users pass it.
AnyArray = Array | np.ndarray
# Inputs of a network, examples along the first axis of every leaf.
Inputs = PyTree[Shaped[AnyArray, "B ..."]]


class Estimate(NamedTuple):
    """A number with the standard error of the randomness behind it.

    Attributes
    ----------
    mean
        The estimate.
    sem
        Its standard error; exactly zero if nothing was sampled.
    """

    mean: Float[ArrayLike, "*shape"]
    sem: Float[ArrayLike, "*shape"]


class LowerBound(Estimate):
    """An `Estimate` of the log evidence that is below it: the evidence lower bound of a variational posterior.

    Attributes
    ----------
    mean
        The estimate of the bound, in nats.
    sem
        Its standard error over the samples of the outputs and over probes. It does not say how far below the evidence
        the bound is. With more than 64 outputs an example it lacks the error of their covariances, which samples of the
        weights estimate: that may be several times as large, except with "lanczos", where most of it cancels.
    """

    __slots__ = ()


class LinearOperator(NamedTuple):
    """A square linear map on flat vectors, known by its products.

    Attributes
    ----------
    matvec
        v -> A v, shapes (size,) -> (size,), same dtype.
    size
        The dimension.
    """

    matvec: Callable[[Float[Array, " size"]], Float[Array, " size"]]
    size: int


class SaturatedPosteriorWarning(UserWarning):
    """The posterior does not fit the training data whose evidence chose its prior."""


class NotAModeWarning(UserWarning):
    """The weights are far from a mode of the log joint."""
