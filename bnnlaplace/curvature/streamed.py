"""The GGN of data that do not fit in memory: products that read all batches in each call, on either side.

They are for Krylov methods that are called from Python, such as `krylov.block_lanczos` or `scipy.sparse.linalg.eigsh`.
Batches are read on the host, so these products cannot be traced. `ggn.ggn_operator` and `ggn.dual_operator` can.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Real

from bnnlaplace.core import checks
from bnnlaplace.core.tree import as_vector, number_type, ravel, size, unraveler
from bnnlaplace.core.types import LinearOperator
from bnnlaplace.curvature import ggn
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.model.data import Batch, Data, accumulate, as_data, check_fits_model
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import output_shape

VECTORS_AT_ONCE = 8


def operator(
    network: Network,
    likelihood: Likelihood,
    data: Any,
    *,
    side: Literal["auto", "primal", "dual"] = "auto",
    prior_precision: PyTree[Real[ArrayLike, "..."]] = 1.0,
    scale: Real[ArrayLike, ""] = 1.0,
    microbatch: int = 64,
) -> LinearOperator:
    """Return P0^-1/2 G P0^-1/2 or its dual, scale * B' J P0^-1 J' B, as an operator that reads the data in each call.

    Both have the same nonzero spectrum, and so the same log det(I + .).

    Parameters
    ----------
    network, likelihood
        The network with its Jacobian J, and the likelihood with its curvature Lambda = B B'.
    data
        Arrays (x, y) or (x, y, w), or batches of such, as for `Laplace.fit`. Batches must be readable several times,
        and the same each time: without augmentation.
    side
        "primal" acts on P numbers. "dual" acts on the outputs of all examples in their order, so that every pass must
        have the same order: no shuffling. "auto" is the shorter one.
    prior_precision
        The diagonal of P0: one number, one for each weight, or a pytree like the weights. With 1 the primal is G.
    scale
        (all training examples) / (examples in `data`).
    microbatch
        How many examples are linearised at a time. It bounds the memory.

    Returns
    -------
    LinearOperator
        Its `matvec` takes one vector (V,) or rows (S, V). A batch is read and linearised once for all rows. Cost: a
        pass over the data for the primal, two for the dual. Memory: a batch, the residuals of a microbatch, and S
        vectors.

    Raises
    ------
    ValueError
        If `side` is unknown, a precision or the scale is not positive, or the data are empty, do not fit the network,
        or can be read only once. `matvec` of the dual side raises it if batches come in another order than before.

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
    >>> krylov.trace_forms(krylov.ritz(decomposition), np.log1p).shape  # log det(I + .) as each probe estimates it
    (4,)
    """
    checks.choice(side, "operator(side=...)", ("auto", "primal", "dual"))
    batches = as_data(data)
    batches.check_repeatable("operator(data=...) must be readable several times")
    delta = as_vector(prior_precision, network.params)
    checks.all_positive(delta, "operator(prior_precision=...)")
    checks.positive(scale, "operator(scale=...)")
    batches = batches.checked(partial(check_fits_model, network, likelihood))
    for _ in batches:  # the first pass counts the examples, and checks them
        pass
    num_outputs = math.prod(output_shape(network, batches.first)[1:]) * batches.num_examples
    options = {"prior_precision": delta, "scale": scale, "microbatch": microbatch}
    if side == "dual" or (side == "auto" and num_outputs < size(network.params)):
        return LinearOperator(_dual(network, likelihood, batches.in_order(), **options), num_outputs)
    root = jax.lax.rsqrt(delta)
    product = primal_product(network, likelihood, batches, scale, microbatch=microbatch)

    def matvec(vectors: Float[ArrayLike, "*S P"]) -> Float[Array, "*S P"]:
        rows = _as_rows(vectors, root.size, root.dtype)
        return (root * product(root * rows)).reshape(vectors.shape)

    return LinearOperator(matvec, size(network.params))


def primal_product(
    network: Network, likelihood: Likelihood, data: Data, scale: Real[ArrayLike, ""], *, microbatch: int
) -> Callable[[Float[Array, "S P"]], Float[Array, "S P"]]:
    """Return the function V -> V G of S rows at once. Each call is a pass over the data.

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
    scale: Real[ArrayLike, ""],
    microbatch: int,
) -> Callable[[Float[ArrayLike, "*S V"]], Float[Array, "*S V"]]:
    """Return the product of the dual side. It reads the data twice: for J' B v, and for B' J of that."""
    model, options = (network, likelihood), {"microbatch": microbatch}
    shape = output_shape(network, data.first)[1:]
    width = math.prod(shape)

    def matvec(vectors: Float[ArrayLike, "*S V"]) -> Float[Array, "*S V"]:
        rows = _as_rows(vectors, data.num_examples * width, prior_precision.dtype)
        by_example = rows.reshape(len(rows), -1, *shape)
        start = 0

        def pulled(batch: Batch) -> Float[Array, "S P"]:
            nonlocal start
            count, unpadded = _count(batch), [(0, 0)] * len(shape)
            batch_rows = by_example[:, start : start + count]
            batch_rows = jnp.pad(batch_rows, [(0, 0), (0, len(batch.weights) - count), *unpadded])
            start += count
            return _pull(*model, batch, batch_rows, **options)

        weighted = scale * accumulate(data, pulled)[0] / prior_precision
        pushed = [_push(*model, batch, weighted, **options)[:, : _count(batch)] for batch in data]
        return jnp.concatenate(pushed, axis=1).reshape(len(rows), -1, width).reshape(vectors.shape)

    return matvec


def _as_rows(vectors: Any, size: int, dtype: Any) -> Float[Array, "S V"]:
    """Turn one vector of `size` numbers into a row; rows of them stay as they are."""
    if np.ndim(vectors) not in (1, 2) or np.shape(vectors)[-1] != size:
        raise ValueError(f"matvec takes a vector of {size} numbers, or rows of them; got shape {np.shape(vectors)}")
    return jnp.atleast_2d(jnp.asarray(vectors, dtype))


def _count(batch: Batch) -> int:
    """Number of examples without the padding, which comes last."""
    return int(np.count_nonzero(batch.weights))  # a sum of ones in float32 ends at 2^24


@partial(jax.jit, static_argnames="microbatch")
def batch_product(
    network: Network,
    likelihood: Likelihood,
    batch: Batch,
    scale: Real[ArrayLike, ""],
    vectors: Float[Array, "S P"],
    *,
    microbatch: int,
) -> Float[Array, "S P"]:
    """Multiply rows by the G of one batch: V G. It is compiled once for each shape; see `ggn.block_product`.

    Parameters
    ----------
    network, likelihood, scale, microbatch
        As for `operator`.
    batch
        One batch of the data.
    vectors
        S rows of P numbers.
    """
    weights = likelihood.weights_of(batch.targets, batch.weights)
    options = {"weights": weights, "points": batch.points, "scale": scale, "microbatch": microbatch}
    return ggn.block_product(network, likelihood, network.params, batch.inputs, **options)(vectors)


@partial(jax.jit, static_argnames="microbatch")
def _pull(
    network: Network, likelihood: Likelihood, batch: Batch, rows: Float[Array, "S B ... C"], *, microbatch: int
) -> Float[Array, "S P"]:
    """Map rows u to J' B u, summed over the batch with the roots of the weights."""
    params, weights = network.params, likelihood.weights_of(batch.targets, batch.weights)
    split = mb.split((batch.inputs, jnp.swapaxes(rows, 0, 1)), microbatch, number_type(params), weights)

    def pulled(part: mb.Microbatches) -> Float[Array, "S P"]:
        inputs, columns = part.inputs
        outputs, pullback = jax.vjp(lambda p: network(p, inputs), params)
        root_weights = jnp.sqrt(mb.over_outputs(part.weights, outputs))

        def pulled_row(row: Float[Array, "m ... C"]) -> Float[Array, " P"]:
            return ravel(pullback(root_weights * likelihood.factor_mv(outputs, row))[0])

        return jax.lax.map(pulled_row, jnp.swapaxes(columns, 0, 1), batch_size=min(VECTORS_AT_ONCE, len(rows)))

    return mb.summed(pulled, split)


@partial(jax.jit, static_argnames="microbatch")
def _push(
    network: Network, likelihood: Likelihood, batch: Batch, vectors: Float[Array, "S P"], *, microbatch: int
) -> Float[Array, "S B ... C"]:
    """Map rows v to B' J v at each example of the batch, times the root of its weight."""
    params, weights = network.params, likelihood.weights_of(batch.targets, batch.weights)
    unravel = unraveler(params)

    def pushed(part: mb.Microbatches) -> Float[Array, "S m ... C"]:
        outputs, pushforward = jax.linearize(lambda p: network(p, part.inputs), params)
        root_weights = jnp.sqrt(mb.over_outputs(part.weights, outputs))

        def pushed_row(row: Float[Array, " P"]) -> Float[Array, "m ... C"]:
            return root_weights * likelihood.factor_transpose_mv(outputs, pushforward(unravel(row)))

        return jax.lax.map(pushed_row, vectors, batch_size=min(VECTORS_AT_ONCE, len(vectors)))

    by_microbatch = jax.lax.map(pushed, mb.split(batch.inputs, microbatch, number_type(params), weights))
    # (microbatches, S, m, ...) -> (S, examples, ...)
    by_row = jnp.moveaxis(by_microbatch, 0, 1)
    return by_row.reshape(by_row.shape[0], -1, *by_row.shape[3:])[:, : len(batch.weights)]
