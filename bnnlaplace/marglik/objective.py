"""The negative log evidence as an objective of weights and prior precisions, and the parts of its gradient.

With B of N examples in the batch and M of N in the curvature batch, the objective is

    -N/B sum_b log p(y_b | f_b) + q / 2 + log det(I + P0^-1/2 G P0^-1/2) / 2,    G = N/M sum_m J_m' Lambda_m J_m.

Prior precisions are given by their logarithms, so that they stay positive. The normalisation of the prior cancels
against that of the posterior: of the prior, only the quadratic form q = theta' P0 theta is left.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import as_vector, leaf_names, num_examples, ravel
from bnnlaplace.curvature.microbatch import over_outputs
from bnnlaplace.evidence import EvidenceTerms, evidence_terms
from bnnlaplace.evidence.log_determinant import Probes
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Groups, by_layer, group_names

LogPrecision = Float[Array, ""] | dict[str, Float[Array, ""]]
"""The logarithm of the prior precision: one number, or one for each group."""

Batch = tuple[Any, ...]
"""(inputs, targets), or (inputs, targets, weights) with weights that say how many times each example counts."""

PRECISION_RANGE = (1e-4, 1e6)
"""Bounds of trained prior precisions. The evidence sends that of a group with dead weights to infinity."""


class EvidenceOptions(NamedTuple):
    """How the log-determinant is estimated. It is hashable, so it may be a static argument of `jit`.

    Attributes
    ----------
    hessian_structure
        "lanczos" for the whole GGN by products, "diag" for its exact diagonal.
    num_matvecs, num_probes
        Krylov depth and number of probes of "lanczos".
    gradient
        "adjoint" for the gradient of the value, "quadrature" for an unbiased one that costs a third.
    microbatch
        Examples in one step of the inner loop of a product.
    """

    hessian_structure: Literal["lanczos", "diag"] = "lanczos"
    num_matvecs: int = 10
    num_probes: int = 1
    gradient: Literal["adjoint", "quadrature"] = "adjoint"
    microbatch: int = 128


DEFAULT_OPTIONS = EvidenceOptions()


def log_precision_of(
    prior_precision: float | dict[str, float],
    params: PyTree,
    prior_structure: Literal["scalar", "layerwise"],
    groups: Groups = by_layer,
) -> LogPrecision:
    """Return the logarithms of prior precisions as the steps train them, in the number type of the weights.

    Parameters
    ----------
    prior_precision
        One number, or for "layerwise" a dictionary with one number for each group.
    params
        The weights.
    prior_structure
        "scalar" or "layerwise".
    groups
        The function from the path of a weight to the name of its group.
    """
    dtype = ravel(params).dtype
    if prior_structure == "scalar":
        return jnp.log(jnp.asarray(prior_precision, dtype))
    names = group_names(params, groups)
    by_group = prior_precision if isinstance(prior_precision, dict) else dict.fromkeys(names, prior_precision)
    return {name: jnp.log(jnp.asarray(by_group[name], dtype)) for name in names}


def precision_of(log_precision: LogPrecision) -> float | dict[str, float]:
    """Return prior precisions in the form that `Laplace(prior_precision=...)` takes.

    Parameters
    ----------
    log_precision
        Their logarithms: one number, or a dictionary with one for each group.
    """
    return jax.tree.map(lambda number: float(jnp.exp(number)), log_precision)


def per_weight(log_precision: LogPrecision, params: PyTree, groups: Groups = by_layer) -> PyTree:
    """Return the prior precision as the evidence takes it: a scalar, or a pytree like the weights."""
    if not isinstance(log_precision, dict):
        return jnp.exp(log_precision)
    leaves = [jnp.exp(log_precision[groups(name)]) for name in leaf_names(params)]
    return jax.tree.unflatten(jax.tree.structure(params), leaves)


def num_present(batch: Batch) -> Int[Array, ""] | int:
    """Return how many examples a batch has, without those of weight zero."""
    return jnp.count_nonzero(batch[2]) if len(batch) == 3 else num_examples(batch[0])


def negative_log_likelihood(
    likelihood: Likelihood, outputs: Float[Array, "B ... C"], batch: Batch, num_data: float
) -> Float[Array, ""]:
    """Return the negative log likelihood of a batch, scaled to all data: by N/B for N examples, B of them present.

    A scale by the sum of the weights would cut those of heavy examples: the batch that has one would count for less.
    """
    log_prob = likelihood.log_prob(outputs, batch[1])
    if len(batch) == 3:
        weights = over_outputs(jnp.asarray(batch[2], log_prob.dtype), log_prob)
        # What an example of weight zero holds need not have a likelihood.
        log_prob = jnp.where(weights > 0, weights * log_prob, 0)
    return -num_data / jnp.maximum(num_present(batch), 1) * jnp.sum(log_prob)


def half_quadratic_form(params: PyTree, log_precision: LogPrecision, groups: Groups = by_layer) -> Float[Array, ""]:
    """Return theta' P0 theta / 2, the part of the prior that is left in the evidence."""
    return 0.5 * jnp.sum(as_vector(per_weight(log_precision, params, groups), params) * ravel(params) ** 2)


def half_log_determinant(
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
) -> tuple[Float[Array, ""], EvidenceTerms]:
    """Estimate half the log-determinant on a curvature batch, differentiable in weights and prior precisions.

    The second result holds all terms of the evidence on this batch, scaled to all data.
    """
    terms = evidence_terms(
        params,
        per_weight(log_precision, params, groups),
        batch,
        probes,
        network=network,
        likelihood=likelihood,
        scale=num_data / num_present(batch),
        # Rows of probes state their number themselves.
        **options._asdict() | ({} if checks.is_key(probes) else {"num_probes": None}),
    )
    return 0.5 * terms.log_determinant.mean, terms


def negative_log_evidence(
    params: PyTree,
    log_precision: LogPrecision,
    batch: Batch,
    curvature_batch: Batch,
    probes: Probes,
    *,
    network: Network,
    likelihood: Likelihood,
    num_data: float,
    options: EvidenceOptions = DEFAULT_OPTIONS,
    groups: Groups = by_layer,
    log_determinant: bool = True,
) -> tuple[Float[Array, ""], EvidenceTerms | None]:
    """Estimate the negative log evidence of a batch, as an objective of weights and prior precisions.

    Parameters
    ----------
    params, log_precision
        What is trained: the weights, and the logarithm of the prior precision. This is one number, or a dictionary with
        one number for each group.
    batch
        (inputs, targets) of the likelihood, scaled to `num_data` examples.
    curvature_batch
        (inputs, targets) of the curvature, scaled to `num_data` examples. It may be `batch`.
    probes
        A random key, from which `options.num_probes` probes are drawn: pass another one in each step. Or the probes, as
        for `bnnlaplace.evidence.log_marginal_likelihood`.
    network, likelihood
        The model.
    num_data
        N, the number of training examples, without those of weight zero.
    options
        How the log-determinant is estimated.
    groups
        The function from the path of a weight to the name of its group.
    log_determinant
        Whether the log-determinant is part of the objective. Without it this is the negative log joint, up to the
        normalisation of the prior.

    Returns
    -------
    tuple
        The objective in nats, and the terms of the evidence on the curvature batch, or None without the determinant.

    Notes
    -----
    Cost of the gradient with "lanczos": the network is linearised once; then 2 S K products, and for each probe a
    vector-Jacobian product of K terms. Memory: as for `bnnlaplace.evidence.log_marginal_likelihood`.

    Examples
    --------
    >>> import bnnlaplace
    >>> network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))
    >>> batch = jnp.ones((5, 2)), jnp.arange(5) % 3
    >>> model = {"network": network, "likelihood": bnnlaplace.categorical(), "num_data": 50}
    >>> model["options"] = EvidenceOptions(num_matvecs=2)
    >>> objective = jax.value_and_grad(negative_log_evidence, (0, 1), has_aux=True)
    >>> _, gradient = objective(network.params, jnp.zeros(()), batch, batch, jax.random.key(0), **model)
    >>> gradient[0].shape
    (2, 3)
    """
    negative = negative_log_likelihood(likelihood, network(params, batch[0]), batch, num_data)
    value = negative + half_quadratic_form(params, log_precision, groups)
    if not log_determinant:
        return value, None
    model = {"network": network, "likelihood": likelihood, "num_data": num_data, "options": options, "groups": groups}
    half, terms = half_log_determinant(params, log_precision, curvature_batch, probes, **model)
    return value + half, terms
