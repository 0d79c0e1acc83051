"""The exact diagonal of the GGN, without a Jacobian in memory."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.tree import ravel


def ggn_diagonal(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: Float[Array, "N ..."],
    *,
    scale: float = 1.0,
    microbatch: int = 32,
) -> Float[Array, " P"]:
    """diag(G) = scale * sum_n sum_c (J_n' B_n e_c)^2, exactly: one backward pass per example and output.

    Memory: `microbatch` gradients of P numbers each. Call it inside `jit`.

    Parameters
    ----------
    network, likelihood
        Where f and Lambda come from.
    params
        The weights at which the network is linearised.
    inputs
        All N examples.
    scale
        (all training examples) / N.
    microbatch
        Examples differentiated at a time; bounds memory.
    """
    batches = mb.split(inputs, microbatch, ravel(params).dtype)

    shape = jax.eval_shape(network, params, batches.inputs[0]).shape[1:]
    columns = jnp.eye(math.prod(shape), dtype=batches.weights.dtype).reshape(-1, *shape)

    def example(x: Array, weight: Array) -> Float[Array, " P"]:
        outputs, pullback = jax.vjp(lambda p: network(p, x[None])[0], params)

        def add_column(total: Array, column: Array) -> tuple[Array, None]:
            (gradient,) = pullback(likelihood.factor_mv(outputs, column))
            return total + ravel(gradient) ** 2, None

        return weight * jax.lax.scan(add_column, jnp.zeros_like(ravel(params)), columns)[0]

    def add(total: Array, batch: mb.Microbatches) -> tuple[Array, None]:
        return total + jnp.sum(jax.vmap(example)(*batch), axis=0), None

    return scale * jax.lax.scan(add, jnp.zeros_like(ravel(params)), batches)[0]
