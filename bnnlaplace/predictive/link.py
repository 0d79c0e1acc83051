"""E[y] for Gaussian outputs of a network: by samples, by the probit approximation, or by the Laplace bridge."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.core.types import AnyArray
from bnnlaplace.model.likelihood import Likelihood


def monte_carlo(
    likelihood: Likelihood, mean: Float[AnyArray, "B ... C"], deviations: Float[AnyArray, "S B ... C"]
) -> Float[Array, "B ... C"]:
    """Average E[y | f + J (theta - theta*)] over samples: probabilities are averaged, not their logarithms.

    Parameters
    ----------
    likelihood
        The likelihood, which gives E[y | f].
    mean
        f(x; theta*).
    deviations
        S samples of J (theta - theta*).
    """
    return jnp.mean(likelihood.mean(mean + deviations), axis=0)


def probit(
    likelihood: Likelihood, mean: Float[AnyArray, "B ... C"], variance: Float[AnyArray, "B ... C"]
) -> Float[Array, "B ... C"]:
    """Approximate E[y] by E[y | f / sqrt(1 + pi/8 var f)], with the marginal variance of each output.

    Source: MacKay 1992 for the binary case. For several classes it is applied to each logit, as by Lu, Ie and Sha
    (2021) and laplace-torch.

    Parameters
    ----------
    likelihood
        The likelihood, which gives E[y | f].
    mean, variance
        The mean and the variance of each output.
    """
    return likelihood.mean(mean / jnp.sqrt(1 + jnp.pi / 8 * variance))


def bridge(mean: Float[AnyArray, "B ... C"], covariance: Float[AnyArray, "B ... C C"]) -> Float[Array, "B ... C"]:
    """Return the mean of the Dirichlet distribution that matches Gaussian logits at their mode: the Laplace bridge.

    Softmax does not change if all logits are shifted. So let m and V be the mean and the covariance of
    (I - 1 1' / C) f. Then

        alpha_k = (1 - 2 / C + exp(m_k) sum_l exp(-m_l) / C^2) / V_kk,    p = alpha / sum alpha.

    The bridge needs no samples, and alpha defines a whole Dirichlet distribution. Its mean is less accurate than
    `probit` if the logits differ in variance. Source: MacKay 1998; Hobbhahn, Kristiadi and Hennig 2022. They condition
    on 1'f = 0 instead of projecting, so their result depends on the shift.

    Parameters
    ----------
    mean, covariance
        The mean and the covariance of the logits of each example.
    """
    count = mean.shape[-1]
    mean = mean - mean.mean(axis=-1, keepdims=True)
    # The diagonal of V. With the covariance S of f it is S_kk - 2 (S 1)_k / C + 1' S 1 / C^2.
    row_means = covariance.mean(axis=-1)
    variance = jnp.diagonal(covariance, axis1=-2, axis2=-1) - 2 * row_means + row_means.mean(axis=-1, keepdims=True)
    tiny = jnp.finfo(variance.dtype).tiny
    # In logarithms, because exp(m_k - m_l) leaves the range of float32 if the network is certain. With two classes the
    # term 1 - 2 / C is zero.
    flat = jnp.log(jnp.asarray(1 - 2 / count, mean.dtype)) if count > 2 else -jnp.inf
    peaked = mean + jax.nn.logsumexp(-mean, axis=-1, keepdims=True) - 2 * jnp.log(count)
    return jax.nn.softmax(jnp.logaddexp(flat, peaked) - jnp.log(jnp.maximum(variance, tiny)), axis=-1)
