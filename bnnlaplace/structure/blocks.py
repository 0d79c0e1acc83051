"""A Kronecker-factored GGN, by the eigendecompositions of its factors.

The GGN is approximated layer by layer. A weight matrix W of I rows and O columns, flattened with its rows slowest, has
the block A kron B. With A = U diag(a) U' and B = V diag(b) V' this block is

    (A kron B) vec(W) = vec(A W B'),    A kron B = (U kron V) diag(a_i b_j) (U kron V)'.

So its eigenvectors are products of those of the factors, and U' W V are the coordinates of W in them. I^2 + O^2 numbers
describe a block of (I O)^2, and every function of G + delta I is a function of a_i b_j + delta between two rotations.
Weights that do not form a matrix have exact blocks instead, one for each filter, or an exact diagonal.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Num

from bnnlaplace.core.linalg import eigh, einsum, matmul
from bnnlaplace.core.rounding import OF_FLOAT32
from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature import kronecker
from bnnlaplace.curvature.layout import as_matrix, from_matrix

# Rounding of the eigenvalues of a factor, over eps times the largest one.
ROUNDING = 4.0


class KroneckerBlock(NamedTuple):
    """The block A kron B of a weight matrix, by the eigendecompositions of A and B.

    Attributes
    ----------
    row_values, column_values
        The eigenvalues a and b. Their shapes broadcast to the shape of the weight, in which neighbouring axes of the
        same side are joined: (I, 1) and (1, O) for a kernel that is stored input first.
    row_vectors, column_vectors
        The eigenvectors U and V, in columns.
    """

    row_values: Float[Array, "..."]
    row_vectors: Float[Array, "I I"]
    column_values: Float[Array, "..."]
    column_vectors: Float[Array, "O O"]

    @classmethod
    def fit(cls, sums: kronecker.LayerSums, rounding: Num[ArrayLike, ""]) -> "KroneckerBlock":
        """Decompose both factors of a layer's block (inputs kron outputs) / count."""
        rows, row_vectors = decomposed(sums.inputs, rounding)
        columns, column_vectors = decomposed(sums.outputs, rounding)
        row_shape = [size if is_row else 1 for size, is_row in sums.segments]
        column_shape = [1 if is_row else size for size, is_row in sums.segments]
        # A count of zero is the trace of a factor that is zero, and so is the block.
        rows = rows / jnp.where(sums.count > 0, sums.count, 1)
        # The shapes store how the axes of the weight alternate between rows and columns; see `_segments`.
        return cls(rows.reshape(row_shape), row_vectors, columns.reshape(column_shape), column_vectors)

    @property
    def eigenvalues(self) -> Float[AnyArray, " p"]:
        """The products a_i b_j, with the index of the rows slowest."""
        return (self.row_values.reshape(-1, 1) * self.column_values.reshape(-1)).reshape(-1)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.row_values.size * self.column_values.size

    def rotated(self, vectors: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Turn weights W into their coordinates in the eigenvectors, U' W V."""
        matrices = as_matrix(vectors, self._segments)
        return between(self.row_vectors.T, matrices, self.column_vectors).reshape(vectors.shape)

    def rotated_back(self, coefficients: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Turn coordinates C in the eigenvectors into weights, U C V'."""
        shape = (*coefficients.shape[:-1], len(self.row_vectors), len(self.column_vectors))
        matrices = between(self.row_vectors, coefficients.reshape(shape), self.column_vectors.T)
        return from_matrix(matrices, self._segments)

    def product(self, vectors: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Multiply weights by the block."""
        return self.rotated_back(self.eigenvalues * self.rotated(vectors))

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue."""
        rows, columns = np.asarray(self.row_values), np.asarray(self.column_values)
        return float(rows.min()) * float(columns.min()), float(rows.max()) * float(columns.max())

    def divided(self, number: Float[ArrayLike, ""]) -> "KroneckerBlock":
        """The block divided by a positive number."""
        return self._replace(row_values=self.row_values / number)

    @property
    def _segments(self) -> list[tuple[int, bool]]:
        """The length of each axis of the weight, and whether it belongs to the rows of the matrix."""
        # On each axis one of the two shapes is one. An axis of length one may count as a column: it moves nothing.
        shapes = zip(self.row_values.shape, self.column_values.shape, strict=True)
        return [(rows * columns, rows > 1) for rows, columns in shapes]


class FilterBlock(NamedTuple):
    """Exact blocks of a leaf of shape (..., C), one for each of the C filters; a vector is one filter.

    The leaf stores its filters in the last axis: it is a matrix (K, C). Eigenvalues and coordinates are stored filter
    by filter, (C, K).

    Attributes
    ----------
    values, vectors
        Eigenvalues (C, K), and eigenvectors in the columns of C matrices.
    """

    values: Float[Array, "C K"]
    vectors: Float[Array, "C K K"]

    @classmethod
    def fit(cls, sums: kronecker.FilterSums, rounding: Num[ArrayLike, ""]) -> "FilterBlock":
        """Decompose the block of each filter."""
        return cls(*decomposed(sums.blocks, rounding))

    @property
    def eigenvalues(self) -> Float[AnyArray, " p"]:
        """The eigenvalues of one filter after another."""
        return self.values.reshape(-1)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.values.size

    def rotated(self, vectors: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Turn weights into their coordinates in the eigenvectors of each filter."""
        filters = vectors.reshape(*vectors.shape[:-1], *self.values.shape[::-1])  # (..., K, C)
        return einsum_like(vectors, "ckl,...kc->...cl", self.vectors, filters).reshape(vectors.shape)

    def rotated_back(self, coefficients: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Turn coordinates in the eigenvectors of each filter into weights."""
        by_filter = coefficients.reshape(*coefficients.shape[:-1], *self.values.shape)  # (..., C, K)
        return einsum_like(coefficients, "ckl,...cl->...kc", self.vectors, by_filter).reshape(coefficients.shape)

    def product(self, vectors: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Multiply weights by the block."""
        return self.rotated_back(self.eigenvalues * self.rotated(vectors))

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest eigenvalue."""
        values = np.asarray(self.values)
        return float(values.min()), float(values.max())

    def divided(self, number: Float[ArrayLike, ""]) -> "FilterBlock":
        """The blocks divided by a positive number."""
        return self._replace(values=self.values / number)


class DiagonalBlock(NamedTuple):
    """The exact diagonal of a leaf, whose weights are their own coordinates."""

    diagonal: Float[Array, " p"]

    @classmethod
    def fit(cls, sums: kronecker.DiagonalSums, rounding: Num[ArrayLike, ""]) -> "DiagonalBlock":
        """Take the diagonal as it is: a diagonal needs no decomposition."""
        return cls(sums.diagonal)

    @property
    def eigenvalues(self) -> Float[AnyArray, " p"]:
        """The diagonal."""
        return self.diagonal

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.diagonal.size

    def rotated(self, vectors: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Return the weights: they are their own coordinates."""
        return vectors

    def rotated_back(self, coefficients: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Return the coordinates: they are the weights."""
        return coefficients

    def product(self, vectors: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Multiply weights by the diagonal."""
        return self.diagonal * vectors

    @property
    def range(self) -> tuple[float, float]:
        """The largest entry, twice: no entry is lost beside a larger one, as the rounding of each is relative to it."""
        largest = float(np.asarray(self.diagonal).max())
        return largest, largest

    def divided(self, number: Float[ArrayLike, ""]) -> "DiagonalBlock":
        """The diagonal divided by a positive number."""
        return DiagonalBlock(self.diagonal / number)


def error_of_values(dtype: Any, rounding: Num[ArrayLike, ""]) -> Num[ArrayLike, ""]:
    """Error of eigenvalues that should be zero, over the largest one: that of sums in `dtype`, and of derivatives.

    The relative error `rounding` of derivatives enters such eigenvalues by its square.
    """
    return ROUNDING * float(jnp.finfo(dtype).eps) + rounding**2


def decomposed(
    matrix: Float[AnyArray, "... D D"], rounding: Num[ArrayLike, ""] = OF_FLOAT32
) -> tuple[Float[AnyArray, "... D"], Float[AnyArray, "... D D"]]:
    """Eigenvalues and eigenvectors of semidefinite matrices. Values that rounding may have made of zero are zero.

    `rounding` is the relative error of the derivatives behind them. NumPy arrays stay on the host and in float64.
    """
    on_host = isinstance(matrix, np.ndarray)
    values, vectors = (np.linalg.eigh if on_host else eigh)((matrix + matrix.swapaxes(-1, -2)) / 2)
    resolution = error_of_values(values.dtype, rounding) * values.max(axis=-1, keepdims=True)
    return (np if on_host else jnp).where(values <= resolution, 0, values), vectors


def between(left: AnyArray, matrices: AnyArray, right: AnyArray) -> AnyArray:
    """Multiply each matrix M to left M right; NumPy arrays stay on the host and in float64."""
    if isinstance(matrices, np.ndarray):
        return left @ matrices @ right
    return matmul(matmul(left, matrices), right)


def einsum_like(like: AnyArray, pattern: str, *operands: AnyArray) -> AnyArray:
    """Call einsum of NumPy if `like` is a NumPy array, otherwise that of JAX in full precision."""
    return (np.einsum if isinstance(like, np.ndarray) else einsum)(pattern, *operands)
