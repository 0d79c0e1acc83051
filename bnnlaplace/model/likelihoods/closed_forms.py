"""The curvature Lambda of outputs as numbers: in closed form for likelihoods of the package, by columns for others."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from bnnlaplace.core.linalg import einsum
from bnnlaplace.model.likelihoods import bernoulli, categorical, gaussian, heteroscedastic, sites
from bnnlaplace.model.likelihoods.record import Likelihood
from bnnlaplace.model.likelihoods.tempered import untempered

# Products with a curvature that is a diagonal, whatever the outputs.
_OF_DIAGONALS = (gaussian._gaussian_hessian_mv, bernoulli._bernoulli_hessian_mv, heteroscedastic._hessian_mv)
# Numbers of columns of Lambda, for all examples, that are in memory at a time.
_MOST_NUMBERS = 2**20


def curvature_diagonal(likelihood: Likelihood, outputs: Float[Array, "M ... C"]) -> Float[Array, "M C"]:
    """Compute the diagonal of Lambda at each example. Cost: M C numbers in closed form, otherwise M C^2.

    A likelihood of `sites` takes its points in place of the outputs.
    """
    if (factors := sites.factors_of(likelihood, outputs)) is not None:
        return jnp.sum(factors**2, axis=-1)
    if (of_sample := sites.of_sample(likelihood)) is not None:
        return jnp.mean(jax.vmap(partial(curvature_diagonal, of_sample), 1)(outputs), axis=0)
    if _is_diagonal(likelihood):
        return likelihood.hessian_mv(outputs, jnp.ones_like(outputs))
    if _is_softmax(likelihood):
        return _softmax_variances(likelihood, outputs)[1]
    return _by_columns(lambda number: jnp.take(_column(likelihood, outputs, number), number, axis=1), outputs).T


def curvature_sum(
    likelihood: Likelihood, outputs: Float[Array, "M ... C"], weights: Float[Array, " M"]
) -> Float[Array, "C C"]:
    """Compute sum_n w_n Lambda_n. Cost: M C numbers for a diagonal, a product of matrices for a softmax, else M C^2.

    A likelihood of `sites` takes its points in place of the outputs.
    """
    if (factors := sites.factors_of(likelihood, outputs)) is not None:
        return einsum("m,mck,mdk->cd", weights, factors, factors)
    if (of_sample := sites.of_sample(likelihood)) is not None:
        by_sample = jax.lax.map(lambda f: curvature_sum(of_sample, f, weights), jnp.moveaxis(outputs, 1, 0))
        return jnp.mean(by_sample, axis=0)
    if _is_diagonal(likelihood):
        return jnp.diag(einsum("m,mc->c", weights, curvature_diagonal(likelihood, outputs)))
    if _is_softmax(likelihood):
        probs, _ = _softmax_variances(likelihood, outputs)
        between = einsum("mc,md->cd", (weights / likelihood.temperature)[:, None] * probs, probs)
        # Rows of Lambda sum to zero. Like this they do so to rounding of their own numbers: sum w p - sum w p^2 would
        # lose its digits where the network is sure, and the direction (1, ..., 1) would get curvature.
        between = jnp.where(jnp.eye(len(between), dtype=bool), 0, between)
        return jnp.diag(between.sum(axis=1)) - between
    return _by_columns(lambda number: einsum("m,mc->c", weights, _column(likelihood, outputs, number)), outputs)


def _function(likelihood: Likelihood) -> object:
    product = untempered(likelihood)[0].hessian_mv
    return product.func if isinstance(product, Partial) else None


def _is_diagonal(likelihood: Likelihood) -> bool:
    return _function(likelihood) in _OF_DIAGONALS


def _is_softmax(likelihood: Likelihood) -> bool:
    return _function(likelihood) is categorical._categorical_hessian_mv


def _softmax_variances(
    likelihood: Likelihood, outputs: Float[Array, "M C"]
) -> tuple[Float[Array, "M C"], Float[Array, "M C"]]:
    """The probabilities p and p (1 - p) / T, to the last digits even where p rounds to one."""
    # One highest output, chosen by its place: so the derivatives are right as well, also where several share it.
    is_highest = jax.nn.one_hot(jnp.argmax(outputs, axis=-1), outputs.shape[-1], dtype=bool)
    highest = jnp.sum(jnp.where(is_highest, outputs, 0), axis=-1, keepdims=True)
    # 1 - p of the most probable class is the sum of all others. For any other class 1 - p is at least a half and keeps
    # its digits.
    relative = jnp.where(is_highest, 1, jnp.exp(outputs - highest))
    others = jnp.sum(jnp.where(is_highest, 0, relative), axis=-1, keepdims=True)
    probs = relative / (1 + others)
    return probs, probs * jnp.where(is_highest, others / (1 + others), 1 - probs) / likelihood.temperature


def _column(likelihood: Likelihood, outputs: Float[Array, "M C"], number: Int[Array, ""]) -> Float[Array, "M C"]:
    unit = jax.nn.one_hot(number, outputs.shape[1], dtype=outputs.dtype)
    return likelihood.hessian_mv(outputs, jnp.broadcast_to(unit, outputs.shape))


def _by_columns(function: object, outputs: Float[Array, "M C"]) -> Float[Array, "C ..."]:
    return jax.lax.map(function, jnp.arange(outputs.shape[1]), batch_size=max(1, _MOST_NUMBERS // outputs.size))
