"""The terms of the evidence, apart from each other, with the GGN as a matrix or as its diagonal.

A training loop needs them apart. It takes the likelihood from one batch and the log-determinant from another, or takes
a term less often than the others.
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Num, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import as_vector, num_examples, ravel
from bnnlaplace.core.types import AnyArray, Estimate, Inputs
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature.diagonal import ggn_diagonal
from bnnlaplace.curvature.linearisation import Linearisation, linearise
from bnnlaplace.evidence.arguments import checked_batch, curvature_weights
from bnnlaplace.evidence.log_determinant import (
    Probes,
    Problem,
    Rules,
    choose_side,
    estimate,
    forward_estimate,
    mean_and_sem,
    rows_of,
    rules,
)
from bnnlaplace.krylov.derivative_modes import once
from bnnlaplace.model.likelihood import Likelihood, check_targets
from bnnlaplace.model.network import Network
from bnnlaplace.model.weights import like_weights

Batch = tuple[Inputs, AnyArray] | tuple[Inputs, AnyArray, Num[AnyArray, " N"]]


class EvidenceTerms(NamedTuple):
    """The three terms of log p(D) = log p(y | f) - q / 2 - log det(I + P0^-1/2 G P0^-1/2) / 2, in nats.

    The normalisation of the prior is not among them. In the evidence it cancels against that of the posterior.

    Attributes
    ----------
    log_likelihood
        scale * sum_n log p(y_n | f_n).
    quadratic_form
        q = (theta - mu)' P0 (theta - mu).
    log_determinant
        log det(I + P0^-1/2 G P0^-1/2), with its standard error over probes: 0 for a diagonal, infinite for one probe.
    """

    log_likelihood: Float[Array, ""]
    quadratic_form: Float[Array, ""]
    log_determinant: Estimate

    @property
    def log_marginal_likelihood(self) -> Estimate:
        """Their sum, log p(D)."""
        mean = self.log_likelihood - 0.5 * self.quadratic_form - 0.5 * self.log_determinant.mean
        return Estimate(mean, 0.5 * self.log_determinant.sem)


def lanczos_terms(
    caller: str,
    params: PyTree,
    prior_precision: PyTree,
    batch: Batch,
    probes: Probes,
    *,
    network: Network,
    likelihood: Likelihood,
    num_matvecs: int,
    num_probes: int | None = None,
    scale: Num[ArrayLike, ""] = 1.0,
    prior_mean: PyTree = 0.0,
    side: Literal["auto", "primal", "dual"] = "auto",
    gradient: Literal["adjoint", "forward", "quadrature", "autodiff"] = "adjoint",
    probe_batch_size: int = 1,
    microbatch: int = 128,
    remat: bool = False,
) -> EvidenceTerms:
    """Compute the terms with the log-determinant by stochastic Lanczos quadrature; see `log_marginal_likelihood`."""
    checks.choice(gradient, f"{caller}(gradient=...)", ("adjoint", "forward", "quadrature", "autodiff"))
    options = {"num_matvecs": num_matvecs, "probe_batch_size": probe_batch_size}
    batch = checked_batch(caller, network, batch)
    params = like_weights(params, network.params, f"{caller}(params=...)", finite=True)
    weights = curvature_weights(network, likelihood, batch)
    linearised = linearise(network, params, batch[0], weights=weights, microbatch=microbatch, remat=remat)
    # The outputs of the linearisation also give the log likelihood: the network runs once.
    problem, rows = problem_of(caller, linearised, likelihood, scale, side, probes, num_probes, num_matvecs)
    vector = _precisions(caller, prior_precision, params, linearised.outputs.dtype)
    is_scalar = jax.tree_util.all_leaves([prior_precision]) and jnp.ndim(prior_precision) == 0
    # A scalar must stay one: it enters through the function, without a product of its own.
    delta = jnp.asarray(prior_precision, vector.dtype) if is_scalar else vector
    if gradient != "forward":
        log_determinant = estimate(problem, delta, rows, gradient=gradient, **options)
    elif is_scalar:
        log_determinant = log_determinant_of(_fixed_rules(caller, problem, rows, **options), delta)
    else:
        log_determinant = forward_estimate(caller, problem, delta, rows, **options)
    quadratic_form = _quadratic_form(caller, params, vector, prior_mean)
    return EvidenceTerms(
        log_likelihood_of(linearised.outputs, likelihood, batch, scale), quadratic_form, log_determinant
    )


def diagonal_terms(
    caller: str,
    params: PyTree,
    prior_precision: PyTree,
    batch: Batch,
    *,
    network: Network,
    likelihood: Likelihood,
    scale: Num[ArrayLike, ""] = 1.0,
    prior_mean: PyTree = 0.0,
    microbatch: int = 32,
) -> EvidenceTerms:
    """Compute the terms with the exact diagonal in place of G. They are differentiable in every array argument."""
    checks.positive(scale, f"{caller}(scale=...)")
    batch = checked_batch(caller, network, batch)
    params = like_weights(params, network.params, f"{caller}(params=...)", finite=True)
    weights = curvature_weights(network, likelihood, batch)
    options = {"weights": weights, "scale": scale, "microbatch": microbatch}
    diagonal = ggn_diagonal(network, likelihood, params, batch[0], **options)
    outputs = network(params, batch[0])
    vector = _precisions(caller, prior_precision, params, outputs.dtype)
    log_determinant = Estimate(jnp.sum(jnp.log1p(diagonal / vector)), jnp.zeros((), diagonal.dtype))
    quadratic_form = _quadratic_form(caller, params, vector, prior_mean)
    return EvidenceTerms(log_likelihood_of(outputs, likelihood, batch, scale), quadratic_form, log_determinant)


def evidence_terms(
    params: PyTree,
    prior_precision: PyTree,
    batch: Batch,
    probes: Probes,
    *,
    network: Network,
    likelihood: Likelihood,
    hessian_structure: Literal["lanczos", "diag"] = "lanczos",
    num_matvecs: int = 10,
    num_probes: int | None = None,
    scale: Num[ArrayLike, ""] = 1.0,
    prior_mean: PyTree = 0.0,
    gradient: Literal["adjoint", "forward", "quadrature", "autodiff"] = "adjoint",
    microbatch: int = 128,
) -> EvidenceTerms:
    """Compute log likelihood, prior and log-determinant of the evidence, each differentiable on its own.

    Parameters
    ----------
    params, prior_precision, batch, network, likelihood, scale, prior_mean
        As for `log_marginal_likelihood`.
    probes, num_matvecs, num_probes, gradient
        As for `log_marginal_likelihood`. "diag" does not use them.
    hessian_structure
        "lanczos": the whole GGN, by products. "diag": its exact diagonal, the baseline. By Hadamard's inequality the
        log-determinant of the diagonal is never below that of the GGN.
    microbatch
        Examples in one step of the inner loop; it bounds memory.

    Returns
    -------
    EvidenceTerms
        The terms; `log_marginal_likelihood` of the result is their sum.

    Notes
    -----
    Cost of "lanczos": as for `log_marginal_likelihood`. Cost of "diag": a backward pass for each output, and twice that
    for its gradient.

    Raises
    ------
    ValueError
        If `hessian_structure` is unknown, or as for `log_marginal_likelihood`.

    Examples
    --------
    >>> import bnnlaplace
    >>> network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))
    >>> batch = jnp.ones((5, 2)), jnp.arange(5) % 3
    >>> options = {"network": network, "likelihood": bnnlaplace.categorical(), "num_matvecs": 2, "num_probes": 4}
    >>> terms = evidence_terms(network.params, 1.0, batch, jax.random.key(0), **options)
    >>> float(terms.quadratic_form)
    6.0
    """
    caller = "evidence_terms"
    checks.choice(hessian_structure, f"{caller}(hessian_structure=...)", ("lanczos", "diag"))
    model = {"network": network, "likelihood": likelihood, "scale": scale, "prior_mean": prior_mean}
    if hessian_structure == "diag":
        return diagonal_terms(caller, params, prior_precision, batch, **model, microbatch=min(microbatch, 32))
    options = {"num_matvecs": num_matvecs, "num_probes": num_probes, "gradient": gradient, "microbatch": microbatch}
    return lanczos_terms(caller, params, prior_precision, batch, probes, **model, **options)


def problem_of(
    caller: str,
    linearised: Linearisation,
    likelihood: Likelihood,
    scale: Num[ArrayLike, ""],
    side: str,
    probes: Probes,
    num_probes: int | None,
    num_matvecs: int,
) -> tuple[Problem, Float[AnyArray, "S V"]]:
    """Check the options, choose the side, and draw the probes of that side."""
    outputs, num_weights = linearised.outputs, linearised.size
    checks.positive(scale, f"{caller}(scale=...)")
    if num_probes is not None:
        checks.count(num_probes, f"{caller}(num_probes=...)", advice="try 10")
    side = choose_side(caller, side, probes, num_weights, outputs.size)
    length = num_weights if side == "primal" else outputs.size
    rows = rows_of(caller, probes, num_probes, length, outputs.dtype)
    advice = f"vectors of side={side!r} have {length} numbers"
    checks.count(num_matvecs, f"{caller}(num_matvecs=...)", most=length, advice=advice)
    return Problem(linearised, likelihood, scale, side), rows


def _fixed_rules(caller: str, *arguments: Any, **options: Any) -> Rules:
    """Compute the Gauss rules, which raise TypeError if they are differentiated."""
    message = f"{caller}(gradient='forward') has derivatives in prior_precision and prior_mean only; use 'adjoint'"
    return once(rules(*arguments, **options), message)


def log_determinant_of(rules: Rules, prior_precision: Float[Array, "*shape"]) -> Estimate:
    """Evaluate log det(I + G / delta) at each prior precision, by the Gauss rules of G."""
    # Eigenvalues of G / delta are nodes / delta, with the same weights.
    forms = jnp.sum(rules.weights * jnp.log1p(rules.nodes / prior_precision[..., None, None]), axis=-1)
    return mean_and_sem(forms)


def log_likelihood_of(
    outputs: Float[Array, "M ... C"],
    likelihood: Likelihood,
    batch: tuple[Inputs, AnyArray, Num[AnyArray, " N"] | None],
    scale: Num[ArrayLike, ""],
) -> Float[Array, ""]:
    """Return scale * sum_n w_n log p(y_n | f_n), after a check of the targets."""
    inputs, targets, weights = batch
    outputs = outputs[: num_examples(inputs)]  # the rest is padding of the last microbatch
    check_targets(likelihood, outputs.shape, targets, "log_marginal_likelihood(batch=(x, y))")
    log_prob = likelihood.log_prob(outputs, targets)
    return scale * jnp.sum(log_prob if weights is None else mb.over_outputs(jnp.asarray(weights), log_prob) * log_prob)


def _precisions(caller: str, prior_precision: PyTree, params: PyTree, dtype: Any) -> Float[Array, " P"]:
    """Return one prior precision for each weight, checked."""
    checks.real_numbers(prior_precision, f"{caller}(prior_precision=...)")
    vector = as_vector(prior_precision, params)
    if not jnp.issubdtype(vector.dtype, jnp.floating):  # whole numbers are precisions too
        vector = vector.astype(dtype)
    checks.all_positive(vector, f"{caller}(prior_precision=...)")
    return vector


def _quadratic_form(
    caller: str, params: PyTree, precisions: Float[Array, " P"], prior_mean: PyTree
) -> Float[Array, ""]:
    """Return (theta - mu)' P0 (theta - mu)."""
    checks.real_numbers(prior_mean, f"{caller}(prior_mean=...)", finite=True)
    return jnp.sum(precisions * (ravel(params) - as_vector(prior_mean, params)) ** 2)
