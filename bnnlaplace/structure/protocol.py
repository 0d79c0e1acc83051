"""What a Laplace posterior asks of a fitted curvature."""

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from bnnlaplace.curvature.jacobian import Jacobian

# The diagonal of D, or the number 1.0.
RelativePrecisions = Float[ArrayLike, ""] | Float[ArrayLike, " P"]


@runtime_checkable
class Structure(Protocol):
    """A fitted curvature G, a pytree: answers at any precision delta of an isotropic prior, without another product.

    A prior of precisions delta D is isotropic in the weights times sqrt(D), in which the curvature is
    D^-1/2 G D^-1/2: `whitened` turns to it, and all vectors are in its coordinates then.

    One that can give the covariance of linearised outputs has the method of `CovarianceStructure` besides, any other
    those of `SampleStructure`.
    """

    def whitened(self, relative: Float[Array, " P"]) -> "Structure":
        """That of D^-1/2 G D^-1/2.

        Raises
        ------
        ValueError
            If the structure cannot be had for these relative precisions without fitting again.
        """
        ...

    def scaled(self, factor: float) -> "Structure":
        """That of factor * G."""
        ...

    def log_determinant(self, prior_precision: float) -> Float[np.ndarray, " S"]:
        """log det(I + G / delta) as each probe estimates it, in float64; a single value where it is exact."""
        ...

    def truncation(self, prior_precision: float) -> Float[np.ndarray, " S"]:
        """How far each of these may lie above what its probe would estimate without truncation; zero where exact."""
        ...

    def effective_parameters(self, prior_precision: float, groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "S g"]:
        """tr_g G (G + delta I)^-1, the sum over the weights of each group, as each probe estimates it.

        `groups` numbers the group of each weight, from zero. A single row where it is exact.
        """
        ...

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: float) -> float:
        """v' (G + delta I)^-1 v."""
        ...

    def samples(self, key: Array, num_samples: int, prior_precision: float) -> Float[Array, "S P"]:
        """Rows distributed as N(0, (G + delta I)^-1)."""
        ...


# The Jacobian of groups of outputs -> their covariances at each of D prior precisions; a pytree, to be an argument of
# compiled functions.
OutputCovariance = Callable[[Jacobian], Float[Array, "D M U C C"]]


@runtime_checkable
class CovarianceStructure(Structure, Protocol):
    """A structure that maps Jacobians to covariances.

    Attributes
    ----------
    rows_for_output, rows_for_column
        How many rows of P numbers are in memory while that is done, for each output and for each column of the layers
        whose inputs are met first (see `Jacobian.times`).
    """

    rows_for_output: float
    rows_for_column: float

    def output_covariance(self, precisions: Sequence[float], relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """J -> J D^-1/2 (G + delta I)^-1 D^-1/2 J' for each delta, J being in the coordinates of the network.

        A `jax.tree_util.Partial`. Traceable, with `precisions` traced too. `relative` is the diagonal of D, one where
        it is None.
        """
        ...


@runtime_checkable
class SampleStructure(Structure, Protocol):
    """A structure that knows outputs only through a limited number of samples."""

    @property
    def num_probes(self) -> int:
        """The largest number of samples."""
        ...

    def reservation(self, prior_precision: float) -> str | None:
        """What to know before using it at a prior precision; None where there is nothing."""
        ...

    def function_samples(
        self,
        pushforward: Callable[[Float[Array, "R P"]], Float[Array, "R B ... C"]],
        key: Array,
        num_samples: int,
        precisions: Sequence[float],
    ) -> Iterator[Float[Array, "S B ... C"]]:
        """J times samples at each prior precision, given V -> J V."""
        ...
