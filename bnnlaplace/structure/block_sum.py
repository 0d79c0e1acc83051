"""Sums of blocks, as in the posterior of one task after another.

A sum of Kronecker products K = A_1 kron B_1 + ... + A_T kron B_T is none itself. `BlockSum` keeps the terms, so K v is
exact. What needs an inverse comes from a root L of K + delta I with

    L = Q_1 D_1^1/2 Q_1' Q_2 D_2^1/2 Q_2' ...,    K + delta I ~ L L'.

The first term alone is exact: A_1 kron B_1 + delta I = Q_1 D_1 Q_1' with Kronecker eigenvectors Q_1. In the coordinates
D_1^-1/2 Q_1' this is the identity, and the second term has the entries

    (D^-1/2 (A kron B) D^-1/2)_ij,kl = A_ik B_jl / sqrt(d_ij d_kl)        with A and B in the eigenvectors of Q_1.

There it is approximated by the Kronecker product of its partial traces, divided by its trace, as factors of shared
weights are (`bnnlaplace.curvature.kronecker_factors`):

    A~_ik = A_ik sum_j B_jj / sqrt(d_ij d_kj),    B~_jl = B_jl sum_i A_ii / sqrt(d_ij d_il).

Then I + A~ kron B~ = Q_2 D_2 Q_2' gives the next factor of the root. A further term passes through all coordinates
before it, and is approximated after each. In whitened coordinates an error counts as it does for variances and
determinants, relative to what is known already; `docs/decisions.md` compares with other approximations. The root of the
first T - 1 terms is a part of that of T terms, so the log-determinants of successive posteriors cancel in a sum of
evidences.

Small blocks are summed as matrices instead, which is exact.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, Float, Num

from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.types import AnyArray
from bnnlaplace.structure.blocks import DiagonalBlock, FilterBlock, KroneckerBlock, decomposed

# Weights with up to so many numbers have one exact block for their sum.
MAX_EXACT = 512
# The largest number of weights for which a trace is exact, and the probes for more.
MAX_COLUMNS, NUM_PROBES = 2048, 64

PlainBlock = KroneckerBlock | FilterBlock | DiagonalBlock


class Step(NamedTuple):
    """One factor Q D^1/2 Q' of a root.

    It is symmetric, so that samples do not depend on the signs of eigenvectors, which are not the same inside `jit`.

    Attributes
    ----------
    block
        Its eigenvectors are Q.
    shift
        What is added to its eigenvalues: delta in the first step, one in all others.
    """

    block: PlainBlock
    shift: Num[ArrayLike, ""]

    @property
    def values(self) -> Float[AnyArray, " p"]:
        """The diagonal D."""
        return self.block.eigenvalues + self.shift


Root = list[Step]


def root_of(block: "PlainBlock | BlockSum", delta: Num[ArrayLike, ""]) -> Root:
    """Return L with L L' = K + delta I: exact for a plain block, which needs one step."""
    if not isinstance(block, BlockSum):
        return [Step(block, delta)]
    root = [Step(block.terms[0], delta)]
    for term in block.terms[1:]:
        rows, columns = (_from_eigenvectors(*side) for side in _sides(term))
        for step in root:
            rows, columns = _whitened_factors(rows, columns, step)
        row_values, row_vectors = decomposed(rows)
        column_values, column_vectors = decomposed(columns)
        row_values = row_values.reshape(term.row_values.shape)
        column_values = column_values.reshape(term.column_values.shape)
        root.append(Step(KroneckerBlock(row_values, row_vectors, column_values, column_vectors), 1.0))
    return root


def log_determinant(root: Root) -> float:
    """log det(I + K / delta), for a root on the host."""
    return sum(float(np.log1p(step.block.eigenvalues / step.shift).sum()) for step in root)


def effective_parameters(root: Root, delta: float, size: int) -> float:
    """tr K (K + delta I)^-1 = p - delta |L^-1|^2, for a root on the host.

    With more than `MAX_COLUMNS` weights it is estimated with standard error sqrt(2 / NUM_PROBES) times the root of the
    result at most, because L^-1 has as many rows as there are weights.
    """
    if size <= MAX_COLUMNS:
        probes = np.eye(size)
    else:  # fixed signs, so that the answer is the same each time
        probes = np.random.default_rng(0).choice([-1.0, 1.0], (NUM_PROBES, size)) / np.sqrt(NUM_PROBES)
    return float(size - delta * np.sum(whitened(root, probes) ** 2))


def whitened(root: Root, vectors: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
    """L^-1 v: the squared norm is v' (K + delta I)^-1 v. For a plain block it is rotated by Q'."""
    for step in root:
        vectors = step.block.rotated(vectors) * step.values**-0.5
        if len(root) > 1:
            vectors = step.block.rotated_back(vectors)
    return vectors


def coloured(root: Root, noise: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
    """L'^-1 eps: it has the covariance (K + delta I)^-1 if that of eps is the identity.

    For a plain block the noise is not rotated first: its distribution is the same in all orthonormal bases, and the
    eigenvectors of the block are always the same.
    """
    for step in reversed(root):
        if len(root) > 1:
            noise = step.block.rotated(noise)
        noise = step.block.rotated_back(noise * step.values**-0.5)
    return noise


class BlockSum(NamedTuple):
    """The sum of the blocks of one weight matrix over several tasks.

    Memory: I^2 + O^2 numbers for each task. A root costs as many eigendecompositions of both factors as there are
    tasks. Covariances of outputs need the derivatives in the weights themselves.

    Attributes
    ----------
    terms
        The blocks, the oldest first.
    """

    terms: list[KroneckerBlock]

    @property
    def size(self) -> int:
        """The number of weights."""
        return self.terms[0].size

    @property
    def range(self) -> tuple[float, float]:
        """Bounds on the smallest and the largest eigenvalue."""
        smallest, largest = zip(*(term.range for term in self.terms), strict=True)
        return sum(smallest), sum(largest)

    def divided(self, number: Float[ArrayLike, ""]) -> "BlockSum":
        """The sum divided by a positive number."""
        return BlockSum([term.divided(number) for term in self.terms])

    def product(self, vectors: Float[AnyArray, "... p"]) -> Float[AnyArray, "... p"]:
        """Multiply weights by the sum."""
        return sum(term.product(vectors) for term in self.terms)


def plus(block: PlainBlock | BlockSum, other: PlainBlock | BlockSum) -> PlainBlock | BlockSum:
    """Add the blocks of one leaf.

    Raises
    ------
    ValueError
        If they are of two kinds, and too large to be summed as matrices.
    """
    match block, other:
        case DiagonalBlock(), DiagonalBlock():
            return DiagonalBlock(block.diagonal + other.diagonal)
        case FilterBlock(), FilterBlock() if block.values.shape == other.values.shape:
            matrices = _filters(block) + _filters(other)
            return _as_filters(matrices, block.values.dtype)
    if block.size <= MAX_EXACT:
        return _as_filters((_matrix(block) + _matrix(other))[None], _dtype(block))
    terms = [*_terms(block), *_terms(other)]
    shapes = {getattr(term, "row_values", np.empty(0)).shape for term in terms}
    if not all(isinstance(term, KroneckerBlock) for term in terms) or len(shapes) > 1:
        kinds = sorted({type(term).__name__ for term in terms})
        raise ValueError(
            "fit(prior=...) with hessian_structure='kron' must find blocks of one kind and shape for a weight in all "
            f"tasks; got {kinds}; fit every task with the same network and the same shared_weights"
        )
    return BlockSum(terms)


def _terms(block: PlainBlock | BlockSum) -> list[PlainBlock]:
    return block.terms if isinstance(block, BlockSum) else [block]


def _dtype(block: PlainBlock) -> np.dtype:
    return block[0].dtype


def _matrix(block: PlainBlock) -> Float[np.ndarray, "p p"]:
    """The block as a matrix, in float64 on the host."""
    exact = type(block)(*(np.asarray(leaf, np.float64) for leaf in block))
    return exact.product(np.eye(block.size))


def _filters(block: FilterBlock) -> Float[np.ndarray, "C K K"]:
    """The blocks of all filters as matrices, in float64 on the host."""
    values, vectors = (np.asarray(leaf, np.float64) for leaf in block)
    return (vectors * values[:, None]) @ vectors.swapaxes(-1, -2)


def _as_filters(matrices: Float[np.ndarray, "C K K"], dtype: np.dtype) -> FilterBlock:
    return FilterBlock(*(jnp.asarray(array, dtype) for array in decomposed(matrices)))


def _sides(block: KroneckerBlock) -> tuple[tuple[AnyArray, AnyArray], tuple[AnyArray, AnyArray]]:
    """Eigenvalues and eigenvectors of the rows, and of the columns."""
    rows, columns = block.row_values.reshape(-1), block.column_values.reshape(-1)
    return (rows, block.row_vectors), (columns, block.column_vectors)


def _from_eigenvectors(values: Float[AnyArray, " D"], vectors: Float[AnyArray, "D D"]) -> Float[AnyArray, "D D"]:
    return _product(vectors * values, vectors.T)


def _whitened_factors(
    rows: Float[AnyArray, "I I"], columns: Float[AnyArray, "O O"], step: Step
) -> tuple[Float[AnyArray, "I I"], Float[AnyArray, "O O"]]:
    """Partial traces of Q D^-1/2 Q' (A kron B) Q D^-1/2 Q', the second divided by the trace."""
    (_, row_vectors), (_, column_vectors) = _sides(step.block)
    rows = _product(_product(row_vectors.T, rows), row_vectors)
    columns = _product(_product(column_vectors.T, columns), column_vectors)
    roots = (step.values**-0.5).reshape(len(rows), -1)
    of_rows = rows * _product(roots * columns.diagonal(), roots.T)
    of_columns = columns * _product(roots.T * rows.diagonal(), roots)
    trace = of_rows.trace()
    # A trace of zero is that of a term that is zero.
    of_columns = of_columns / (trace + (trace == 0))
    back = (_product(_product(v, m), v.T) for v, m in ((row_vectors, of_rows), (column_vectors, of_columns)))
    return tuple(back)


def _product(left: Float[AnyArray, "I J"], right: Float[AnyArray, "J K"]) -> Float[AnyArray, "I K"]:
    """Multiply in full precision. NumPy arrays stay on the host and in float64."""
    return left @ right if isinstance(left, np.ndarray) else matmul(left, right)
