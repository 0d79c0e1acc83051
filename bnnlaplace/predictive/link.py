"""E[y] where the outputs of a network are Gaussian: by samples, by the probit approximation, by the Laplace bridge."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.model.likelihood import Likelihood


def monte_carlo(
    likelihood: Likelihood, mean: Float[Array, "B ... C"], deviations: Float[Array, "S B ... C"]
) -> Float[Array, "B ... C"]:
    """The mean over samples of E[y | f + J (theta - theta*)]: probabilities are averaged, not their logarithms.

    Parameters
    ----------
    likelihood
        Where E[y | f] comes from.
    mean
        f(x; theta*).
    deviations
        S samples of J (theta - theta*).
    """
    return jnp.mean(likelihood.mean(mean + deviations), axis=0)


def probit(
    likelihood: Likelihood, mean: Float[Array, "B ... C"], variance: Float[Array, "B ... C"]
) -> Float[Array, "B ... C"]:
    """E[y | f / sqrt(1 + pi/8 var f)]: MacKay's approximation with the marginal variance of each output.

    Source: MacKay 1992 for the binary case; per logit for several classes, as Lu, Ie and Sha (2021) and laplace-torch.

    Parameters
    ----------
    likelihood
        Where E[y | f] comes from.
    mean, variance
        Of each output.
    """
    return likelihood.mean(mean / jnp.sqrt(1 + jnp.pi / 8 * variance))


def bridge(mean: Float[Array, "B ... C"], covariance: Float[Array, "B ... C C"]) -> Float[Array, "B ... C"]:
    """The mean of the Dirichlet distribution that matches Gaussian logits at their mode: the Laplace bridge.

    Softmax sees logits up to a shift of all of them, so m and V are the mean and the covariance of (I - 1 1' / C) f:

        alpha_k = (1 - 2 / C + exp(m_k) sum_l exp(-m_l) / C^2) / V_kk,    p = alpha / sum alpha.

    It needs no samples, and gives a Dirichlet distribution rather than its mean alone; the mean is less accurate than
    `probit` where the logits differ in variance. Source: MacKay 1998; Hobbhahn, Kristiadi and Hennig 2022, who
    condition on 1'f = 0 where this projects, so that their result depends on the shift.

    Parameters
    ----------
    mean, covariance
        Of the logits of each example.
    """
    count = mean.shape[-1]
    mean = mean - mean.mean(axis=-1, keepdims=True)
    along = covariance.mean(axis=-1)
    variance = jnp.diagonal(covariance, axis1=-2, axis2=-1) - 2 * along + along.mean(axis=-1, keepdims=True)
    tiny = jnp.finfo(variance.dtype).tiny
    # As logarithms, since exp(m_k - m_l) leaves the range of float32 where the network is certain.
    flat = jnp.log(jnp.asarray(1 - 2 / count, mean.dtype)) if count > 2 else -jnp.inf
    peaked = mean + jax.nn.logsumexp(-mean, axis=-1, keepdims=True) - 2 * jnp.log(count)
    return jax.nn.softmax(jnp.logaddexp(flat, peaked) - jnp.log(jnp.maximum(variance, tiny)), axis=-1)
