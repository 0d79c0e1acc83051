"""Predictions of the linearised network f(x; theta*) + J(x) (theta - theta*) under the posterior."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.curvature import dense
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.tree import unraveler


class FunctionalPosterior(NamedTuple):
    """The posterior of the linearised outputs at a batch of inputs.

    Attributes
    ----------
    mean
        f(x; theta*), (B, C).
    variance
        J Sigma J', (B, C, C); from the samples where they are the only way.
    deviations
        Samples of J (theta - theta*), (S, B, C).
    """

    mean: Float[Array, "B C"]
    variance: Float[Array, "B C C"]
    deviations: Float[Array, "S B C"]


def outputs(network: Network, inputs: Float[Array, "B ..."], *, microbatch: int = 64) -> Float[Array, "B C"]:
    """f(x; theta*), one microbatch at a time."""
    return _by_microbatch(partial(_outputs, network), inputs, microbatch)


def pushforward(
    network: Network,
    inputs: Float[Array, "B ..."],
    directions: Float[Array, "R P"],
    *,
    microbatch: int = 64,
    vectors_at_once: int = 8,
) -> Float[Array, "R B C"]:
    """J(x) v for every input and every row v of `directions`, by forward mode.

    Memory: `vectors_at_once` times the activations of a microbatch, and the result. Any number of inputs and rows
    shares one program.
    """
    images = []
    for start in range(0, len(directions), vectors_at_once):
        rows = directions[start : start + vectors_at_once]
        padded = jnp.pad(rows, ((0, vectors_at_once - len(rows)), (0, 0)))
        found = _by_microbatch(partial(_pushforward, network, padded), inputs, microbatch)
        images.append(jnp.swapaxes(found, 0, 1)[: len(rows)])
    return jnp.concatenate(images)


def structured_variance(
    network: Network,
    inputs: Float[Array, "B ..."],
    structure,
    precisions: Float[Array, " D"],
    *,
    microbatch: int = 16,
) -> Float[Array, "D B C C"]:
    """J Sigma J' at every prior precision, from `structure.functional_variance`.

    One Jacobian per input serves all precisions; those of one microbatch are in memory at a time.
    """
    found = _by_microbatch(
        partial(_structured_variance, network, structure, jnp.asarray(precisions)), inputs, microbatch
    )
    return jnp.swapaxes(found, 0, 1)


def marginal_samples(key: Array, variance: Float[Array, "B C C"], num_samples: int) -> Float[Array, "S B C"]:
    """Draws from N(0, variance) at each input; independent between inputs, which averages over samples do not see."""
    values, vectors = jnp.linalg.eigh(variance)
    root = vectors * jnp.sqrt(jnp.maximum(values, 0))[:, None, :]
    noise = jax.random.normal(key, (num_samples, *variance.shape[:2]), variance.dtype)
    return jnp.einsum("bcd,sbd->sbc", root, noise)


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


@jax.jit
def _outputs(network: Network, x: Float[Array, "m ..."]) -> Float[Array, "m C"]:
    return network(network.params, x)


@jax.jit
def _pushforward(network: Network, directions: Float[Array, "R P"], x: Float[Array, "m ..."]) -> Float[Array, "m R C"]:
    unravel = unraveler(network.params)
    _, jvp = jax.linearize(lambda p: network(p, x), network.params)
    return jnp.swapaxes(jax.vmap(lambda v: jvp(unravel(v)))(directions), 0, 1)


@jax.jit
def _structured_variance(
    network: Network, structure, precisions: Float[Array, " D"], x: Float[Array, "m ..."]
) -> Float[Array, "m D C C"]:
    jacobian = dense.jacobian(network, network.params, x)
    found = jax.lax.map(lambda precision: structure.functional_variance(jacobian, precision), precisions)
    return jnp.swapaxes(found, 0, 1)


def _by_microbatch(
    function: Callable[[Array], Array], inputs: Float[Array, "B ..."], microbatch: int
) -> Float[Array, "B ..."]:
    """Apply a compiled function to microbatches of one shape, the last one padded with copies of the last input.

    Called from Python rather than scanned, so that inputs of any number share one program.
    """
    count = len(inputs)
    microbatch = min(microbatch, count)
    found = []
    for start in range(0, count, microbatch):
        index = np.minimum(np.arange(start, start + microbatch), count - 1)
        found.append(function(inputs[index]))
    return jnp.concatenate(found)[:count]
