"""Averages over the outputs of one batch: of the log likelihood, of its gradient, and of its curvature."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.curvature.microbatch import over_outputs
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.likelihoods import sites
from bnnlaplace.variational.draws import Draws


class Expectations(NamedTuple):
    """Averages over the samples of one batch. Examples count as their weights say.

    Attributes
    ----------
    log_likelihood
        E log p(y | f), of each example (B,), in float64 on the host.
    squared_error
        The squared standard error of the sum over examples, as if all pairs of samples were independent: quasi-random
        ones are better.
    residuals
        r = E d log p(y | f) / d f, times the weights of the examples, (B, ..., C).
    """

    log_likelihood: Float[np.ndarray, " B"]
    squared_error: float
    residuals: Float[Array, "B ... C"]


def expectations(likelihood: Likelihood, draws: Draws) -> Expectations:
    """Average the log likelihood and its gradient. Memory: the samples a few times."""
    log_probs, residuals = _log_probs_and_residuals(likelihood, draws)
    log_probs = np.asarray(log_probs, np.float64)
    pairs = 0.5 * (log_probs[: len(log_probs) // 2] + log_probs[len(log_probs) // 2 :])
    spread = pairs.var(axis=0, ddof=1).sum() / len(pairs) if len(pairs) > 1 else np.nan
    return Expectations(pairs.mean(axis=0), float(spread), residuals)


@jax.jit
def _log_probs_and_residuals(
    likelihood: Likelihood, draws: Draws
) -> tuple[Float[Array, "S B"], Float[Array, "B ... C"]]:
    samples = draws.samples()

    def total(shift: Float[Array, "B ... C"]) -> tuple[Array, Array]:
        log_probs = _log_probs(likelihood, samples + shift, draws)
        return log_probs.sum() / len(samples), log_probs

    residuals, log_probs = jax.grad(total, has_aux=True)(jnp.zeros_like(draws.mean))
    return log_probs, residuals


def _log_probs(likelihood: Likelihood, samples: Float[Array, "S B ... C"], draws: Draws) -> Float[Array, "S B"]:
    """log p(y | f) of each sample and example, summed over positions, times the weight of the example."""
    by_sample = jax.vmap(lambda outputs: likelihood.log_prob(outputs, draws.targets))(samples)
    weighted = over_outputs(draws.weights, by_sample[0]) * by_sample
    # Padding has weight zero, and a log likelihood that may be infinite.
    weighted = jnp.where(over_outputs(draws.weights, by_sample[0]) > 0, weighted, 0)
    return weighted.reshape(*weighted.shape[:2], -1).sum(axis=-1)


def log_likelihood_at(likelihood: Likelihood, draws: Draws, direction: Float[Array, "B ... C"], length: float) -> float:
    """Sum E log p(y | f) over the examples after a step of all samples along `direction`, in float64."""
    moved = draws._replace(mean=draws.mean + length * direction)
    return float(np.asarray(_mean_log_probs(likelihood, moved), np.float64).sum())


@jax.jit
def _mean_log_probs(likelihood: Likelihood, draws: Draws) -> Float[Array, " B"]:
    return _log_probs(likelihood, draws.samples(), draws).mean(axis=0)


@jax.jit
def log_mean_probs(likelihood: Likelihood, draws: Draws) -> Float[Array, " B"]:
    """log E p(y | f) of each example, over all of its positions; each position has an average of its own."""
    samples = draws.samples()
    by_sample = jax.vmap(lambda outputs: likelihood.log_prob(outputs, draws.targets))(samples)
    by_position = jax.nn.logsumexp(by_sample, axis=0) - jnp.log(len(samples))
    counted = over_outputs(draws.weights, by_position)
    return jnp.where(counted > 0, counted * by_position, 0).reshape(len(by_position), -1).sum(axis=-1)


def site_curvature(likelihood: Likelihood, draws: Draws) -> Float[np.ndarray, "B ... C C"]:
    """W = E Lambda(f) of each example and position, as matrices on the host."""
    return np.asarray(_dense(likelihood, draws))


@jax.jit
def _dense(likelihood: Likelihood, draws: Draws) -> Float[Array, "B ... C C"]:
    return sites.dense(likelihood, draws.samples())
