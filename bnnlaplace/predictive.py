"""Predictions of the linearised network f(x; theta*) + J(x) (theta - theta*) under the posterior."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.curvature import dense, microbatch as mb
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.tree import unraveler


@partial(jax.jit, static_argnames="microbatch")
def outputs(network: Network, inputs: Float[Array, "B ..."], *, microbatch: int = 64) -> Float[Array, "B C"]:
    """f(x; theta*), one microbatch at a time."""
    batches = mb.split(inputs, microbatch, jnp.float32)
    return _join(jax.lax.map(lambda x: network(network.params, x), batches.inputs), len(inputs))


def pushforward(
    network: Network,
    inputs: Float[Array, "B ..."],
    directions: Float[Array, "R P"],
    *,
    microbatch: int = 64,
    vectors_at_once: int = 16,
) -> Float[Array, "R B C"]:
    """J(x) v for every input and every row v of `directions`, by forward mode.

    Each microbatch is linearised once for `vectors_at_once` rows, whose number alone is compiled in: any number of rows
    shares one program. Memory: `vectors_at_once` times the activations of a microbatch, and the result.
    """
    images = []
    for start in range(0, len(directions), vectors_at_once):
        rows = directions[start : start + vectors_at_once]
        padded = jnp.pad(rows, ((0, vectors_at_once - len(rows)), (0, 0)))
        images.append(_pushforward_block(network, inputs, padded, microbatch=microbatch)[: len(rows)])
    return jnp.concatenate(images)


@partial(jax.jit, static_argnames="microbatch")
def _pushforward_block(
    network: Network, inputs: Float[Array, "B ..."], directions: Float[Array, "R P"], *, microbatch: int
) -> Float[Array, "R B C"]:
    unravel = unraveler(network.params)
    batches = mb.split(inputs, microbatch, directions.dtype)

    def images(x: Array) -> Float[Array, "m R C"]:
        _, jvp = jax.linearize(lambda p: network(p, x), network.params)
        return jnp.swapaxes(jax.vmap(lambda v: jvp(unravel(v)))(directions), 0, 1)

    return jnp.swapaxes(_join(jax.lax.map(images, batches.inputs), len(inputs)), 0, 1)


@partial(jax.jit, static_argnames="microbatch")
def structured_variance(
    network: Network, inputs: Float[Array, "B ..."], structure, prior_precision: float, *, microbatch: int = 16
) -> Float[Array, "B C C"]:
    """J Sigma J' from `structure.functional_variance`, with the Jacobians of one microbatch in memory at a time."""
    batches = mb.split(inputs, microbatch, jnp.float32)

    def variance(x: Array) -> Float[Array, "m C C"]:
        return structure.functional_variance(dense.jacobian(network, network.params, x), prior_precision)

    return _join(jax.lax.map(variance, batches.inputs), len(inputs))


def sample_variance(deviations: Float[Array, "S B C"]) -> Float[Array, "B C C"]:
    """Functional variance from samples whose mean is known to be zero; relative standard error sqrt(2 / S)."""
    return jnp.einsum("sbc,sbd->bcd", deviations, deviations) / len(deviations)


def monte_carlo(
    likelihood: Likelihood, mean: Float[Array, "B C"], deviations: Float[Array, "S B C"]
) -> Float[Array, "B C"]:
    """The mean over samples of E[y | f + J (theta - theta*)]: probabilities are averaged, not their logarithms."""
    return jnp.mean(likelihood.mean(mean + deviations), axis=0)


def probit(likelihood: Likelihood, mean: Float[Array, "B C"], variance: Float[Array, "B C"]) -> Float[Array, "B C"]:
    """E[y | f / sqrt(1 + pi/8 var f)]: MacKay's approximation with the marginal variance of each output.

    Source: MacKay 1992 for the binary case; per logit for several classes, as Lu, Ie and Sha (2021) and laplace-torch.
    """
    return likelihood.mean(mean / jnp.sqrt(1 + jnp.pi / 8 * variance))


def _join(batches: Float[Array, "num size ..."], count: int) -> Float[Array, "count ..."]:
    return batches.reshape(-1, *batches.shape[2:])[:count]
