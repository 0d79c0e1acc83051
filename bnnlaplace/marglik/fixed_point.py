"""The prior precisions that the evidence prefers at fixed weights, from a curvature batch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import as_vector, ravel
from bnnlaplace.core.types import Estimate
from bnnlaplace.curvature.diagonal import ggn_diagonal
from bnnlaplace.evidence import isotropic
from bnnlaplace.evidence.arguments import curvature_weights
from bnnlaplace.evidence.log_determinant import Probes
from bnnlaplace.marglik.objective import (
    DEFAULT_OPTIONS,
    PRECISION_RANGE,
    Batch,
    EvidenceOptions,
    LogPrecision,
    half_log_determinant,
    half_quadratic_form,
    negative_log_likelihood,
    num_present,
    per_weight,
)
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Groups, by_layer

# Iterations of the fixed point. Those for a scalar or a diagonal take no product.
_CHEAP_ITERATIONS, _ITERATIONS = 30, 3


class PriorUpdate(NamedTuple):
    """Prior precisions that the evidence prefers at fixed weights.

    Attributes
    ----------
    log_precision
        The logarithms of the new precisions.
    effective_parameters
        gamma = tr M (I + M)^-1, how many weights the data determine, summed over the groups.
    log_evidence
        The evidence on the batch, scaled to all data, at the precisions of the last iteration.
    """

    log_precision: LogPrecision
    effective_parameters: Float[Array, ""]
    log_evidence: Estimate


def prior_update(
    params: PyTree,
    log_precision: LogPrecision,
    batch: Batch,
    probes: Probes,
    *,
    network: Network,
    likelihood: Likelihood,
    num_data: float,
    options: EvidenceOptions = DEFAULT_OPTIONS,
    groups: Groups = by_layer,
) -> PriorUpdate:
    """Iterate the fixed point delta_g = gamma_g / |theta_g|^2 of the evidence at fixed weights (MacKay 1992).

    gamma_g is minus the derivative of the log-determinant in log delta_g. A scalar precision and a diagonal take one
    decomposition in all and are iterated to convergence. Precisions of groups under "lanczos" take S K products for
    each of three iterations: further ones follow at the next update.

    Parameters
    ----------
    params, log_precision, probes, network, likelihood, num_data, options, groups
        As for `negative_log_evidence`. The result is not differentiable.
    batch
        (inputs, targets) of likelihood and curvature.
    """
    model = {"network": network, "likelihood": likelihood, "num_data": num_data, "options": options, "groups": groups}
    log_determinant = _log_determinant(params, batch, probes, log_precision, **model)
    squares = jax.grad(lambda log_precision: 2 * half_quadratic_form(params, log_precision, groups))
    bounds = jnp.log(jnp.asarray(PRECISION_RANGE))

    def moved(log: Array, slope: Array, square: Array) -> Array:
        # `square` is delta_g |theta_g|^2 at the present delta, so the fixed point is delta_g gamma_g / square. Few
        # probes may put gamma_g below zero, and one iteration goes no further than by a factor of 20.
        move = jnp.log(jnp.maximum(-slope, 1e-6)) - jnp.log(jnp.maximum(square, 1e-12))
        return jnp.clip(log + jnp.clip(move, -3, 3), *bounds).astype(log.dtype)

    def iterate(_: Any, before: PriorUpdate) -> PriorUpdate:
        here = before.log_precision
        slopes, evidence = jax.grad(log_determinant, has_aux=True)(here)
        after = jax.tree.map(moved, here, slopes, squares(here))
        return PriorUpdate(after, -sum(jax.tree.leaves(slopes)), evidence)

    number = jnp.zeros((), ravel(params).dtype)
    start = PriorUpdate(log_precision, number, Estimate(number, number))
    # The types of the loop's results are those of the evidence.
    start = jax.tree.map(lambda x, like: x.astype(like.dtype), start, jax.eval_shape(lambda: iterate(0, start)))
    takes_products = isinstance(log_precision, dict) and options.hessian_structure == "lanczos"
    return jax.lax.fori_loop(0, _ITERATIONS if takes_products else _CHEAP_ITERATIONS, iterate, start)


def _log_determinant(
    params: PyTree,
    batch: Batch,
    probes: Probes,
    like: LogPrecision,
    *,
    network: Network,
    likelihood: Likelihood,
    num_data: float,
    options: EvidenceOptions,
    groups: Groups,
) -> Callable[[LogPrecision], tuple[Float[Array, ""], Estimate]]:
    """Return the function from log precisions to the log-determinant and the evidence, at fixed weights."""
    scale, model = num_data / num_present(batch), {"network": network, "likelihood": likelihood}
    if options.hessian_structure == "diag":
        counts = curvature_weights(network, likelihood, (*batch, None)[:3])
        sizes = {"weights": counts, "scale": scale, "microbatch": min(options.microbatch, 32)}
        diagonal = ggn_diagonal(network, likelihood, params, batch[0], **sizes)
        log_likelihood = -negative_log_likelihood(likelihood, network(params, batch[0]), batch, num_data)

        def of_diagonal(log_precision: LogPrecision) -> tuple[Array, Estimate]:
            value = jnp.sum(jnp.log1p(diagonal / as_vector(per_weight(log_precision, params, groups), params)))
            log_joint = log_likelihood - half_quadratic_form(params, log_precision, groups)
            return value, Estimate(log_joint - 0.5 * value, jnp.zeros_like(value))

        return of_diagonal
    if not isinstance(like, dict):
        num_probes = options.num_probes if checks.is_key(probes) else None  # rows state their number themselves
        sizes = {"num_matvecs": options.num_matvecs, "num_probes": num_probes, "microbatch": options.microbatch}
        evidence = isotropic(params, batch, probes, **model, scale=scale, **sizes)

        def of_rules(log_precision: LogPrecision) -> tuple[Array, Estimate]:
            estimate = evidence(jnp.exp(log_precision))
            log_joint = evidence.log_likelihood - 0.5 * jnp.exp(log_precision) * evidence.squared_norm
            return 2 * (log_joint - estimate.mean), estimate

        return of_rules

    def of_products(log_precision: LogPrecision) -> tuple[Array, Estimate]:
        sizes = {"num_data": num_data, "options": options._replace(gradient="forward"), "groups": groups}
        half, terms = half_log_determinant(params, log_precision, batch, probes, **model, **sizes)
        return 2 * half, terms.log_marginal_likelihood

    return of_products
