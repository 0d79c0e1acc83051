"""Fit the variational posterior: sites, mean and curvature in turn, until the evidence lower bound has settled.

For a Gaussian q = N(m, Sigma) over the weights of the linearised network, the maximum of the evidence lower bound

    ELBO = sum_n E_q log p(y_n | f_n) - KL(q || N(mu, P0^-1))

obeys, with averages over q of the likelihood's gradient r_n and curvature W_n,

    Sigma^-1 = P0 + sum_n J_n' W_n J_n,    P0 (m - mu) = sum_n J_n' r_n.

(Opper and Archambeau, "The variational Gaussian approximation revisited", 2009.) That is a Laplace approximation whose
curvature and residuals are averaged under its own predictions. With the curvature G that a structure holds and
gamma = tr G (G + P0)^-1, the divergence is

    KL = 1/2 [(m - mu)' P0 (m - mu) - gamma + log det(I + P0^-1/2 G P0^-1/2)].

So E_q log p + gamma / 2 stands where the log likelihood at the mode stands in the Laplace evidence, and whatever is
computed from that is computed from this. A structure such as the diagonal restricts Sigma; the bound is one for any.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bnnlaplace.core import checks
from bnnlaplace.core.memory import MemoryEstimate
from bnnlaplace.core.tree import number_type, ravel, size
from bnnlaplace.curvature.kronecker import SharedWeights
from bnnlaplace.evidence.log_likelihood import LogLikelihood
from bnnlaplace.evidence.lower_bound import Bound
from bnnlaplace.fitted import Fitted, Settings, Unfitted
from bnnlaplace.fitting.fit import fit, fit_structure
from bnnlaplace.fitting.krylov import KrylovOptions
from bnnlaplace.fitting.prepare import Model, memory_of, prepare
from bnnlaplace.model.data import Data
from bnnlaplace.model.spec import output_shape
from bnnlaplace.prior import Prior
from bnnlaplace.structure import SampleStructure, Structure
from bnnlaplace.variational.draws import draw, without_spread
from bnnlaplace.variational.mean import MeanStep, settle, with_mean
from bnnlaplace.variational.options import Progress, Variational, resolve
from bnnlaplace.variational.sites import Sites, are_by_samples, at_sites, sites_of

# The first step of the sites, by how much it grows after one that was accepted, and the smallest one before the fit
# gives up.
FIRST_DAMPING, GROWTH, LEAST_DAMPING = 0.7, 1.25, 1 / 64
# Newton's method ends if it gains less than this part of the tolerance.
OF_TOLERANCE = 0.1


class _Context(NamedTuple):
    """All that stays the same from the first iteration to the last."""

    model: Model
    prior: Prior
    name: str
    options: Variational
    krylov: KrylovOptions
    shared_weights: SharedWeights
    microbatch: int
    scale: float
    by_samples: bool


class _Iterate(NamedTuple):
    """A posterior on the way: mean and structure, the sites that made it, and those that its own predictions make."""

    settled: MeanStep
    structure: Structure
    sites: Sites | None
    proposed: Sites
    bound: "_Terms"


class _Terms(NamedTuple):
    """The evidence lower bound and its parts."""

    elbo: float
    expected: float
    sem: float
    effective: float


def fit_posterior(
    state: Unfitted | Fitted, settings: Settings, data: Data, approximation: str | Variational, **how: Any
) -> Fitted:
    """Fit a Laplace approximation or a variational posterior. Parameters and errors are those of `Laplace.fit`."""
    options = resolve(approximation)
    if options is None:
        return fit(state, settings, data, **how)
    return fit_variational(state, settings, data, options, **how)


def fit_variational(
    state: Unfitted | Fitted,
    settings: Settings,
    data: Data,
    options: Variational,
    *,
    num_data: int | None,
    microbatch: int,
    krylov: KrylovOptions,
    shared_weights: SharedWeights = "partial_traces",
    posterior: Fitted | None = None,
    mean: str = "network",
) -> Fitted:
    """Fit the variational posterior at the prior precision of the settings.

    A posterior that was fitted like this is where the iteration begins, so that another prior precision near by takes
    few iterations. Parameters beside `options` are those of `fitting.fit.fit`.

    Raises
    ------
    ValueError
        If data can be read once only, or options or data cannot be used.

    Notes
    -----
    Cost of an iteration: one Laplace fit of the structure, the samples of the outputs, and in each Newton step of the
    mean a gradient and the products of conjugate gradients. Memory beside that of a Laplace fit: the samples of the
    outputs of all examples, S N C numbers, and N C^2 for the sites, or S N C again where C > S.
    """
    checks.known("fit", state, settings)
    _check(posterior, data)
    if state.likelihood.sigma_noise is not None:  # the posterior of the linearised network is Gaussian
        exact = {"mean": "linear", "num_data": num_data, "microbatch": microbatch, "shared_weights": shared_weights}
        return fit(state, settings, data, krylov=krylov, **exact)
    checks.key(krylov.key, "fit(key=...), which seeds the samples of the outputs,")
    krylov.check_types()
    context, start = _begin(state, settings, data, options, num_data, microbatch, krylov, shared_weights)
    best, progress = _iterate(context, start)
    return _as_fitted(context, best, progress)


def _check(posterior: Fitted | None, data: Data) -> None:
    if posterior is not None:
        raise ValueError(
            "fit(approximation='variational') must be used without prior=...; got the posterior of earlier data; fit "
            "all tasks with approximation='laplace'"
        )
    data.check_repeatable("fit(data=...) must be readable several times for approximation='variational'")


def _begin(
    state: Unfitted | Fitted,
    settings: Settings,
    data: Data,
    options: Variational,
    num_data: int | None,
    microbatch: int,
    krylov: KrylovOptions,
    shared_weights: SharedWeights,
) -> tuple[_Context, Structure | None]:
    """Prepare the model; return also the structure to begin with, if the state has one."""
    model = prepare(state, settings, data, linear=True, microbatch=microbatch, num_data=num_data)
    model = model._replace(data=model.data.in_order())
    num_pairs = krylov.num_probes if settings.hessian_structure == "lanczos" else options.num_samples // 2
    shape = output_shape(model.head, model.data.first)[1:]
    by_samples = are_by_samples(shape[-1], num_pairs)
    _memory(model, settings.hessian_structure, krylov.max_vectors, shape, num_pairs, by_samples).check()
    prior = settings.prior(model.network) if state.prior is None else state.prior
    for _ in model.data:  # the first pass checks the data, and counts them
        pass
    context = _Context(
        model, prior, settings.hessian_structure, options, krylov, shared_weights, microbatch, model.scale(), by_samples
    )
    is_start = isinstance(state, Fitted) and state.bound is not None
    return context, state.structure if is_start else None


def _memory(
    model: Model, structure: str, max_vectors: int, shape: tuple[int, ...], num_pairs: int, by_samples: bool
) -> MemoryEstimate:
    """Memory of the structure, and of the outputs and the sites of all examples if their number is known."""
    estimate = memory_of(model, structure, max_vectors)
    outputs, number_bytes = math.prod(shape), number_type(model.head.params).itemsize
    # Present, proposed and mixed sites, and their factors.
    sites = 4 * outputs * (2 * num_pairs if by_samples else shape[-1])
    per_example = number_bytes * (outputs * num_pairs + sites)
    shrink = f"{estimate.shrink}; or use fewer samples, Variational(num_samples=...), or num_probes for 'lanczos'"
    return estimate._replace(needed=estimate.needed + (model.data.length or 0) * per_example, shrink=shrink)


# --- the iteration ----------------------------------------------------------------------------------------------


def _iterate(context: _Context, structure: Structure | None) -> tuple[_Iterate, list[Progress]]:
    """Improve the sites until the bound changes by less than the tolerance; return the best iterate."""
    options, damping = context.options, FIRST_DAMPING
    mean = np.asarray(ravel(context.model.network.params), np.float64)
    where = None
    if structure is None:
        start = list(without_spread(_posterior(context, mean, None), context.model.data, microbatch=context.microbatch))
        where = sites_of(context.model.likelihood, start, context.by_samples)
        structure = _structure_at(context, where)
    best, progress, change = None, [], math.inf
    for iteration in range(1, options.max_iterations + 1):
        new = _settled(context, mean, structure, where)
        change = math.inf if best is None else new.bound.elbo - best.bound.elbo
        if not math.isfinite(new.bound.elbo):
            change = -math.inf
        record = Progress(
            iteration,
            new.bound.elbo,
            new.bound.expected,
            1.0 if best is None else damping,
            new.settled.steps,
            new.settled.products,
        )
        progress.append(record)
        if options.on_iteration is not None:
            options.on_iteration(record)
        # The sites maximise the bound itself and not its average over finitely many samples, which may fall.
        if best is None or change > -max(options.tolerance, new.bound.sem):
            best, damping = new, min(1.0, GROWTH * damping) if best is not None else damping
        else:
            damping /= 2
        if abs(change) < options.tolerance or damping < LEAST_DAMPING:
            break
        mean = best.settled.mean
        where = best.proposed if best.sites is None else best.sites.towards(best.proposed, damping)
        if iteration < options.max_iterations:
            structure = _structure_at(context, where)
    _warn_unless_settled(options, change, damping, len(progress))
    return best, progress


def _warn_unless_settled(options: Variational, change: float, damping: float, iterations: int) -> None:
    if abs(change) < options.tolerance:
        return
    if damping < LEAST_DAMPING:
        checks.warn(
            f"the variational posterior stopped after {iterations} iterations, as every further step lowered the "
            "evidence lower bound: use more samples (Variational(num_samples=...), or num_probes for 'lanczos'), more "
            "max_vectors, or a larger prior precision"
        )
        return
    checks.warn(
        f"the variational posterior has not converged in {iterations} iterations: the evidence lower bound still "
        f"changed by {change:.3g} nats; raise Variational(max_iterations=...), or fit the result again"
    )


def _settled(context: _Context, mean: Float[np.ndarray, " P"], structure: Structure, where: Sites | None) -> _Iterate:
    """Draw the outputs, find the best mean for the structure, and compute the bound and the sites there."""
    model, options = context.model, context.options
    posterior = _posterior(context, mean, structure)
    draws = draw(
        posterior,
        model.data,
        key=context.krylov.key,
        num_pairs=options.num_samples // 2,
        microbatch=context.microbatch,
    )
    settled = settle(
        model,
        context.prior,
        structure,
        list(draws),
        mean,
        scale=context.scale,
        tolerance=OF_TOLERANCE * options.tolerance,
        max_steps=options.max_newton_steps,
        microbatch=context.microbatch,
    )
    proposed = sites_of(model.likelihood, settled.draws, context.by_samples)
    return _Iterate(settled, structure, where, proposed, _terms(context, settled, structure))


def _structure_at(context: _Context, where: Sites) -> Structure:
    options = {"microbatch": context.microbatch, "shared_weights": context.shared_weights}
    return fit_structure(at_sites(context.model, where), context.prior, context.name, context.krylov, **options)


def _posterior(context: _Context, mean: Float[np.ndarray, " P"], structure: Structure | None) -> Fitted:
    """The posterior as predictions see it; its log likelihood is not known yet."""
    there = with_mean(context.model, mean)
    return Fitted(there.head, there.likelihood, context.prior, structure, None)


def _terms(context: _Context, settled: MeanStep, structure: Structure) -> _Terms:
    """The bound with the divergence that the structure knows."""
    prior, precision = context.prior, float(context.prior.precision)
    expected = context.scale * math.fsum(each.log_likelihood.sum() for each in settled.expected)
    forms = structure.log_determinant(precision)
    groups = np.zeros(size(context.model.network.params), int)
    effective = float(structure.effective_parameters(precision, groups).mean())
    deviation = settled.mean - np.asarray(prior.mean, np.float64)
    quadratic = precision * float(deviation @ (np.asarray(prior.relative, np.float64) * deviation))
    elbo = expected - 0.5 * (quadratic - effective + forms.mean())
    return _Terms(float(elbo), float(expected), context.scale * _standard_error(settled, structure), effective)


def _standard_error(settled: MeanStep, structure: Structure) -> float:
    """Standard error of E log p over the samples."""
    if not isinstance(structure, SampleStructure):  # the samples of all examples are independent
        return math.sqrt(sum(each.squared_error for each in settled.expected))
    totals = sum(each.by_pair for each in settled.expected)
    return float(totals.std(ddof=1) / math.sqrt(len(totals))) if len(totals) > 1 else 0.0


# --- the result -------------------------------------------------------------------------------------------------


def _as_fitted(context: _Context, best: _Iterate, progress: list[Progress]) -> Fitted:
    """Put the bound in the place of the log likelihood: its value with gamma / 2, and its gradient in the mean."""
    model, terms = context.model, best.bound
    there = with_mean(model, best.settled.mean)
    dtype = number_type(model.network.params)
    likelihood_terms = LogLikelihood(
        np.float64(terms.expected + 0.5 * terms.effective),
        jnp.asarray(best.settled.gradient, dtype),
        np.float64(context.scale * _num_targets(model)),
        np.float64(0.0),
    ).check()
    bound = Bound(np.float64(terms.expected), np.float64(terms.sem), np.int64(len(progress)))
    return Fitted(there.network, model.likelihood, context.prior, best.structure, likelihood_terms, bound)


def _num_targets(model: Model) -> float:
    """How many outputs count, at all positions of all examples."""
    shape = output_shape(model.head, model.data.first)[1:]
    total = 0.0
    for batch in model.data:
        weights = np.asarray(model.likelihood.weights_of(jnp.asarray(batch.targets), batch.weights), np.float64)
        total += weights.sum() * math.prod(shape) / math.prod(weights.shape[1:])
    return total
