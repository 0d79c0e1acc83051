"""A Kronecker-factored GGN, by the eigendecompositions of its factors.

The GGN is approximated layer by layer. A weight matrix W of I rows and O columns, flattened with its rows slowest, has
the block A kron B. With A = U diag(a) U' and B = V diag(b) V' this block is

    (A kron B) vec(W) = vec(A W B'),    A kron B = (U kron V) diag(a_i b_j) (U kron V)'.

So its eigenvectors are products of those of the factors, and U' W V are the coordinates of W in them. I^2 + O^2 numbers
describe a block of (I O)^2, and every function of G + delta I is a function of a_i b_j + delta between two rotations.
Weights that do not form a matrix have exact blocks instead, one for each filter, or an exact diagonal.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int, Num

from bnnlaplace.core.linalg import eigh, einsum, matmul
from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature import kronecker
from bnnlaplace.curvature.jacobian import Factors, Jacobian, LeafJacobian
from bnnlaplace.curvature.layout import as_matrix, from_matrix
from bnnlaplace.structure.protocol import OutputCovariance, PriorPrecision, PriorPrecisions, RelativePrecisions

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
    def fit(cls, sums: kronecker.LayerSums) -> "KroneckerBlock":
        """Decompose both factors of a layer's block (inputs kron outputs) / count."""
        rows, row_vectors = _decomposed(sums.inputs)
        columns, column_vectors = _decomposed(sums.outputs)
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
        return _between(self.row_vectors.T, matrices, self.column_vectors).reshape(vectors.shape)

    def rotated_back(self, coefficients: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Turn coordinates C in the eigenvectors into weights, U C V'."""
        shape = (*coefficients.shape[:-1], len(self.row_vectors), len(self.column_vectors))
        matrices = _between(self.row_vectors, coefficients.reshape(shape), self.column_vectors.T)
        return from_matrix(matrices, self._segments)

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
    def fit(cls, sums: kronecker.FilterSums) -> "FilterBlock":
        """Decompose the block of each filter."""
        return cls(*_decomposed(sums.blocks))

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
        return _einsum_like(vectors, "ckl,...kc->...cl", self.vectors, filters).reshape(vectors.shape)

    def rotated_back(self, coefficients: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Turn coordinates in the eigenvectors of each filter into weights."""
        by_filter = coefficients.reshape(*coefficients.shape[:-1], *self.values.shape)  # (..., C, K)
        return _einsum_like(coefficients, "ckl,...cl->...kc", self.vectors, by_filter).reshape(coefficients.shape)

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
    def fit(cls, sums: kronecker.DiagonalSums) -> "DiagonalBlock":
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

    @property
    def range(self) -> tuple[float, float]:
        """The largest entry, twice: no entry is lost beside a larger one, as the rounding of each is relative to it."""
        largest = float(np.asarray(self.diagonal).max())
        return largest, largest

    def divided(self, number: Float[ArrayLike, ""]) -> "DiagonalBlock":
        """The diagonal divided by a positive number."""
        return DiagonalBlock(self.diagonal / number)


Block = KroneckerBlock | FilterBlock | DiagonalBlock
_BY_SUMS = {
    kronecker.LayerSums: KroneckerBlock,
    kronecker.FilterSums: FilterBlock,
    kronecker.DiagonalSums: DiagonalBlock,
}


class KroneckerStructure(NamedTuple):
    """A block-diagonal G, with one block for each leaf of the weights.

    Memory: I^2 + O^2 numbers for each layer. In a layer that multiplies once for each example, a covariance of outputs
    costs I^2 + I O multiplications for each example and O^2 for each output.

    Attributes
    ----------
    blocks
        The blocks in the order of `jax.tree.leaves` of the weights, which is also the order of the flat vector.
    """

    blocks: list[Block]

    rows_for_output, rows_for_column = 0.0, 0.0

    @classmethod
    def fit(cls, sums: Sequence[kronecker.LeafSums]) -> "KroneckerStructure":
        """Decompose the sums of `kronecker.factors`. Eigenvalues that rounding made negative become zero."""
        return cls([_BY_SUMS[type(leaf)].fit(leaf) for leaf in sums])

    def resolution(self) -> float:
        """The prior precision below which curvature of its size cannot be told from the rounding of the factors.

        Zero if no eigenvalue is that small.
        """
        eps = float(jnp.finfo(jax.tree.leaves(self)[0].dtype).eps)
        limits = [(ROUNDING * eps * largest, smallest) for smallest, largest in (block.range for block in self.blocks)]
        return max((limit for limit, smallest in limits if smallest <= limit), default=0.0)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> "KroneckerStructure":
        """Rebuild the structure from its fields by name, as a checkpoint holds them."""
        # A checkpoint stores no classes. The names of the fields tell which kind of block they belong to.
        kinds = {frozenset(kind._fields): kind for kind in _BY_SUMS.values()}
        blocks = (jax.tree.map(jnp.asarray, fields) for fields in arrays["blocks"])
        return cls([kinds[frozenset(fields)](**fields) for fields in blocks])

    def whitened(self, relative: Float[AnyArray, " P"]) -> "KroneckerStructure":
        """Return the structure of D^-1/2 G D^-1/2. Nothing is decomposed again.

        Raises
        ------
        ValueError
            If D differs between weights of one leaf, because the block would not be a Kronecker product any more.
        """
        divisors = []
        for _, leaf_values in self._parts(jnp.asarray(relative)):
            if not isinstance(leaf_values, jax.core.Tracer) and not np.allclose(leaf_values, leaf_values[0], rtol=1e-6):
                raise ValueError(
                    "hessian_structure='kron' must have one prior precision for all weights of an array, as its blocks "
                    "are Kronecker products; got different ones; try prior_structure='layerwise', or 'diag' or 'full'"
                )
            divisors.append(leaf_values[0])
        # If D is d I on a leaf, D^-1/2 G D^-1/2 is G / d there, with the same eigenvectors.
        pairs = zip(self.blocks, divisors, strict=True)
        return KroneckerStructure([block.divided(divisor) for block, divisor in pairs])

    def scaled(self, factor: float) -> "KroneckerStructure":
        """Return the structure of factor * G."""
        return KroneckerStructure([block.divided(1 / factor) for block in self.blocks])

    def effective_parameters(
        self, prior_precision: PriorPrecision, groups: Int[np.ndarray, " P"]
    ) -> Float[np.ndarray, "1 g"]:
        """tr_g G (G + delta I)^-1 over the weights of each group.

        Raises
        ------
        ValueError
            If the weights of one leaf are in several groups.
        """
        sums = np.zeros(int(groups.max()) + 1)
        for block, leaf_values in self._parts(groups):
            # The eigenvectors mix the weights of a leaf, so its eigenvalues cannot be assigned to some of them.
            if leaf_values.min() != leaf_values.max():
                raise ValueError(
                    "hessian_structure='kron' must have all weights of an array in one group; got several; try "
                    "prior_structure='layerwise', or 'diag' or 'full'"
                )
            values = np.asarray(block.eigenvalues, np.float64)
            sums[leaf_values[0]] += (values / (values + float(prior_precision))).sum()
        return sums[None]

    def log_determinant(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """log det(I + G / delta), in float64."""
        # det of a block-diagonal matrix is the product over blocks, and over a_i b_j within a block.
        ratios = (np.asarray(block.eigenvalues, np.float64) / float(prior_precision) for block in self.blocks)
        return np.array([sum(np.log1p(ratio).sum() for ratio in ratios)])

    def truncation(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """Zero, because nothing is truncated."""
        return np.zeros(1)

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision) -> float:
        """v' (G + delta I)^-1 v, in float64."""
        # On the host, where float64 is available whatever the configuration of JAX.
        exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self)
        return float(
            sum(
                np.sum(block.rotated(leaf_values) ** 2 / (block.eigenvalues + float(prior_precision)))
                for block, leaf_values in exact._parts(np.asarray(vector, np.float64))
            )
        )

    def samples(self, key: Array, num_samples: int, prior_precision: PriorPrecision) -> Float[Array, "S P"]:
        """Draw rows Q diag((lambda + delta)^-1/2) eps, with the eigenvectors Q and eigenvalues lambda of each block."""
        dtype = jax.tree.leaves(self)[0].dtype
        noise = jax.random.normal(key, (num_samples, sum(block.size for block in self.blocks)), dtype)
        # The noise needs no rotation into the eigenvectors, as its distribution is the same in all orthonormal bases.
        return jnp.concatenate(
            [
                block.rotated_back(leaf_values / jnp.sqrt(block.eigenvalues + prior_precision))
                for block, leaf_values in self._parts(noise)
            ],
            axis=-1,
        )

    def output_covariance(self, precisions: PriorPrecisions, relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """Return the function J -> J Q diag(1 / (lambda + delta)) Q' J' / d, summed over blocks, at each delta.

        d is the number that D holds for all weights of the block.
        """
        divisors = [relative] * len(self.blocks)
        if jnp.ndim(relative):  # `whitened` has checked that all weights of a block have the same one
            divisors = [leaf_values[0] for _, leaf_values in self._parts(jnp.asarray(relative))]
        dtype = jax.tree.leaves(self)[0].dtype
        return Partial(_covariances, self.blocks, jnp.asarray(precisions, dtype), divisors)

    def _parts(self, vectors: Num[AnyArray, "... P"]) -> Iterator[tuple[Block, Num[AnyArray, "... p"]]]:
        """Yield each block with the numbers of its leaf, cut out of flat vectors."""
        start = 0
        for block in self.blocks:
            yield block, vectors[..., start : start + block.size]
            start += block.size


def _covariances(
    blocks: list[Block],
    precisions: Float[Array, " D"],
    divisors: list[Float[ArrayLike, ""]],
    jacobian: Jacobian,
) -> Float[Array, "D M U C C"]:
    """Sum the covariances of outputs over blocks, at each delta."""
    # The rotation into eigenvectors is the expensive step. It does not depend on delta, so it stays outside the loop.
    rotated = [_in_eigenvectors(leaf, block) for leaf, block in zip(jacobian.leaves, blocks, strict=True)]

    def at(delta: Float[Array, ""]) -> Float[Array, "M U C C"]:
        leaves = zip(rotated, blocks, divisors, strict=True)
        return sum(factors.weighted(_variances(factors, block, delta) / divisor) for factors, block, divisor in leaves)

    return jax.lax.map(at, precisions)


def _in_eigenvectors(leaf: LeafJacobian, block: Block) -> Factors:
    """Rotate the derivatives with respect to one leaf into the eigenvectors of its block."""
    if isinstance(block, KroneckerBlock) and leaf.inputs is not None:
        # A row of J is a kron g, which the factors rotate to U' a kron V' g: the product is never formed.
        return leaf.rotated(block.row_vectors, block.column_vectors).factors()
    return Factors(None, block.rotated(leaf.rows()))


def _variances(factors: Factors, block: Block, delta: Float[Array, ""]) -> Float[Array, "..."]:
    """1 / (lambda + delta), in the shape that `factors.weighted` takes."""
    flat = 1 / (block.eigenvalues + delta)
    return flat if factors.inputs is None else flat.reshape(factors.inputs.shape[-1], -1)


def _decomposed(matrix: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
    """Eigenvalues and eigenvectors of semidefinite matrices. Values that rounding may have made of zero are zero."""
    values, vectors = eigh((matrix + jnp.swapaxes(matrix, -1, -2)) / 2)
    resolution = ROUNDING * jnp.finfo(values.dtype).eps * values.max(axis=-1, keepdims=True)
    return jnp.where(values <= resolution, 0, values), vectors


def _between(left: AnyArray, matrices: AnyArray, right: AnyArray) -> AnyArray:
    """Multiply each matrix M to left M right; NumPy arrays stay on the host and in float64."""
    if isinstance(matrices, np.ndarray):
        return left @ matrices @ right
    return matmul(matmul(left, matrices), right)


def _einsum_like(like: AnyArray, pattern: str, *operands: AnyArray) -> AnyArray:
    """Call einsum of NumPy if `like` is a NumPy array, otherwise that of JAX in full precision."""
    return (np.einsum if isinstance(like, np.ndarray) else einsum)(pattern, *operands)
