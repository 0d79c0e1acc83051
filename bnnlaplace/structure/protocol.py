"""The questions that a Laplace posterior asks of a fitted curvature."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, Num

from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature.jacobian import Jacobian

# One prior precision, which may be traced; and several of them.
PriorPrecision = Num[ArrayLike, ""]
PriorPrecisions = Sequence[PriorPrecision] | Num[AnyArray, " D"]
# The diagonal of D, or the number 1.0.
RelativePrecisions = Float[ArrayLike, ""] | Float[ArrayLike, " P"]


@runtime_checkable
class Structure(Protocol):
    """A fitted curvature G. It answers at any precision delta of an isotropic prior without another product with G.

    A prior with precisions delta D is isotropic in the weights times sqrt(D). In those coordinates the curvature is
    D^-1/2 G D^-1/2. `whitened` changes to them, and all vectors are in these coordinates from then on.

    A structure is a pytree. If it can compute covariances of linearised outputs, it also has the method of
    `CovarianceStructure`. Otherwise it has the methods of `SampleStructure`.
    """

    def resolution(self) -> float:
        """The prior precision below which curvature of its size cannot be told from rounding; 0 if there is none."""
        ...

    def whitened(self, relative: Float[AnyArray, " P"]) -> "Structure":
        """Return the structure of D^-1/2 G D^-1/2.

        Raises
        ------
        ValueError
            If the structure would have to be fitted again for these relative precisions.
        """
        ...

    def scaled(self, factor: float) -> "Structure":
        """Return the structure of factor * G."""
        ...

    def log_determinant(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " S"]:
        """log det(I + G / delta) in float64: one estimate for each probe, or a single value if it is exact."""
        ...

    def truncation(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " S"]:
        """Bound how far truncation raises each value of `log_determinant`; zero if nothing is truncated."""
        ...

    def effective_parameters(
        self, prior_precision: PriorPrecision, groups: Int[np.ndarray, " P"]
    ) -> Float[np.ndarray, "S g"]:
        """tr_g G (G + delta I)^-1, the part of the trace that belongs to the weights of each group.

        There is one row for each probe, or a single row if it is exact. `groups` holds the number of each weight's
        group, counted from zero.
        """
        ...

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision) -> float:
        """v' (G + delta I)^-1 v."""
        ...

    def inverse_product(
        self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision
    ) -> Float[np.ndarray, " P"]:
        """(G + delta I)^-1 v on the host. Outside a truncated basis the prior alone counts."""
        ...

    def samples(self, key: Array, num_samples: int, prior_precision: PriorPrecision) -> Float[Array, "S P"]:
        """Draw rows from N(0, (G + delta I)^-1)."""
        ...


# A function from rows of J, in U groups of C outputs, to the covariances; a pytree, too.
RowCovariance = Callable[[Float[Array, "U C M P"]], Float[Array, "D M U C C"]]
# A function from the Jacobian of groups of outputs to their covariances at each of D prior precisions. It is a pytree,
# so that it can be an argument of compiled functions.
OutputCovariance = Callable[[Jacobian], Float[Array, "D M U C C"]]


@runtime_checkable
class CovarianceStructure(Structure, Protocol):
    """A structure that computes covariances of outputs from their Jacobian.

    Attributes
    ----------
    rows_for_output, rows_for_column
        How many rows of P numbers this needs in memory: for each output, and for each column of the layers that are
        multiplied by their inputs first (see `Jacobian.times`).
    """

    rows_for_output: float
    rows_for_column: float

    def output_covariance(self, precisions: PriorPrecisions, relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """Return the function J -> J D^-1/2 (G + delta I)^-1 D^-1/2 J', evaluated at each delta in `precisions`.

        J is in the coordinates of the network, and `relative` is the diagonal of D. The function is a
        `jax.tree_util.Partial`. It can be traced, and so can `precisions`.
        """
        ...


@runtime_checkable
class RowStructure(CovarianceStructure, Protocol):
    """A structure that computes covariances of outputs from rows of J as well, at a cost that many precisions share."""

    def row_covariance(self, precisions: PriorPrecisions, relative: RelativePrecisions = 1.0) -> RowCovariance:
        """Return what `output_covariance` returns, as a function of the rows of J."""
        ...


@runtime_checkable
class AdditiveStructure(CovarianceStructure, Protocol):
    """A structure that can be added to that of other data: the curvature of one task after another."""

    def plus(self, other: "AdditiveStructure") -> "AdditiveStructure":
        """Return the structure of G + G_other, for another structure of the same kind and the same weights."""
        ...

    def product(self, vector: Float[AnyArray, " P"]) -> Float[AnyArray, " P"]:
        """G v. A NumPy array stays on the host and in float64; another one may be traced."""
        ...


@runtime_checkable
class SampleStructure(Structure, Protocol):
    """A structure that knows the outputs only through a limited number of samples."""

    @property
    def num_probes(self) -> int:
        """The largest number of samples."""
        ...

    @property
    def num_vectors(self) -> int:
        """How many derivatives of the outputs serve all prior precisions."""
        ...

    def reservation(self, prior_precision: PriorPrecision) -> str | None:
        """Describe what a user should know before using the structure at a prior precision; None if all is well."""
        ...

    def function_samples(
        self,
        pushforward: Callable[[Float[Array, "R P"]], Float[Array, "R B ... C"]],
        key: Array,
        num_samples: int,
        precisions: PriorPrecisions,
    ) -> Iterator[Float[Array, "S B ... C"]]:
        """Yield J times samples of the weights for each prior precision. `pushforward` is V -> J V."""
        ...

    def sample_directions(
        self, key: Array, num_samples: int, precisions: PriorPrecisions
    ) -> tuple[Float[Array, "R P"], Callable[[Float[Array, "R B ... C"]], Iterable[Float[Array, "S B ... C"]]]]:
        """Return V and a function that makes `function_samples` of J V, for whoever multiplies all of V at once."""
        ...

    def joint_covariance(self, rows: Float[Array, "B K P"], prior_precision: PriorPrecision) -> Float[Array, "B*K B*K"]:
        """Compute the covariance of the K outputs at B inputs jointly, from their Jacobian.

        The covariance of two inputs does not depend on the others.
        """
        ...

    def covariance_within(
        self,
        rows: Float[Array, "B K P"],
        prior_precision: PriorPrecision,
        factors: Float[Array, "B K R"] | None = None,
    ) -> Float[Array, "B K K"]:
        """Compute the covariance of the K outputs at each of B inputs, from their Jacobian.

        `factors` are those of the curvature of their outputs, if the posterior was fitted to these inputs.
        """
        ...
