"""The diagonal of the GGN: the baseline. By Hadamard's inequality its log-determinant is never below the true one."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import group_sums
from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature.jacobian import Jacobian
from bnnlaplace.structure.protocol import (
    OutputCovariance,
    PriorPrecision,
    PriorPrecisions,
    RelativePrecisions,
    RowCovariance,
)

# How many products of pairs of rows are in memory at a time: few enough for a cache.
PAIR_NUMBERS = 2**18


class DiagonalStructure(NamedTuple):
    """The GGN with everything off its diagonal set to zero.

    Attributes
    ----------
    diagonal
        diag(G), shape (P,).
    """

    diagonal: Float[Array, " P"]

    rows_for_output, rows_for_column = 0.0, 0.0

    def resolution(self) -> float:
        """Zero: an entry is a sum of squares, whose rounding is relative to the entry itself."""
        return 0.0

    @classmethod
    def from_arrays(cls, arrays: dict[str, AnyArray]) -> "DiagonalStructure":
        """Rebuild the structure from its fields by name, as a checkpoint holds them."""
        return cls(**{name: jnp.asarray(array) for name, array in arrays.items()})

    def whitened(self, relative: Float[AnyArray, " P"]) -> "DiagonalStructure":
        """Return the structure of D^-1/2 G D^-1/2."""
        return DiagonalStructure(self.diagonal / relative)

    def scaled(self, factor: float) -> "DiagonalStructure":
        """Return the structure of factor * G."""
        return DiagonalStructure(factor * self.diagonal)

    def plus(self, other: "DiagonalStructure") -> "DiagonalStructure":
        """Return the structure of G + G_other."""
        return DiagonalStructure(self.diagonal + other.diagonal)

    def product(self, vector: Float[AnyArray, " P"]) -> Float[AnyArray, " P"]:
        """G v. A NumPy array stays on the host and in float64."""
        return (np.asarray(self.diagonal, np.float64) if isinstance(vector, np.ndarray) else self.diagonal) * vector

    def log_determinant(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """log det(I + diag(G) / delta), in float64."""
        # In float64 on the host, because a sum over all weights loses digits in float32.
        ratio = np.asarray(self.diagonal, np.float64) / float(prior_precision)
        return np.log1p(ratio).sum(keepdims=True)

    def truncation(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """Zero, because nothing is truncated."""
        return np.zeros(1)

    def effective_parameters(
        self, prior_precision: PriorPrecision, groups: Int[np.ndarray, " P"]
    ) -> Float[np.ndarray, "1 g"]:
        """The sum of G_ii / (G_ii + delta) over the weights of each group."""
        return group_sums(self.diagonal / (self.diagonal + prior_precision), groups)[None]

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision) -> float:
        """v' diag(1 / (diag(G) + delta)) v."""
        return float(np.sum(vector**2 / (np.asarray(self.diagonal, np.float64) + prior_precision)))

    def inverse_product(
        self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision
    ) -> Float[np.ndarray, " P"]:
        """diag(1 / (diag(G) + delta)) v, in float64."""
        return vector / (np.asarray(self.diagonal, np.float64) + prior_precision)

    def samples(self, key: Array, num_samples: int, prior_precision: PriorPrecision) -> Float[Array, "S P"]:
        """Draw rows eps / sqrt(diag(G) + delta)."""
        noise = jax.random.normal(key, (num_samples, self.diagonal.size), self.diagonal.dtype)
        return noise / jnp.sqrt(self.diagonal + prior_precision)

    def output_covariance(self, precisions: PriorPrecisions, relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """Return the function J -> J diag(1 / (D (diag(G) + delta))) J', evaluated at each delta."""
        return Partial(_covariances, self.diagonal, jnp.asarray(precisions, self.diagonal.dtype), relative)

    def row_covariance(self, precisions: PriorPrecisions, relative: RelativePrecisions = 1.0) -> RowCovariance:
        """Return the same function of the rows of J. Rows are multiplied pair by pair once for all precisions."""
        relative = jnp.broadcast_to(jnp.asarray(relative, self.diagonal.dtype), self.diagonal.shape)
        return Partial(_row_covariances, self.diagonal, jnp.asarray(precisions, self.diagonal.dtype), relative)


def _covariances(
    diagonal: Float[Array, " P"],
    precisions: Float[Array, " D"],
    relative: RelativePrecisions,
    jacobian: Jacobian,
) -> Float[Array, "D M U C C"]:
    """Sum J_l diag(v_l) J_l' over the leaves l, where v_l holds the posterior variances of the leaf's weights."""
    # The factors do not depend on delta, so they are formed once, outside the loop over precisions.
    factors = [leaf.factors() for leaf in jacobian.leaves]
    ends = np.cumsum(jacobian.sizes)[:-1]

    def at(delta: Float[Array, ""]) -> Float[Array, "M U C C"]:
        variances = jnp.split(1 / (diagonal + delta) / relative, ends)
        leaves = zip(jacobian.leaves, factors, variances, strict=True)
        return sum(leaf_factors.weighted(leaf.as_matrix(variance)) for leaf, leaf_factors, variance in leaves)

    # One precision after another, because all at once would hold D times the weighted derivatives in memory.
    return jax.lax.map(at, precisions)


def _row_covariances(
    diagonal: Float[Array, " P"],
    precisions: Float[Array, " D"],
    relative: Float[Array, " P"],
    rows: Float[Array, "U C M P"],
) -> Float[Array, "D M U C C"]:
    """Multiply rows pair by pair of a group's outputs, and all pairs by the matrix of variances at all precisions.

    Each of the C (C + 1) / 2 pairs costs P multiplications, and P D in one product of matrices. One precision after
    another would cost C^2 P each in products of matrices as small as C x C. Weights are taken a few at a time, so that
    neither pairs nor variances are in memory as a whole.
    """
    groups, outputs, count, width = rows.shape
    first, second = np.triu_indices(outputs)
    chunk = max(1, min(width, PAIR_NUMBERS // max(1, count * groups * len(first))))

    def part(start: Int[ArrayLike, ""], size: int) -> Float[Array, "U K M D"]:
        some, curvature, ratio = (
            jax.lax.dynamic_slice_in_dim(array, start, size, axis=-1) for array in (rows, diagonal, relative)
        )
        pairs = some[:, first] * some[:, second]
        return einsum("ukmp,pd->ukmd", pairs, 1 / (curvature[:, None] + precisions) / ratio[:, None])

    num_whole = width // chunk
    # What is left after whole chunks comes first, because no copy of the rows is padded.
    total = part(num_whole * chunk, width - num_whole * chunk)
    starts = chunk * jnp.arange(num_whole)
    total = jax.lax.scan(lambda total, start: (total + part(start, chunk), None), total, starts)[0]
    place = np.zeros((outputs, outputs), np.int32)
    place[first, second] = place[second, first] = np.arange(len(first))
    return jnp.transpose(total[:, place], (4, 3, 0, 1, 2))
