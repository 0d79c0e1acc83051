"""A likelihood at a temperature: p(y | f)^(1 / T), as in cold posteriors."""

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Real

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described, summed_type
from bnnlaplace.core.types import AnyArray
from bnnlaplace.model.likelihoods.record import Likelihood, Outputs, Targets


def tempered(likelihood: Likelihood, temperature: Real[AnyArray, ""] | float) -> Likelihood:
    """Raise a likelihood to the power 1 / T, as if each example counted 1 / T times.

    log p and its curvature are divided by T in the posterior and in the evidence. What is predicted, E[y | f], the
    noise that `predictive` adds and the score of validation data are those of the likelihood itself. A temperature
    below one gives a cold posterior, which is narrower. The evidence is that of a model whose data count 1 / T times,
    so it does not say which temperature is the best one.

    Parameters
    ----------
    likelihood
        A `Likelihood`, which may have a temperature already; then T multiplies it.
    temperature
        T > 0. The likelihood is differentiable in it.

    Raises
    ------
    ValueError
        If the temperature is not one positive number.
    TypeError
        If the likelihood is given by its name.
    """
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            f"tempered(likelihood=...) must be a Likelihood; got {described(likelihood)}; try bnnlaplace.categorical()"
        )
    checks.all_positive(temperature, "tempered(temperature=...)")
    number = jnp.asarray(temperature)
    if number.shape:
        raise ValueError(f"tempered(temperature=...) must be one number; got shape {number.shape}; try 0.5")
    number = number.astype(summed_type(number.dtype))
    inner, before = untempered(likelihood)
    number = number if before is None else number * before
    return dataclasses.replace(
        inner,
        log_prob=Partial(_divided, number, inner.log_prob),
        factor_mv=Partial(_divided_by_root, number, inner.factor_mv),
        hessian_mv=Partial(_divided, number, inner.hessian_mv),
        factor_transpose_mv=Partial(_divided_by_root, number, inner.factor_transpose_mv),
    )


def untempered(likelihood: Likelihood) -> tuple[Likelihood, Float[Array, ""] | None]:
    """Return what `tempered` was given: the likelihood and T. T is None for a likelihood without a temperature."""
    if not (isinstance(likelihood.log_prob, Partial) and likelihood.log_prob.func is _divided):
        return likelihood, None
    functions = ("log_prob", "factor_mv", "hessian_mv", "factor_transpose_mv")
    inner = {name: getattr(likelihood, name).args[1] for name in functions}
    return dataclasses.replace(likelihood, **inner), likelihood.log_prob.args[0]


def _divided(temperature: Array, function: Callable, f: Outputs, other: Targets) -> Array:
    value = function(f, other)
    return value / temperature.astype(value.dtype)


def _divided_by_root(temperature: Array, function: Callable, f: Outputs, u: Outputs) -> Array:
    value = function(f, u)
    return value / jnp.sqrt(temperature.astype(value.dtype))
