"""A Kronecker-factored GGN by the eigendecompositions of its factors: layer by layer, for networks of any depth."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from bnnlaplace.core.linalg import eigh, einsum, matmul
from bnnlaplace.curvature import kronecker
from bnnlaplace.curvature.jacobian import Factors, Jacobian, LeafJacobian
from bnnlaplace.curvature.layout import as_matrix, from_matrix
from bnnlaplace.structure.protocol import OutputCovariance, RelativePrecisions


class KroneckerBlock(NamedTuple):
    """The block (A kron B) of a matrix by A = U diag(a) U' and B = V diag(b) V'; its eigenvalues are a_i b_j.

    Attributes
    ----------
    row_values, column_values
        a and b, shaped so that their product has the shape of the weight, with neighbouring axes of the same side
        joined: (I, 1) and (1, O) for a kernel that is stored input first.
    row_vectors, column_vectors
        U and V.
    """

    row_values: Float[Array, "..."]
    row_vectors: Float[Array, "I I"]
    column_values: Float[Array, "..."]
    column_vectors: Float[Array, "O O"]

    @classmethod
    def fit(cls, sums: kronecker.LayerSums) -> "KroneckerBlock":
        """Decompose both factors."""
        rows, row_vectors = _decomposed(sums.inputs)
        columns, column_vectors = _decomposed(sums.outputs)
        row_shape = [size if is_row else 1 for size, is_row in sums.segments]
        column_shape = [1 if is_row else size for size, is_row in sums.segments]
        return cls((rows / sums.count).reshape(row_shape), row_vectors, columns.reshape(column_shape), column_vectors)

    @property
    def eigenvalues(self) -> Float[Array, " p"]:
        """a_i b_j, rows slowest."""
        return (self.row_values.reshape(-1, 1) * self.column_values.reshape(-1)).reshape(-1)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.row_values.size * self.column_values.size

    def rotated(self, vectors: Float[Array, "... p"]) -> Float[Array, "... p"]:
        """Weights -> coefficients of the eigenvectors."""
        matrices = as_matrix(vectors, self._segments)
        return _between(self.row_vectors.T, matrices, self.column_vectors).reshape(vectors.shape)

    def rotated_back(self, coefficients: Float[Array, "... p"]) -> Float[Array, "... p"]:
        """Coefficients of the eigenvectors -> weights."""
        shape = (*coefficients.shape[:-1], len(self.row_vectors), len(self.column_vectors))
        matrices = _between(self.row_vectors, coefficients.reshape(shape), self.column_vectors.T)
        return from_matrix(matrices, self._segments)

    def divided(self, number: Float[Array, ""]) -> "KroneckerBlock":
        """The block divided by a positive number."""
        return self._replace(row_values=self.row_values / number)

    @property
    def _segments(self) -> list[tuple[int, bool]]:
        shapes = zip(self.row_values.shape, self.column_values.shape, strict=True)
        return [(rows * columns, rows > 1) for rows, columns in shapes]


class FilterBlock(NamedTuple):
    """Exact blocks of a leaf of shape (..., C), one for each last index; a vector is one filter.

    Attributes
    ----------
    values, vectors
        Eigenvalues (C, K), and eigenvectors in the columns of C matrices.
    """

    values: Float[Array, "C K"]
    vectors: Float[Array, "C K K"]

    @classmethod
    def fit(cls, sums: kronecker.FilterSums) -> "FilterBlock":
        """Decompose all blocks."""
        return cls(*_decomposed(sums.blocks))

    @property
    def eigenvalues(self) -> Float[Array, " p"]:
        """Those of one filter after another."""
        return self.values.reshape(-1)

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.values.size

    def rotated(self, vectors: Float[Array, "... p"]) -> Float[Array, "... p"]:
        """Weights -> coefficients of the eigenvectors."""
        parts = vectors.reshape(*vectors.shape[:-1], *self.values.shape[::-1])
        return _einsum_like(vectors, "ckl,...kc->...cl", self.vectors, parts).reshape(vectors.shape)

    def rotated_back(self, coefficients: Float[Array, "... p"]) -> Float[Array, "... p"]:
        """Coefficients of the eigenvectors -> weights."""
        parts = coefficients.reshape(*coefficients.shape[:-1], *self.values.shape)
        return _einsum_like(coefficients, "ckl,...cl->...kc", self.vectors, parts).reshape(coefficients.shape)

    def divided(self, number: Float[Array, ""]) -> "FilterBlock":
        """The blocks divided by a positive number."""
        return self._replace(values=self.values / number)


class DiagonalBlock(NamedTuple):
    """The exact diagonal of a leaf."""

    diagonal: Float[Array, " p"]

    @classmethod
    def fit(cls, sums: kronecker.DiagonalSums) -> "DiagonalBlock":
        """Nothing is left to decompose."""
        return cls(sums.diagonal)

    @property
    def eigenvalues(self) -> Float[Array, " p"]:
        """The diagonal."""
        return self.diagonal

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.diagonal.size

    def rotated(self, vectors: Float[Array, "... p"]) -> Float[Array, "... p"]:
        """The same: weights are the eigenvectors."""
        return vectors

    def rotated_back(self, coefficients: Float[Array, "... p"]) -> Float[Array, "... p"]:
        """The same."""
        return coefficients

    def divided(self, number: Float[Array, ""]) -> "DiagonalBlock":
        """The diagonal divided by a positive number."""
        return DiagonalBlock(self.diagonal / number)


Block = KroneckerBlock | FilterBlock | DiagonalBlock
_BY_SUMS = {
    kronecker.LayerSums: KroneckerBlock,
    kronecker.FilterSums: FilterBlock,
    kronecker.DiagonalSums: DiagonalBlock,
}


class KroneckerStructure(NamedTuple):
    """A block-diagonal G, one block for each leaf of the weights.

    Memory: I^2 + O^2 numbers for each layer. A covariance of outputs costs I^2 + I O multiplications for each example
    and O^2 for each output, of a layer with one position.

    Attributes
    ----------
    blocks
        In the order of `jax.tree.leaves` of the weights, which is that of the flat vector.
    """

    blocks: list[Block]

    rows_for_output, rows_for_column = 0.0, 0.0

    @classmethod
    def fit(cls, sums: Sequence[kronecker.LeafSums]) -> "KroneckerStructure":
        """Decompose what `kronecker.factors` summed; eigenvalues that rounding made negative become zero."""
        return cls([_BY_SUMS[type(leaf)].fit(leaf) for leaf in sums])

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> "KroneckerStructure":
        """Rebuild from its fields by name, as a checkpoint holds them."""
        kinds = {frozenset(kind._fields): kind for kind in _BY_SUMS.values()}
        blocks = (jax.tree.map(jnp.asarray, fields) for fields in arrays["blocks"])
        return cls([kinds[frozenset(fields)](**fields) for fields in blocks])

    def whitened(self, relative: Float[Array, " P"]) -> "KroneckerStructure":
        """D^-1/2 G D^-1/2; nothing is decomposed again.

        Raises
        ------
        ValueError
            If D is not the same for all weights of a leaf: the block would be no Kronecker product.
        """
        numbers = []
        for _, part in self._parts(jnp.asarray(relative)):
            if not isinstance(part, jax.core.Tracer) and not np.allclose(part, part[0], rtol=1e-6):
                raise ValueError(
                    "hessian_structure='kron' must have one prior precision for all weights of an array, as its blocks "
                    "are Kronecker products; got different ones; try prior_structure='layerwise', or 'diag' or 'full'"
                )
            numbers.append(part[0])
        return KroneckerStructure([block.divided(number) for block, number in zip(self.blocks, numbers, strict=True)])

    def scaled(self, factor: float) -> "KroneckerStructure":
        """That of factor * G."""
        return KroneckerStructure([block.divided(1 / factor) for block in self.blocks])

    def effective_parameters(self, prior_precision: float, groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "1 g"]:
        """tr_g G (G + delta I)^-1 over the weights of each group.

        Raises
        ------
        ValueError
            If a group holds some weights of a leaf and not the others.
        """
        sums = np.zeros(int(groups.max()) + 1)
        for block, part in self._parts(groups):
            if part.min() != part.max():
                raise ValueError(
                    "hessian_structure='kron' must have all weights of an array in one group; got several; try "
                    "prior_structure='layerwise', or 'diag' or 'full'"
                )
            values = np.asarray(block.eigenvalues, np.float64)
            sums[part[0]] += (values / (values + float(prior_precision))).sum()
        return sums[None]

    def log_determinant(self, prior_precision: float) -> Float[np.ndarray, " 1"]:
        """log det(I + G / delta), in float64."""
        ratios = (np.asarray(block.eigenvalues, np.float64) / float(prior_precision) for block in self.blocks)
        return np.array([sum(np.log1p(ratio).sum() for ratio in ratios)])

    def truncation(self, prior_precision: float) -> Float[np.ndarray, " 1"]:
        """Zero: nothing is truncated."""
        return np.zeros(1)

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: float) -> float:
        """v' (G + delta I)^-1 v, in float64."""
        exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), self)
        return float(
            sum(
                np.sum(block.rotated(part) ** 2 / (block.eigenvalues + float(prior_precision)))
                for block, part in exact._parts(np.asarray(vector, np.float64))
            )
        )

    def samples(self, key: Array, num_samples: int, prior_precision: float) -> Float[Array, "S P"]:
        """Rows V diag((lambda + delta)^-1/2) eps of each block."""
        dtype = jax.tree.leaves(self)[0].dtype
        noise = jax.random.normal(key, (num_samples, sum(block.size for block in self.blocks)), dtype)
        return jnp.concatenate(
            [
                block.rotated_back(part / jnp.sqrt(block.eigenvalues + prior_precision))
                for block, part in self._parts(noise)
            ],
            axis=-1,
        )

    def output_covariance(self, precisions: Sequence[float], relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """J -> J V (lambda + delta)^-1 V' J' / D for each delta, block by block."""
        numbers = [relative] * len(self.blocks)
        if jnp.ndim(relative):  # all weights of a block have the same one, as `whitened` makes sure
            numbers = [part[0] for _, part in self._parts(jnp.asarray(relative))]
        dtype = jax.tree.leaves(self)[0].dtype
        return Partial(_covariances, self.blocks, jnp.asarray(precisions, dtype), numbers)

    def _parts(self, vectors: Float[Array, "... P"]) -> Iterator[tuple[Block, Float[Array, "... p"]]]:
        """Each block with its part of flat vectors."""
        start = 0
        for block in self.blocks:
            yield block, vectors[..., start : start + block.size]
            start += block.size


def _covariances(
    blocks: list[Block], precisions: Float[Array, " D"], divisors: list[Array], jacobian: Jacobian
) -> Float[Array, "D M U C C"]:
    factors = [_in_eigenvectors(leaf, block) for leaf, block in zip(jacobian.leaves, blocks, strict=True)]

    def at(delta: Float[Array, ""]) -> Float[Array, "M U C C"]:
        parts = zip(factors, blocks, divisors, strict=True)
        return sum(found.weighted(_variances(found, block, delta) / divisor) for found, block, divisor in parts)

    return jax.lax.map(at, precisions)


def _in_eigenvectors(leaf: LeafJacobian, block: Block) -> Factors:
    if isinstance(block, KroneckerBlock) and leaf.inputs is not None:
        return leaf.rotated(block.row_vectors, block.column_vectors).factors()
    return Factors(None, block.rotated(leaf.rows()))


def _variances(factors: Factors, block: Block, delta: Float[Array, ""]) -> Float[Array, "..."]:
    flat = 1 / (block.eigenvalues + delta)
    return flat if factors.inputs is None else flat.reshape(factors.inputs.shape[-1], -1)


def _decomposed(matrix: Float[Array, "... D D"]) -> tuple[Float[Array, "... D"], Float[Array, "... D D"]]:
    values, vectors = eigh((matrix + jnp.swapaxes(matrix, -1, -2)) / 2)
    return jnp.maximum(values, 0), vectors


def _between(left: Array, matrices: Array, right: Array) -> Array:
    """left M right for each matrix; on the host for NumPy arrays."""
    if isinstance(matrices, np.ndarray):
        return left @ matrices @ right
    return matmul(matmul(left, matrices), right)


def _einsum_like(like: Array, pattern: str, *operands: Array) -> Array:
    """On the host for NumPy arrays."""
    return (np.einsum if isinstance(like, np.ndarray) else einsum)(pattern, *operands)
