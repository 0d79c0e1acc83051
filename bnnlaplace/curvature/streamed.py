"""The GGN of data that do not fit in memory: products that read the batches anew, for the primal and the dual side.

For Krylov methods that are called from Python, such as `krylov.block_lanczos` or `scipy.sparse.linalg.eigsh`. Batches
are read on the host, so that these products cannot be traced; `ggn.ggn_operator` and `ggn.dual_operator` can.
"""

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.tree import as_vector, number_type, ravel, size, unraveler
from bnnlaplace.core.types import LinearOperator
from bnnlaplace.curvature import ggn
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.model.data import Batch, Data, Inputs, accumulate, as_data, check_fits_model
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import output_shape

VECTORS_AT_ONCE = 8


def operator(
    network: Network,
    likelihood: Likelihood,
    data: tuple[Inputs, Array] | Iterable[tuple[Inputs, Array]],
    *,
    side: Literal["auto", "primal", "dual"] = "auto",
    prior_precision: Float[Array, ""] | Float[Array, " P"] = 1.0,
    scale: float = 1.0,
    microbatch: int = 64,
) -> LinearOperator:
    """P0^-1/2 G P0^-1/2 or its dual, scale * B' J P0^-1 J' B: the same nonzero spectrum, hence log det(I + .).

    Parameters
    ----------
    network, likelihood
        Where J and Lambda = B B' come from.
    data
        As for `Laplace.fit`: (x, y), or such batches that can be iterated over again, without augmentation.
    side
        "primal": on P numbers. "dual": on the outputs of all examples, in their order, so that every pass must have the
        same one: no shuffling. "auto": the shorter one.
    prior_precision
        The diagonal of P0: one number, one for each weight, or a pytree like the weights. With 1 the primal is G.
    scale
        (all training examples) / (examples in `data`).
    microbatch
        Examples linearised at a time; bounds memory.

    Returns
    -------
    LinearOperator
        Its `matvec` takes one vector (V,) or rows (S, V), for which a batch is read and linearised once. Cost: a pass
        over the data for the primal, two for the dual. Memory: a batch, the residuals of a microbatch, and S vectors.

    Raises
    ------
    ValueError
        If `side` is unknown, a precision or the scale is not positive, or data are empty, do not fit the network, or
        can be read once only. By `matvec` of the dual side, if batches come in another order than before.

    Examples
    --------
    >>> import bnnlaplace
    >>> from bnnlaplace import krylov
    >>> network = Network.from_function(lambda w, x: jnp.tanh(x @ w), jnp.ones((20, 3)))
    >>> batches = [(jnp.ones((5, 20)), jnp.arange(5) % 3), (jnp.zeros((2, 20)), jnp.zeros(2, int))]
    >>> dual = operator(network, bnnlaplace.categorical(), batches, prior_precision=0.1)
    >>> dual.size  # seven examples of three outputs, for sixty weights
    21
    >>> probes = krylov.normal_probes(jax.random.key(0), jnp.ones(dual.size), 4)
    >>> *_, decomposition = krylov.block_lanczos(dual.matvec, probes, max_vectors=12)
    >>> krylov.trace_forms(krylov.ritz(decomposition), jnp.log1p).shape  # log det(I + .) as each probe estimates it
    (4,)
    """
    if side not in ("auto", "primal", "dual"):
        raise ValueError(f"operator(side=...) must be 'auto', 'primal' or 'dual'; got {side!r}")
    found = as_data(data)
    found.check_repeatable("operator(data=...) must be readable several times")
    delta = as_vector(prior_precision, network.params)
    if not np.all(np.asarray(delta) > 0) or not scale > 0:
        raise ValueError(
            f"operator(prior_precision=..., scale=...) must be positive; got {prior_precision} and {scale}; try 1.0"
        )
    found = found.checked(partial(check_fits_model, network, likelihood))
    for _ in found:  # it counts, and checks
        pass
    outputs = math.prod(output_shape(network, found.first)[1:]) * found.num_examples
    options = {"prior_precision": delta, "scale": scale, "microbatch": microbatch}
    if side == "dual" or (side == "auto" and outputs < size(network.params)):
        return LinearOperator(_dual(network, likelihood, found.in_order(), **options), outputs)
    root = jax.lax.rsqrt(delta)
    product = primal_product(network, likelihood, found, scale, microbatch=microbatch)

    def matvec(vectors: Float[Array, "*S P"]) -> Float[Array, "*S P"]:
        rows = _as_rows(vectors, root.size, root.dtype)
        return (root * product(root * rows)).reshape(vectors.shape)

    return LinearOperator(matvec, size(network.params))


def primal_product(
    network: Network, likelihood: Likelihood, data: Data, scale: float, *, microbatch: int
) -> Callable[[Float[Array, "S P"]], Float[Array, "S P"]]:
    """V -> V G for S rows at once; each product is a pass over the data.

    Parameters
    ----------
    network, likelihood, data, scale, microbatch
        As for `operator`.
    """
    product = partial(batch_product, network, likelihood, microbatch=microbatch)
    return lambda vectors: accumulate(data, lambda batch: product(batch, scale, vectors))[0]


def _dual(
    network: Network,
    likelihood: Likelihood,
    data: Data,
    *,
    prior_precision: Float[Array, " P"],
    scale: float,
    microbatch: int,
) -> Callable[[Float[Array, "*S V"]], Float[Array, "*S V"]]:
    model, options = (network, likelihood), {"microbatch": microbatch}
    shape = output_shape(network, data.first)[1:]
    width = math.prod(shape)

    def matvec(vectors: Float[Array, "*S V"]) -> Float[Array, "*S V"]:
        rows = _as_rows(vectors, data.num_examples * width, prior_precision.dtype)
        parts = rows.reshape(len(rows), -1, *shape)
        start, pulled = 0, 0.0
        for batch in data:
            count, padding = _count(batch), [(0, 0)] * len(shape)
            part = jnp.pad(parts[:, start : start + count], [(0, 0), (0, len(batch.weights) - count), *padding])
            pulled, start = pulled + _pull(*model, batch, part, **options), start + count
        weighted = scale * pulled / prior_precision
        pushed = [_push(*model, batch, weighted, **options)[:, : _count(batch)] for batch in data]
        return jnp.concatenate(pushed, axis=1).reshape(len(rows), -1, width).reshape(vectors.shape)

    return matvec


def _as_rows(vectors: Float[Array, "*S V"], size: int, dtype: jnp.dtype) -> Float[Array, "S V"]:
    if np.ndim(vectors) not in (1, 2) or np.shape(vectors)[-1] != size:
        raise ValueError(f"matvec takes a vector of {size} numbers, or rows of them; got shape {np.shape(vectors)}")
    return jnp.atleast_2d(jnp.asarray(vectors, dtype))


def _count(batch: Batch) -> int:
    """Examples that are no padding; padding comes last."""
    return int(batch.weights.sum())


@partial(jax.jit, static_argnames="microbatch")
def batch_product(
    network: Network,
    likelihood: Likelihood,
    batch: Batch,
    scale: float,
    vectors: Float[Array, "S P"],
    *,
    microbatch: int,
) -> Float[Array, "S P"]:
    """V G for a block of rows and one batch, compiled once per shape; see `ggn.block_product`.

    Parameters
    ----------
    network, likelihood, scale, microbatch
        As for `operator`.
    batch
        One of the data.
    vectors
        Rows of P numbers.
    """
    options = {"weights": batch.weights, "scale": scale, "microbatch": microbatch}
    return ggn.block_product(network, likelihood, network.params, batch.inputs, **options)(vectors)


@partial(jax.jit, static_argnames="microbatch")
def _pull(
    network: Network, likelihood: Likelihood, batch: Batch, rows: Float[Array, "S B ... C"], *, microbatch: int
) -> Float[Array, "S P"]:
    """Rows u -> J' B u, summed over the batch."""
    params = network.params
    split = mb.split((batch.inputs, jnp.swapaxes(rows, 0, 1)), microbatch, number_type(params), batch.weights)

    def of_microbatch(part: mb.Microbatches) -> Float[Array, "S P"]:
        inputs, columns = part.inputs
        outputs, pullback = jax.vjp(lambda p: network(p, inputs), params)
        counted = jnp.sqrt(mb.over_outputs(part.weights, outputs))

        def one(column: Float[Array, "m ... C"]) -> Float[Array, " P"]:
            return ravel(pullback(counted * likelihood.factor_mv(outputs, column))[0])

        return jax.lax.map(one, jnp.swapaxes(columns, 0, 1), batch_size=min(VECTORS_AT_ONCE, len(rows)))

    return mb.summed(of_microbatch, split)


@partial(jax.jit, static_argnames="microbatch")
def _push(
    network: Network, likelihood: Likelihood, batch: Batch, vectors: Float[Array, "S P"], *, microbatch: int
) -> Float[Array, "S B ... C"]:
    """Rows v -> B' J v at each example of the batch."""
    params = network.params
    unravel = unraveler(params)

    def of_microbatch(part: mb.Microbatches) -> Float[Array, "S m ... C"]:
        outputs, pushforward = jax.linearize(lambda p: network(p, part.inputs), params)

        def one(vector: Float[Array, " P"]) -> Float[Array, "m ... C"]:
            return likelihood.factor_transpose_mv(outputs, pushforward(unravel(vector)))

        return jax.lax.map(one, vectors, batch_size=min(VECTORS_AT_ONCE, len(vectors)))

    found = jax.lax.map(of_microbatch, mb.split(batch.inputs, microbatch, number_type(params), batch.weights))
    # (microbatches, S, m, ...) -> (S, examples, ...)
    joined = jnp.moveaxis(found, 0, 1)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])[:, : len(batch.weights)]
