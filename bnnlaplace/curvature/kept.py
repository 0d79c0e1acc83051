"""The Jacobian of all training examples, kept in memory: a product with the GGN is then a product of matrices.

A convolution uses its weights at many positions, and a derivative along one direction computes all of them. A row of
the Jacobian is a sum over positions. So with rows in memory a product costs far less than one by derivatives, and rows
cost one backward pass for each output. They serve every later product at the same weights: those of a block recurrence,
of conjugate gradients, and of all iterations of a variational fit. They are kept only if they fit and pay; see
`curvature.keep`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Real

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.summation import accumulated
from bnnlaplace.core.types import Inputs
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature.rows import RowSizes, in_parts
from bnnlaplace.model.batched import outputs
from bnnlaplace.model.data import Batch
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import output_shape

# Vectors whose outputs go through the likelihood together.
VECTORS_AT_ONCE = 8
# XLA on CPUs would multiply one vector of at most this many bytes with the rows in a loop of its own, fifteen times as
# slowly as two vectors.
BYTES_OF_SHORT = 2**14


# The functions V -> V R' and Y -> Y R, for rows of V and of Y, with G = R' R.
GGNFactors = tuple[
    Callable[[Float[Array, "S P"]], Float[Array, "S R"]], Callable[[Float[Array, "S R"]], Float[Array, "S P"]]
]


class CurvatureAt(NamedTuple):
    """Where the curvature of the likelihood is evaluated for one batch, and how much each example counts.

    Attributes
    ----------
    points
        Where the curvature of the likelihood is evaluated: the outputs (B, ..., C), or points of its own.
    weights
        How many times each example counts, or each position of its outputs; zero for padding.
    """

    points: Float[Array, "B ..."]
    weights: Float[Array, "B ..."]

    @classmethod
    def of_batch(cls, network: Network, likelihood: Likelihood, batch: Batch, *, microbatch: int) -> "CurvatureAt":
        """At the points of the batch, or at its outputs if it has none."""
        points = outputs(network, batch.inputs, microbatch=microbatch) if batch.points is None else batch.points
        return cls(points, likelihood.weights_of(batch.targets, batch.weights))

    def by_roots(self, columns: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        """Multiply what belongs to each example by the root of its weight."""
        return mb.over_outputs(jnp.sqrt(self.weights), columns) * columns


class KeptRows(NamedTuple):
    """The rows of the Jacobian at all training examples.

    Attributes
    ----------
    batches
        The derivatives of all K outputs for each batch, in microbatches of m examples: (num, K, m, P). The last
        examples may be padding.
    shape
        The shape of the outputs of a batch, (B, ..., C).
    centre
        The weights at which the network is differentiated, as a vector.
    outputs
        The outputs of each batch there.
    factors
        Numbers that the columns are to be multiplied by, (P,); None for ones. They are not applied to the rows.
    """

    batches: tuple[Float[Array, "num K m P"], ...]
    shape: tuple[int, ...]
    centre: Float[Array, " P"]
    outputs: tuple[Float[Array, "B ... C"], ...]
    factors: Float[Array, " P"] | None = None

    def scaled(self, factors: Float[Array, " P"]) -> "KeptRows":
        """The rows of the same network as a function of weights that are multiplied by `factors` first."""
        return self._replace(factors=factors if self.factors is None else factors * self.factors)

    def linearised_outputs(self, params: Float[Array, " P"]) -> list[Float[Array, "B ... C"]]:
        """Compute f(x) + J (theta - centre) of each batch, for weights that are not multiplied by factors."""
        if self.factors is not None:
            raise ValueError("linearised outputs are those of the weights as they are; got rows with factors")
        moved = self.pushed((params - self.centre)[None])
        return [at + by[0] for at, by in zip(self.outputs, moved, strict=True)]

    @property
    def num_outputs(self) -> int:
        """How many outputs all examples have together."""
        return len(self.batches) * math.prod(self.shape)

    def kernel(self) -> Float[Array, "R R"]:
        """Compute J J' for all outputs: batch by batch, and example by example. Memory beside it: a few rows."""
        of_batches = []
        for rows in self.batches:
            parts = (self._times_factors(part.swapaxes(0, 1).reshape(-1, part.shape[-1])) for part in rows)
            images = [jnp.concatenate([each.reshape(len(each), -1) for each in self.pushed(part)], 1) for part in parts]
            of_batches.append(jnp.concatenate(images)[: math.prod(self.shape)])
        return jnp.concatenate(of_batches)

    def pushed(self, vectors: Float[Array, "S P"]) -> list[Float[Array, "S B ... C"]]:
        """Compute J v for rows v, at the examples of each batch."""
        vectors = self._times_factors(vectors)
        return [_pushed(rows, vectors, self.shape) for rows in self.batches]

    def pulled(self, cotangents: Sequence[Float[Array, "B ... C"]]) -> Float[Array, " P"]:
        """Compute the sum of J' u over all examples."""
        pairs = zip(self.batches, cotangents, strict=True)
        return self._times_factors(accumulated(_pulled(rows, u[None])[0] for rows, u in pairs))

    def ggn_product(
        self, likelihood: Likelihood, at: Sequence[CurvatureAt], scale: Real[ArrayLike, ""]
    ) -> Callable[[Float[Array, "S P"]], Float[Array, "S P"]]:
        """Return the function V -> V G of S rows at once, as `streamed.primal_product` does.

        Parameters
        ----------
        likelihood
            The likelihood with its curvature.
        at
            Where that is evaluated, for each batch.
        scale
            (all training examples) / (examples in the data).
        """

        def product(vectors: Float[Array, "S P"]) -> Float[Array, "S P"]:
            vectors, pairs = self._times_factors(vectors), zip(self.batches, at, strict=True)
            terms = (_product(likelihood, rows, of_batch, vectors, self.shape) for rows, of_batch in pairs)
            return self._times_factors(scale * accumulated(terms))

        return product

    def ggn_factors(self, likelihood: Likelihood, at: Sequence[CurvatureAt], scale: Real[ArrayLike, ""]) -> GGNFactors:
        """Return the products with R and R' of G = R' R, where the rows of R are those of sqrt(scale) B' J.

        Together they cost what `ggn_product` does.
        """
        root = jnp.sqrt(jnp.asarray(scale, self.centre.dtype))

        def images(vectors: Float[Array, "S P"]) -> Float[Array, "S R"]:
            vectors, pairs = root * self._times_factors(vectors), zip(self.batches, at, strict=True)
            parts = [_images(likelihood, rows, of_batch, vectors, self.shape) for rows, of_batch in pairs]
            return jnp.concatenate([part.reshape(len(vectors), -1) for part in parts], axis=1)

        def back(of_rows: Float[Array, "S R"]) -> Float[Array, "S P"]:
            parts = jnp.split(root * of_rows, len(self.batches), axis=1)  # all batches have one shape
            triples = zip(self.batches, at, parts, strict=True)
            terms = (_back(likelihood, rows, of_batch, part, self.shape) for rows, of_batch, part in triples)
            return self._times_factors(accumulated(terms))

        return images, back

    def ggn_factor(self, likelihood: Likelihood, at: Sequence[CurvatureAt]) -> Float[Array, "R P"]:
        """Compute R with R' R = G, one row for each example and column of the factor B, as `dense.factor_rows` does."""
        pairs = zip(self.batches, at, strict=True)
        parts = [_factor(likelihood, rows, of_batch, self.shape) for rows, of_batch in pairs]
        return self._times_factors(jnp.concatenate(parts))

    def ggn_diagonal(self, likelihood: Likelihood, at: Sequence[CurvatureAt]) -> Float[Array, " P"]:
        """Compute the diagonal of G, as `diagonal.ggn_diagonal` does, summed over the batches."""
        pairs = zip(self.batches, at, strict=True)
        total = accumulated(_diagonal(likelihood, rows, of_batch, self.shape) for rows, of_batch in pairs)
        return self._times_factors(self._times_factors(total))

    def _times_factors(self, vectors: Float[Array, "... P"]) -> Float[Array, "... P"]:
        return vectors if self.factors is None else vectors * self.factors


@partial(jax.jit, static_argnums=2)
def _pushed(
    rows: Float[Array, "num K m P"], vectors: Float[Array, "S P"], shape: tuple[int, ...]
) -> Float[Array, "S B ... C"]:
    num, num_outputs, count, _ = rows.shape
    flat = einsum("rp,sp->rs", rows.reshape(-1, rows.shape[-1]), vectors)
    by_example = flat.reshape(num, num_outputs, count, -1).transpose(3, 0, 2, 1)
    return by_example.reshape(len(vectors), num * count, *shape[1:])[:, : shape[0]]


@jax.jit
def _pulled(rows: Float[Array, "num K m P"], cotangents: Float[Array, "S B ... C"]) -> Float[Array, "S P"]:
    num, num_outputs, count, _ = rows.shape
    flat = cotangents.reshape(*cotangents.shape[:2], num_outputs)
    padded = jnp.pad(flat, [(0, 0), (0, num * count - flat.shape[1]), (0, 0)])
    by_row = padded.reshape(-1, num, count, num_outputs).transpose(0, 1, 3, 2).reshape(len(cotangents), -1)
    if len(by_row) == 1 and by_row.nbytes <= BYTES_OF_SHORT:
        by_row = jnp.concatenate([by_row, by_row])
    return einsum("sr,rp->sp", by_row, rows.reshape(-1, rows.shape[-1]))[: len(cotangents)]


@partial(jax.jit, static_argnums=4)
def _product(
    likelihood: Likelihood,
    rows: Float[Array, "num K m P"],
    at: CurvatureAt,
    vectors: Float[Array, "S P"],
    shape: tuple[int, ...],
) -> Float[Array, "S P"]:
    """Sum J_n' w_n Lambda_n J_n v over the examples of a batch, for rows v."""

    def curved(tangent: Float[Array, "B ... C"]) -> Float[Array, "B ... C"]:
        return mb.over_outputs(at.weights, tangent) * likelihood.hessian_mv(at.points, tangent)

    return _pulled(rows, _few_at_once(curved, _pushed(rows, vectors, shape)))


def _few_at_once(of_one: Callable[[Array], Array], vectors: Float[Array, "S ..."]) -> Float[Array, "S ..."]:
    return jax.lax.map(of_one, vectors, batch_size=min(VECTORS_AT_ONCE, len(vectors)))


@partial(jax.jit, static_argnums=4)
def _images(
    likelihood: Likelihood,
    rows: Float[Array, "num K m P"],
    at: CurvatureAt,
    vectors: Float[Array, "S P"],
    shape: tuple[int, ...],
) -> Float[Array, "S B ..."]:
    """sqrt(w_n) B_n' J_n v at the examples of a batch, for rows v."""

    def of_one(tangent: Float[Array, "B ... C"]) -> Float[Array, "B ..."]:
        return at.by_roots(likelihood.factor_transpose_mv(at.points, tangent))

    return _few_at_once(of_one, _pushed(rows, vectors, shape))


@partial(jax.jit, static_argnums=4)
def _back(
    likelihood: Likelihood,
    rows: Float[Array, "num K m P"],
    at: CurvatureAt,
    images: Float[Array, "S R"],
    shape: tuple[int, ...],
) -> Float[Array, "S P"]:
    """Sum sqrt(w_n) J_n' B_n y_n over the examples of a batch, for rows y of what `_images` returns."""

    def of_one(columns: Float[Array, "B ..."]) -> Float[Array, "B ... C"]:
        return likelihood.factor_mv(at.points, at.by_roots(columns))

    by_example = images.reshape(len(images), *shape[:-1], -1)
    return _pulled(rows, _few_at_once(of_one, by_example))


@partial(jax.jit, static_argnums=3)
def _factor(
    likelihood: Likelihood, rows: Float[Array, "num K m P"], at: CurvatureAt, shape: tuple[int, ...]
) -> Float[Array, "R P"]:
    """The columns of B' J of each example of a batch, times the root of its weight."""
    num, _, count, num_weights = rows.shape
    by_example = rows.swapaxes(1, 2).reshape(num * count, *shape[1:], num_weights)[: shape[0]]
    factors = jax.vmap(partial(likelihood.factor_transpose_mv, at.points), -1, -1)(by_example)
    return (at.by_roots(factors)).reshape(-1, num_weights)


@partial(jax.jit, static_argnums=3)
def _diagonal(
    likelihood: Likelihood, rows: Float[Array, "num K m P"], at: CurvatureAt, shape: tuple[int, ...]
) -> Float[Array, " P"]:
    """Sum the squares of B' J over the examples of a batch and the columns of the factor B, a microbatch at a time."""
    num, _, count, _ = rows.shape
    # Padding repeats an example, as zeros may not be a point of the likelihood, and has weight zero.
    index = jnp.minimum(jnp.arange(num * count), shape[0] - 1)
    weights = at.weights[index].at[shape[0] :].set(0)
    parts = jnp.arange(num), *(each.reshape(num, count, *each.shape[1:]) for each in (index, weights))

    def of_part(part: tuple[Array, Array, Array]) -> Float[Array, " P"]:
        number, index, weights = part
        of_rows = jax.lax.dynamic_index_in_dim(rows, number, keepdims=False)  # as a part they would be copied
        return _squares(likelihood, of_rows, CurvatureAt(at.points[index], weights), shape[1:])

    return mb.summed(of_part, parts)


def diagonal_by_rows(
    network: Network, likelihood: Likelihood, inputs: Inputs, at: CurvatureAt, sizes: RowSizes
) -> Float[Array, " P"]:
    """Compute the diagonal of G for one batch as `diagonal.ggn_diagonal` does, from rows that are not kept.

    It takes as many backward passes, and shares the program that takes long to compile with predictions.
    """
    shape = output_shape(network, inputs)[1:]

    def terms() -> Iterator[Float[Array, " P"]]:
        for index, rows in in_parts(network, inputs, sizes):
            # The last part repeats the last example, which counts once.
            weights = at.weights[index].at[len(at.weights) - index[0] :].set(0)
            of_part = CurvatureAt(at.points[index], weights)
            yield _squares(likelihood, rows.reshape(-1, *rows.shape[2:]), of_part, shape)

    return accumulated(terms())


@partial(jax.jit, static_argnums=3)
def _squares(
    likelihood: Likelihood, rows: Float[Array, "K m P"], at: CurvatureAt, shape: tuple[int, ...]
) -> Float[Array, " P"]:
    """Sum the squares of B' J over a few examples and the columns of the factor B."""
    derivatives = rows.swapaxes(0, 1).reshape(rows.shape[1], *shape, rows.shape[-1])
    factors = jax.vmap(partial(likelihood.factor_transpose_mv, at.points), -1, -1)(derivatives)
    weighted = mb.over_outputs(at.weights, factors) * factors**2
    return weighted.sum(axis=tuple(range(weighted.ndim - 1)))
