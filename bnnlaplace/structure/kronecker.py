"""A block-diagonal GGN with Kronecker-factored blocks; see `bnnlaplace.structure.blocks`."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int, Num

from bnnlaplace.core.rounding import OF_FLOAT32
from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature import kronecker
from bnnlaplace.curvature.jacobian import Factors, Jacobian, LeafJacobian, inner_products, picked
from bnnlaplace.structure.block_sum import (
    BlockSum,
    Root,
    coloured,
    effective_parameters,
    log_determinant,
    plus,
    root_of,
    whitened,
)
from bnnlaplace.structure.blocks import DiagonalBlock, FilterBlock, KroneckerBlock, error_of_values
from bnnlaplace.structure.protocol import OutputCovariance, PriorPrecision, PriorPrecisions, RelativePrecisions

Block = KroneckerBlock | FilterBlock | DiagonalBlock | BlockSum
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
    rounding
        Relative error of the derivatives.
    """

    blocks: list[Block]
    rounding: Num[AnyArray, ""] | np.float64 = np.float64(OF_FLOAT32)

    rows_for_column = 0.0

    @property
    def rows_for_output(self) -> float:
        """Derivatives in the weights of a sum, as they are and whitened, by the share of its weights."""
        in_sums = sum(block.size for block in self.blocks if isinstance(block, BlockSum))
        return 3.0 * in_sums / sum(block.size for block in self.blocks)

    @classmethod
    def fit(cls, sums: Sequence[kronecker.LeafSums], rounding: Num[ArrayLike, ""] = OF_FLOAT32) -> "KroneckerStructure":
        """Decompose the sums of `kronecker.factors`. Eigenvalues that rounding may have made of zero are zero.

        `rounding` is the relative error of the derivatives.
        """
        blocks = [_BY_SUMS[type(leaf)].fit(leaf, rounding) for leaf in sums]
        return cls(blocks, jnp.asarray(rounding, jax.tree.leaves(blocks)[0].dtype))

    def resolution(self) -> float:
        """The prior precision below which curvature of its size cannot be told from the rounding of the factors.

        Zero if no eigenvalue is that small.
        """
        error = error_of_values(jax.tree.leaves(self)[0].dtype, float(self.rounding))
        limits = [(error * largest, smallest) for smallest, largest in (block.range for block in self.blocks)]
        return max((limit for limit, smallest in limits if smallest <= limit), default=0.0)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Any]) -> "KroneckerStructure":
        """Rebuild the structure from its fields by name, as a checkpoint holds them."""
        # A checkpoint stores no classes. The names of the fields tell which kind of block they belong to.
        kinds = {frozenset(kind._fields): kind for kind in _BY_SUMS.values()}

        def block(fields: dict[str, Any]) -> Block:
            if "terms" in fields:
                return BlockSum([block(term) for term in fields["terms"]])
            return kinds[frozenset(fields)](**jax.tree.map(jnp.asarray, fields))

        return cls([block(fields) for fields in arrays["blocks"]], np.float64(arrays.get("rounding", OF_FLOAT32)))

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
        return self._replace(blocks=[block.divided(divisor) for block, divisor in pairs])

    def scaled(self, factor: float) -> "KroneckerStructure":
        """Return the structure of factor * G."""
        return self._replace(blocks=[block.divided(1 / factor) for block in self.blocks])

    def plus(self, other: "KroneckerStructure") -> "KroneckerStructure":
        """Return the structure of G + G_other, the sum of the blocks of each leaf.

        Raises
        ------
        ValueError
            If a leaf has blocks of two kinds, as with two values of `shared_weights`.
        """
        blocks = [plus(old, new) for old, new in zip(self.blocks, other.blocks, strict=True)]
        return KroneckerStructure(blocks, np.maximum(self.rounding, other.rounding))

    def product(self, vector: Float[AnyArray, " P"]) -> Float[AnyArray, " P"]:
        """G v. A NumPy array stays on the host and in float64."""
        structure, join = (
            (_on_host(self), np.concatenate) if isinstance(vector, np.ndarray) else (self, jnp.concatenate)
        )
        return join([block.product(leaf_values) for block, leaf_values in structure._parts(vector)])

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
            sums[leaf_values[0]] += _effective_parameters(block, float(prior_precision))
        return sums[None]

    def log_determinant(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """log det(I + G / delta), in float64."""
        # det of a block-diagonal matrix is the product over blocks, and over a_i b_j within a block.
        delta = float(prior_precision)
        return np.array([sum(_log_determinant(block, delta) for block in self.blocks)])

    def truncation(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """Zero, because nothing is truncated."""
        return np.zeros(1)

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision) -> float:
        """v' (G + delta I)^-1 v, in float64."""
        parts = _on_host(self)._parts(np.asarray(vector, np.float64))
        delta = float(prior_precision)
        return float(sum(np.sum(whitened(root_of(block, delta), leaf_values) ** 2) for block, leaf_values in parts))

    def inverse_product(
        self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision
    ) -> Float[np.ndarray, " P"]:
        """(G + delta I)^-1 v, in float64."""
        parts = _on_host(self)._parts(np.asarray(vector, np.float64))
        roots = ((root_of(block, float(prior_precision)), leaf_values) for block, leaf_values in parts)
        return np.concatenate([coloured(root, whitened(root, leaf_values)) for root, leaf_values in roots])

    def samples(self, key: Array, num_samples: int, prior_precision: PriorPrecision) -> Float[Array, "S P"]:
        """Draw rows Q diag((lambda + delta)^-1/2) eps, with the eigenvectors Q and eigenvalues lambda of each block."""
        dtype = jax.tree.leaves(self)[0].dtype
        noise = jax.random.normal(key, (num_samples, sum(block.size for block in self.blocks)), dtype)
        # The noise needs no rotation into the eigenvectors, as its distribution is the same in all orthonormal bases.
        return jnp.concatenate(
            [coloured(root_of(block, prior_precision), leaf_values) for block, leaf_values in self._parts(noise)],
            axis=-1,
        )

    def output_covariance(self, precisions: PriorPrecisions, relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """Return the function J -> J Q diag(1 / (lambda + delta)) Q' J' / d, summed over blocks, at each delta.

        d is the number that D holds for all weights of the block.
        """
        divisors = [relative] * len(self.blocks)
        if jnp.ndim(relative):  # `whitened` has checked that all weights of a block have the same one
            divisors = [leaf_values[0] for _, leaf_values in self._parts(jnp.asarray(relative))]
        precisions = jnp.asarray(precisions, jax.tree.leaves(self)[0].dtype)
        # The root of a sum needs decompositions, so it is computed here, once for each delta.
        sums = [block for block in self.blocks if isinstance(block, BlockSum)]
        roots = [[root_of(block, delta) for delta in precisions] for block in sums]
        roots = [jax.tree.map(lambda *steps: jnp.stack(steps), *by_delta) for by_delta in roots]
        return Partial(_covariances, self.blocks, precisions, divisors, roots)

    def _parts(self, vectors: Num[AnyArray, "... P"]) -> Iterator[tuple[Block, Num[AnyArray, "... p"]]]:
        """Yield each block with the numbers of its leaf, cut out of flat vectors."""
        start = 0
        for block in self.blocks:
            yield block, vectors[..., start : start + block.size]
            start += block.size


def _on_host(tree: Any) -> Any:
    """A structure or a block in float64 on the host, where that is available whatever the configuration of JAX."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def _log_determinant(block: Block, delta: float) -> float:
    """log det(I + K / delta) of a block K."""
    if isinstance(block, BlockSum):
        return log_determinant(root_of(_on_host(block), delta))
    return float(np.log1p(np.asarray(block.eigenvalues, np.float64) / delta).sum())


def _effective_parameters(block: Block, delta: float) -> float:
    """tr K (K + delta I)^-1 of a block K; of a large sum an estimate."""
    if isinstance(block, BlockSum):
        return effective_parameters(root_of(_on_host(block), delta), delta, block.size)
    values = np.asarray(block.eigenvalues, np.float64)
    return float((values / (values + delta)).sum())


def _covariances(
    blocks: list[Block],
    precisions: Float[Array, " D"],
    divisors: list[Float[ArrayLike, ""]],
    roots: list[Root],
    jacobian: Jacobian,
) -> Float[Array, "D M U C C"]:
    """Sum the covariances of outputs over blocks, at each delta. `roots` are those of the sums at all deltas."""
    # The rotation into eigenvectors is the expensive step. Unless the block is a sum it does not depend on delta, so it
    # stays outside the loop.
    rotated = [_in_eigenvectors(leaf, block) for leaf, block in zip(jacobian.leaves, blocks, strict=True)]

    def at(delta_and_roots: tuple[Float[Array, ""], list[Root]]) -> Float[Array, "M U C C"]:
        delta, roots = delta_and_roots[0], iter(delta_and_roots[1])
        total = 0.0
        for factors, block, divisor in zip(rotated, blocks, divisors, strict=True):
            if isinstance(block, BlockSum):
                covariance = inner_products(whitened(next(roots), factors.derivatives)) / divisor
            else:
                covariance = factors.weighted(_variances(factors, block, delta) / divisor)
            total = total + covariance
        return total

    return jax.lax.map(at, (precisions, roots))


def _in_eigenvectors(leaf: LeafJacobian, block: Block) -> Factors:
    """Rotate the derivatives with respect to one leaf into the eigenvectors of its block, unless that is a sum."""
    if isinstance(block, BlockSum):
        return Factors(None, leaf.rows())
    if isinstance(block, KroneckerBlock) and leaf.inputs is not None:
        # A row of J is a kron g, which the factors rotate to U' a kron V' g: the product is never formed.
        return leaf.rotated(block.row_vectors, block.column_vectors).factors()
    # Of a layer the block is a matrix, too, if it is the sum of those of several tasks.
    is_bias = leaf.places is not None and leaf.inputs is None
    if isinstance(block, FilterBlock) and is_bias and len(block.vectors) == 1:
        return Factors(None, picked(block.vectors[0], leaf.places, axis=0)[None])
    return Factors(None, block.rotated(leaf.rows()))


def _variances(factors: Factors, block: Block, delta: Float[Array, ""]) -> Float[Array, "..."]:
    """1 / (lambda + delta), in the shape that `factors.weighted` takes."""
    flat = 1 / (block.eigenvalues + delta)
    return flat if factors.inputs is None else flat.reshape(factors.inputs.shape[-1], -1)
