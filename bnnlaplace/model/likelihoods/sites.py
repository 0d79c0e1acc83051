"""A likelihood whose curvature is data: at each example the average of Lambda under Gaussian outputs, its site.

The functions of these likelihoods take the site of an example, in place of its outputs, as the point at which the
curvature is evaluated; see `Microbatches.points`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float

from bnnlaplace.core.linalg import einsum
from bnnlaplace.model.likelihoods.record import Likelihood, Outputs, Targets

_PRODUCTS = ("factor_mv", "factor_transpose_mv", "hessian_mv")


def by_factors(likelihood: Likelihood) -> Likelihood:
    """The likelihood with the curvature W = A A' at points A, (..., C, C). `factor_mv` is A u."""
    return _with_curvature(
        likelihood,
        factor_mv=Partial(_factor_mv),
        factor_transpose_mv=Partial(_factor_transpose_mv),
        hessian_mv=Partial(_hessian_mv),
    )


def by_samples(likelihood: Likelihood) -> Likelihood:
    """The likelihood with the curvature W = mean_s Lambda(f_s) at points f, (..., S, C): S samples of the outputs.

    For many classes, where W has more numbers than the samples. Products with W are exact, at S times the cost of one
    with Lambda. W has no factor of C columns that is as cheap. So column c of `factor_mv` is that of B(f_s) for the
    sample s = c mod S. Over samples in random order the mean of B B' is W, and it is positive semidefinite.
    """
    return _with_curvature(
        likelihood,
        factor_mv=Partial(_picked_factor_mv, likelihood.factor_mv),
        factor_transpose_mv=Partial(_picked_factor_transpose_mv, likelihood.factor_transpose_mv),
        hessian_mv=Partial(_mean_hessian_mv, likelihood.hessian_mv),
    )


def factors_of(likelihood: Likelihood, points: Float[Array, "... C K"]) -> Float[Array, "... C K"] | None:
    """The factors A if the likelihood is one of `by_factors`, otherwise None."""
    return points if _function(likelihood) is _hessian_mv else None


def of_sample(likelihood: Likelihood) -> Likelihood | None:
    """The likelihood at one sample if this is one of `by_samples`, otherwise None."""
    if _function(likelihood) is not _mean_hessian_mv:
        return None
    inner = {name: getattr(likelihood, name).args[0] for name in ("log_prob", *_PRODUCTS)}
    return dataclasses.replace(likelihood, **inner)


def _function(likelihood: Likelihood) -> Any:
    product = likelihood.hessian_mv
    return product.func if isinstance(product, Partial) else None


def _with_curvature(likelihood: Likelihood, **products: Partial) -> Likelihood:
    # Wrapped, so that the likelihood is not taken for one with a noise or a temperature: its curvature has neither.
    return dataclasses.replace(likelihood, log_prob=Partial(_called, likelihood.log_prob), **products)


def _called(log_prob: Any, f: Outputs, y: Targets) -> Array:
    return log_prob(f, y)


def _factor_mv(factor: Float[Array, "... C K"], u: Float[Array, "... K"]) -> Array:
    return einsum("...ck,...k->...c", factor, u)


def _factor_transpose_mv(factor: Float[Array, "... C K"], v: Float[Array, "... C"]) -> Array:
    return einsum("...ck,...c->...k", factor, v)


def _hessian_mv(factor: Float[Array, "... C K"], v: Float[Array, "... C"]) -> Array:
    return _factor_mv(factor, _factor_transpose_mv(factor, v))


def _mean_hessian_mv(hessian_mv: Any, samples: Float[Array, "... S C"], v: Float[Array, "... C"]) -> Array:
    return jnp.mean(hessian_mv(samples, jnp.broadcast_to(v[..., None, :], samples.shape)), axis=-2)


def _picked(samples: Float[Array, "... S C"]) -> Bool[np.ndarray, "S C"]:
    """Which sample each column is taken from."""
    count, width = samples.shape[-2:]
    return np.arange(count)[:, None] == np.arange(width) % count


def _picked_factor_mv(factor_mv: Any, samples: Float[Array, "... S C"], u: Float[Array, "... C"]) -> Array:
    return jnp.sum(factor_mv(samples, jnp.where(_picked(samples), u[..., None, :], 0)), axis=-2)


def _picked_factor_transpose_mv(factor_transpose_mv: Any, samples: Any, v: Float[Array, "... C"]) -> Array:
    columns = factor_transpose_mv(samples, jnp.broadcast_to(v[..., None, :], samples.shape))
    return jnp.sum(jnp.where(_picked(samples), columns, 0), axis=-2)


def roots(curvatures: Float[np.ndarray, "... C C"]) -> Float[np.ndarray, "... C C"]:
    """Symmetric square roots of W, computed in float64 on the host. Rounding makes negative eigenvalues of zero."""
    values, vectors = np.linalg.eigh(np.asarray(curvatures, np.float64))
    found = (vectors * np.sqrt(np.maximum(values, 0))[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    return found.astype(curvatures.dtype)


def dense(likelihood: Likelihood, samples: Float[Array, "S B ... C"]) -> Float[Array, "B ... C C"]:
    """Compute W = mean_s Lambda(f_s) as a matrix, column by column. Memory: the samples a few times."""

    def column(number: Any) -> Float[Array, "B ... C"]:
        unit = jax.nn.one_hot(number, samples.shape[-1], dtype=samples.dtype)
        return jnp.mean(likelihood.hessian_mv(samples, jnp.broadcast_to(unit, samples.shape)), axis=0)

    return jnp.moveaxis(jax.lax.map(column, jnp.arange(samples.shape[-1])), 0, -1)
