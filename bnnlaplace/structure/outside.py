"""The covariance of outputs in the directions that a Krylov basis does not know.

There the posterior has less variance than the prior, I / delta in these coordinates: the basis has not found all
curvature. How much less is estimated, for each input, by the samples of the structure, as a share c of the variance of
the prior.

At an input whose own curvature W is known, because the posterior was fitted to it, more is known. Let O = R R' / delta
be the covariance that the prior gives its outputs outside of the basis. If all other inputs leave c O of it, then its
own curvature leaves (O^-1 / c + W)^-1, as the Woodbury identity says: less along the outputs that W sees. c is chosen
such that the variances still have the sum that the samples estimate.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import eigh, einsum, matmul

# Halvings of the interval in which c is searched, which is [0, 1].
HALVINGS = 30


def estimated_share(
    known: Float[Array, "B K m"],
    prior_variance: Float[Array, " B"],
    values: Float[Array, " m"],
    weights: Float[Array, "m S"],
    sampled: Float[Array, " m"],
    delta: Float[Array, ""],
) -> Float[Array, " B"]:
    """Estimate, for each input, the share that posterior variance has of prior variance outside the basis.

    The squares of J (G + delta)^-1/2 z estimate the variance of the posterior, those of J z / sqrt(delta) that of the
    prior. The latter is known, so by their regression it serves as a control variate. Converged eigenpairs enter
    neither, as their share is known.

    Parameters
    ----------
    known
        J along the Ritz vectors, times (theta + delta)^-1/2.
    prior_variance
        The variance of the prior outside the basis, summed over the outputs.
    values, weights
        The Ritz values, and the components of the probes along the Ritz vectors.
    sampled
        1 for the pairs that the probes estimate, 0 for converged ones.
    delta
        The prior precision.
    """
    rest = known * sampled
    posterior = jnp.sum(matmul(rest, weights) ** 2, axis=1)
    to_prior = jnp.sqrt((values + delta) / delta)
    prior = jnp.sum(matmul(rest * to_prior, weights) ** 2, axis=1)
    exact_prior = prior_variance + jnp.sum((rest * to_prior) ** 2, axis=(1, 2))
    mean, prior_mean = jnp.mean(posterior, axis=1), jnp.mean(prior, axis=1)
    centred = prior - prior_mean[:, None]
    variance = jnp.sum(centred**2, axis=1)
    slope = jnp.sum(centred * posterior, axis=1) / jnp.where(variance > 0, variance, 1)
    estimate = mean - slope * (prior_mean - exact_prior) - jnp.sum(rest**2, axis=(1, 2))
    return jnp.clip(estimate / jnp.where(prior_variance > 0, prior_variance, 1), 0, 1)


def with_own_curvature(
    prior: Float[Array, "B K K"], factors: Float[Array, "B K R"], share: Float[Array, " B"]
) -> Float[Array, "B K K"]:
    """Compute (O^-1 / c + A A')^-1 for each input, with the c in [0, 1] at which its trace is `share` times that of O.

    If that is more than c = 1 leaves, c is 1.

    Parameters
    ----------
    prior
        O, positive semidefinite.
    factors
        A, with the own curvature W = A A' of each input.
    share
        The estimated share of the trace.
    """
    images = matmul(prior, factors)
    values, vectors = eigh(matmul(jnp.swapaxes(factors, -1, -2), images))
    values, images = jnp.maximum(values, 0), matmul(images, vectors)
    traces, lost = jnp.trace(prior, axis1=1, axis2=2), jnp.sum(images**2, axis=1)

    def removed(scale: Float[Array, " B"]) -> Float[Array, "B R"]:
        # c O - N diag(c^2 / (1 + c mu)) N', with the eigenvalues mu of A' O A.
        return scale[:, None] ** 2 / (1 + scale[:, None] * values)

    def halved(bounds: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], None]:
        low, high = bounds
        middle = (low + high) / 2
        is_large = middle * traces - jnp.sum(removed(middle) * lost, axis=1) > share * traces
        return (jnp.where(is_large, low, middle), jnp.where(is_large, middle, high)), None

    bounds = jnp.zeros_like(share), jnp.ones_like(share)
    (_, scale), _ = jax.lax.scan(halved, bounds, length=HALVINGS)
    return scale[:, None, None] * prior - einsum("bkr,br,blr->bkl", images, removed(scale), images)
