"""E[y] for Gaussian outputs of a network: by samples, by the probit approximation, or by the Laplace bridge."""

from collections.abc import Callable
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core import checks
from bnnlaplace.core.types import AnyArray
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.likelihoods.heteroscedastic import is_heteroscedastic

LinkApproximation = Literal["probit", "mc", "bridge"]
# Likelihoods for which "probit" is right: their mean is a softmax, a sigmoid, or the output itself.
PROBIT = ("classification", "binary", "regression")
# Up to this `bridge_departure` the mean of the Laplace bridge is within about 0.1 of that of softmax(f).
LARGEST_DEPARTURE = 0.05


def check_link(likelihood: Likelihood, link_approx: LinkApproximation, caller: str, *, is_used: bool = True) -> None:
    """Raise ValueError if a link is unknown, or is not made for the likelihood although it is used."""
    checks.choice(link_approx, f"{caller}(link_approx=...)", ("probit", "mc", "bridge"))
    if link_approx == "bridge" and likelihood.name != "classification":
        raise ValueError(
            f"{caller}(link_approx='bridge') must be asked of 'classification'; got {likelihood.name!r}; try 'probit'"
        )
    is_made_for = likelihood.name in PROBIT or is_heteroscedastic(likelihood)
    if link_approx == "probit" and is_used and not is_made_for:
        raise ValueError(
            f"{caller}(link_approx='probit') must be asked of one of {PROBIT}, being made for softmax and sigmoid; "
            f"got {likelihood.name!r}; use link_approx='mc' with key=..."
        )


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


def monte_carlo_double(
    likelihood: Likelihood, mean: Float[AnyArray, "B ... C"], deviations: Float[AnyArray, "S B ... C"]
) -> Float[np.ndarray, "B ... C"]:
    """Average as `monte_carlo` does, `in_double`, with memory for one sample at a time."""
    mean = np.asarray(mean, np.float64)
    return sum(in_double(likelihood.mean, mean + np.asarray(each)) for each in deviations) / len(deviations)


def by_link_in_double(
    likelihood: Likelihood,
    mean: Float[AnyArray, "B ... C"],
    variance: Float[AnyArray, "B ... C"],
    deviations: Float[AnyArray, "S B ... C"],
) -> dict[str, Float[np.ndarray, "B ... C"]]:
    """Return E[y] through "MC" and "probit", from the numbers of a `FunctionalPosterior` with marginal variances."""
    return {
        "MC": monte_carlo_double(likelihood, mean, deviations),
        "probit": in_double(partial(probit, likelihood), mean, variance),
    }


def in_double(function: Callable[..., Array], *arrays: Float[AnyArray, "..."]) -> Float[np.ndarray, "..."]:
    """Evaluate a function of arrays in double precision, whatever their type. Not for use within `jit`.

    In single precision a class whose logit is 104 below the largest one has probability zero, and a label of that class
    has an infinite NLL.
    """
    with jax.enable_x64(True):
        return np.asarray(function(*(np.asarray(array, np.float64) for array in arrays)))


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

    Warns where `bridge_departure` exceeds `LARGEST_DEPARTURE`: there the mean is not that of softmax(f). Traced
    numbers, as inside of `jit`, are not known yet and cause no warning.

    Parameters
    ----------
    mean, covariance
        The mean and the covariance of the logits of each example.
    """
    probs = bridge_mean(mean, covariance)
    departure = bridge_departure(probs, mean, covariance)
    if isinstance(departure, jax.core.Tracer):
        return probs
    departure = np.asarray(departure)
    is_outside = departure > LARGEST_DEPARTURE
    if is_outside.any():
        checks.warn(
            f"the Laplace bridge is outside of its domain for {is_outside.sum()} of {departure.size} predictions: its "
            f"probabilities are off by about {departure.max():.2f} or more (total variation), because the variances of "
            "the logits are far from those of a Dirichlet distribution; use link_approx='probit', or 'mc' with key=..."
        )
    return probs


def bridge_departure(
    probs: Float[AnyArray, "B ... C"], mean: Float[AnyArray, "B ... C"], covariance: Float[AnyArray, "B ... C C"]
) -> Float[Array, "B ..."]:
    """Measure how far the bridge is outside of its own domain, the logits of a Dirichlet distribution.

    The bridge takes each alpha_k from one variance V_kk. If these are the variances that a Dirichlet distribution has
    for the mean m, the mean of the bridge is softmax(m), whatever their size. If they are not, it moves away from that,
    in ways that have nothing to do with an average over f. So the mean is compared with the average for logits that
    share the mean variance v = sum_k V_kk / (C - 1),

        softmax(m / sqrt(1 + pi / 8 v)),

    and the total variation distance of the two is returned, between 0 and 1. Measured against Monte Carlo on random
    means and covariances of 2 to 100 classes: where it is below 0.05, the bridge is off by 0.13 at most (0.08 in 99 %
    of the cases), and where it is above, by 0.026 at least. The ratio of the total variance to sqrt(C / 2), by which
    Hobbhahn, Kristiadi and Hennig scale large variances, tells the two cases no better than chance.

    Parameters
    ----------
    probs
        What `bridge` returns.
    mean, covariance
        As for `bridge`.
    """
    shared = _projected_variance(covariance).sum(axis=-1, keepdims=True) / max(mean.shape[-1] - 1, 1)
    averaged = jax.nn.softmax(mean / jnp.sqrt(1 + jnp.pi / 8 * shared), axis=-1)
    return jnp.abs(probs - averaged).sum(axis=-1) / 2


def bridge_mean(mean: Float[AnyArray, "B ... C"], covariance: Float[AnyArray, "B ... C C"]) -> Float[Array, "B ... C"]:
    """Compute what `bridge` returns, without a warning.

    Parameters
    ----------
    mean, covariance
        As for `bridge`.
    """
    count = mean.shape[-1]
    mean = mean - mean.mean(axis=-1, keepdims=True)
    variance = _projected_variance(covariance)
    tiny = jnp.finfo(variance.dtype).tiny
    # In logarithms, because exp(m_k - m_l) leaves the range of float32 if the network is certain. With two classes the
    # term 1 - 2 / C is zero.
    flat = jnp.log(jnp.asarray(1 - 2 / count, mean.dtype)) if count > 2 else -jnp.inf
    peaked = mean + jax.nn.logsumexp(-mean, axis=-1, keepdims=True) - 2 * jnp.log(count)
    return jax.nn.softmax(jnp.logaddexp(flat, peaked) - jnp.log(jnp.maximum(variance, tiny)), axis=-1)


def _projected_variance(covariance: Float[AnyArray, "B ... C C"]) -> Float[Array, "B ... C"]:
    """The diagonal of V. With the covariance S of f it is S_kk - 2 (S 1)_k / C + 1' S 1 / C^2."""
    row_means = covariance.mean(axis=-1)
    return jnp.diagonal(covariance, axis1=-2, axis2=-1) - 2 * row_means + row_means.mean(axis=-1, keepdims=True)
