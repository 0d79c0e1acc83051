"""Gaussian targets with a noise that the network predicts as well."""

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float

from bnnlaplace.core.types import AnyArray
from bnnlaplace.model.likelihoods.record import Likelihood, Outputs, Targets
from bnnlaplace.model.likelihoods.tempered import untempered


def heteroscedastic() -> Likelihood:
    """Gaussian likelihood whose outputs (..., 2 C) are C means m and then C log variances s, for targets (..., C).

    log p(y | f) = -sum_c [(y_c - m_c)^2 exp(-s_c) + s_c + log(2 pi)] / 2. Its Hessian need not be positive, so the
    curvature is the Fisher information, Lambda = diag(exp(-s), 1 / 2), in means and log variances.

    `predictive` returns the mean, its variance under the posterior (epistemic), and the expected variance of the noise
    (aleatoric), (B, ..., C) each. Their sum is the variance of y; `with_noise` adds the third to the second. For the
    linearised network all are exact: with s ~ N(s*, v) the noise has E[exp(s)] = exp(s* + v / 2).
    """
    return Likelihood(
        "heteroscedastic",
        "array",
        Partial(_log_prob),
        Partial(_factor_mv),
        Partial(_means),
        Partial(_hessian_mv),
        Partial(_factor_mv),
        target_shape=_shape,
    )


def is_heteroscedastic(likelihood: Likelihood) -> bool:
    """Whether `heteroscedastic` made a likelihood, at any temperature."""
    log_prob = untempered(likelihood)[0].log_prob
    return isinstance(log_prob, Partial) and log_prob.func is _log_prob


def moments(f: Outputs) -> Float[Array, "*lead C"]:
    """Mean and variance of y given f, one behind the other along the last axis."""
    means, log_variances = jnp.split(jnp.asarray(f), 2, axis=-1)
    return jnp.concatenate([means, jnp.exp(log_variances)], axis=-1)


def expected_moments(
    mean: Float[AnyArray, "... C"], variance: Float[AnyArray, "... C"]
) -> tuple[Float[Array, "... c"], Float[Array, "... c"], Float[Array, "... c"]]:
    """E[m], Var[m] and E[exp(s)] of Gaussian outputs with mean and variance (..., 2 C)."""
    means, log_variances = jnp.split(jnp.asarray(mean), 2, axis=-1)
    of_means, of_log_variances = jnp.split(jnp.asarray(variance), 2, axis=-1)
    return means, of_means, jnp.exp(log_variances + 0.5 * of_log_variances)


def _shape(num_outputs: int) -> tuple[int]:
    if num_outputs % 2:
        raise ValueError(
            "'heteroscedastic' must have a mean and a log variance for each target, so an even number of outputs; got "
            f"{num_outputs}; add outputs to the network"
        )
    return (num_outputs // 2,)


def _means(f: Outputs) -> Array:
    return jnp.split(jnp.asarray(f), 2, axis=-1)[0]


def _log_prob(f: Outputs, y: Targets) -> Array:
    means, log_variances = jnp.split(jnp.asarray(f), 2, axis=-1)
    squares = (y - means) ** 2 * jnp.exp(-log_variances)
    return -0.5 * jnp.sum(squares + log_variances + jnp.log(2 * jnp.pi), axis=-1)


def _hessian_mv(f: Outputs, v: Outputs) -> Array:
    log_variances = jnp.split(jnp.asarray(f), 2, axis=-1)[1]
    of_means, of_log_variances = jnp.split(v, 2, axis=-1)
    return jnp.concatenate([jnp.exp(-log_variances) * of_means, 0.5 * of_log_variances], axis=-1)


def _factor_mv(f: Outputs, u: Outputs) -> Array:
    log_variances = jnp.split(jnp.asarray(f), 2, axis=-1)[1]
    of_means, of_log_variances = jnp.split(u, 2, axis=-1)
    return jnp.concatenate([jnp.exp(-0.5 * log_variances) * of_means, 0.5**0.5 * of_log_variances], axis=-1)
