"""Gaussian targets with a noise that is the same for all examples."""

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Real

from bnnlaplace.core import checks
from bnnlaplace.core.tree import summed_type
from bnnlaplace.model.likelihoods.record import Likelihood, Outputs, Targets
from bnnlaplace.model.likelihoods.tempered import untempered


def gaussian(sigma_noise: Real[ArrayLike, "*C"] = 1.0) -> Likelihood:
    """Gaussian likelihood with independent noise of standard deviation `sigma_noise`.

    log p(y | f) = -sum_c [(y_c - f_c)^2 / (2 sigma_c^2) + log(sigma_c sqrt(2 pi))], and Lambda = diag(1 / sigma^2).

    Parameters
    ----------
    sigma_noise
        The scale sigma: one positive number for all outputs, or one for each output (C,). The likelihood is
        differentiable in it.
    """
    sigma = jnp.asarray(sigma_noise)
    sigma = sigma.astype(summed_type(sigma.dtype))
    checks.all_positive(sigma, "gaussian(sigma_noise=...)", with_squares=True)
    return Likelihood(
        "regression",
        "array",
        Partial(_gaussian_log_prob, sigma),
        Partial(_gaussian_factor_mv, sigma),
        Partial(identity),
        Partial(_gaussian_hessian_mv, sigma),
        Partial(_gaussian_factor_mv, sigma),
    )


def noise_of(likelihood: Likelihood) -> Float[Array, "*C"] | None:
    """The noise scale of a likelihood that `gaussian` made, at any temperature; None for any other."""
    log_prob = untempered(likelihood)[0].log_prob
    return log_prob.args[0] if isinstance(log_prob, Partial) and log_prob.func is _gaussian_log_prob else None


def identity(f: Outputs) -> Outputs:
    """The mean of a Gaussian."""
    return f


def _gaussian_log_prob(sigma: Array, f: Outputs, y: Targets) -> Array:
    return jnp.sum(-0.5 * ((y - f) / sigma) ** 2 - jnp.log(sigma) - 0.5 * jnp.log(2 * jnp.pi), axis=-1)


def _gaussian_hessian_mv(sigma: Array, f: Outputs, v: Outputs) -> Array:
    return v / sigma**2


def _gaussian_factor_mv(sigma: Array, f: Outputs, u: Outputs) -> Array:
    return u / sigma
