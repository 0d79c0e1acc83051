"""The iteration of the variational fit: draw the outputs, settle the mean, average the curvature, fit its structure."""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core import checks
from bnnlaplace.core.tree import number_type, ravel, size
from bnnlaplace.curvature.kronecker import SharedWeights
from bnnlaplace.fitted import Fitted
from bnnlaplace.fitting.fit import fit_structure
from bnnlaplace.fitting.krylov import KrylovOptions
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.prior import Prior, range_above
from bnnlaplace.prior.grouping import Grouping
from bnnlaplace.structure import Structure
from bnnlaplace.variational import prior_step
from bnnlaplace.variational.draws import Draws, draw, without_spread
from bnnlaplace.variational.expectations import Expectations, expectations
from bnnlaplace.variational.mean import MeanStep, settle, with_mean
from bnnlaplace.variational.options import Progress, Variational
from bnnlaplace.variational.preconditioner import preconditioner
from bnnlaplace.variational.sites import Sites, at_sites, sites_of

# The first step of the sites, by how much it grows after one that raised the bound, how far it shrinks where the bound
# falls within its error, and the smallest one before the fit gives up.
FIRST_DAMPING, GROWTH, CAUTIOUS_DAMPING, LEAST_DAMPING = 0.7, 1.25, 0.35, 1 / 64
# Newton's method ends if it gains less than this part of the tolerance.
OF_TOLERANCE = 0.1
# A prior precision has settled if it moves by less than this factor.
SETTLED_FACTOR = 1.1


class Context(NamedTuple):
    """All that stays the same from the first iteration to the last.

    Attributes
    ----------
    model
        The linearised network and its data, which are checked to come in one order.
    structure_name
        The structure that the curvature gets.
    options, krylov, shared_weights, microbatch
        As for `Laplace.fit`.
    scale
        (all training examples) / (examples in the data).
    num_pairs
        Half of the samples of the outputs.
    by_samples
        Whether sites are samples of the outputs rather than matrices.
    grouping
        Which weights share a prior precision that is to be chosen; None if the prior stays.
    """

    model: Model
    structure_name: str
    options: Variational
    krylov: KrylovOptions
    shared_weights: SharedWeights
    microbatch: int
    scale: float
    num_pairs: int
    by_samples: bool
    grouping: Grouping | None

    @property
    def keys(self) -> tuple[Array, Array]:
        """The keys of the samples of the outputs: those of the fit, and those that its bound is averaged over."""
        return tuple(jax.random.split(self.krylov.key))


class Terms(NamedTuple):
    """The evidence lower bound and its parts, in nats.

    Attributes
    ----------
    elbo
        The bound.
    expected
        E log p(D | f).
    sem
        The standard error of that over the samples of the outputs.
    effective
        gamma = tr G (G + P0)^-1.
    """

    elbo: float
    expected: float
    sem: float
    effective: float


class Iterate(NamedTuple):
    """A posterior on the way.

    Attributes
    ----------
    settled
        Its mean, and the outputs under it.
    structure, prior
        Its curvature, and the prior in whose coordinates that is.
    sites
        What the structure was fitted to; None at the beginning if that is not known.
    proposed
        The sites that its own outputs have.
    terms
        Its bound.
    """

    settled: MeanStep
    structure: Structure
    prior: Prior
    sites: Sites | None
    proposed: Sites
    terms: Terms


def iterate(context: Context, prior: Prior, structure: Structure | None) -> tuple[Iterate, list[Progress]]:
    """Improve the sites until the bound changes by less than the tolerance; return the posterior at its end.

    Parameters
    ----------
    context
        The model and the options.
    prior, structure
        The prior and the structure to begin with. Without one it begins at the curvature of the weights as they are.
    """
    options, damping = context.options, FIRST_DAMPING
    mean, sites = np.asarray(ravel(context.model.network.params), np.float64), None
    if structure is None:
        posterior = _posterior(context, mean, prior, None)
        start = without_spread(posterior, context.model.data, microbatch=context.microbatch)
        sites = sites_of(context.model.likelihood, list(start), context.by_samples)
        structure = _structure_at(context, sites, prior)
    current = best = None
    progress, change, move, ratio = [], math.inf, None, 1.0
    for iteration in range(1, options.max_iterations + 1):
        new = _settled(context, mean, prior, structure, sites)
        elbo = new.terms.elbo if math.isfinite(new.terms.elbo) else -math.inf
        change = math.inf if current is None else elbo - current.terms.elbo
        progress.append(_progress(iteration, new, 1.0 if current is None else damping))
        if options.on_iteration is not None:
            options.on_iteration(progress[-1])
        # The sites maximise the bound itself and not its average over finitely many samples, which may fall.
        accepted = current is None or elbo > best.terms.elbo - max(options.tolerance, new.terms.sem)
        if not accepted:
            damping /= 2
        elif current is not None:  # a fall within the error may be the sign of a step that was too long
            damping = min(1.0, GROWTH * damping) if change > 0 else max(damping / 2, min(damping, CAUTIOUS_DAMPING))
        current = new if accepted else current
        best = new if best is None or elbo > best.terms.elbo else best
        has_settled = accepted and abs(change) < options.tolerance and ratio < SETTLED_FACTOR
        gives_up = damping < LEAST_DAMPING
        if has_settled or gives_up or iteration == options.max_iterations:
            break
        mean, prior = current.settled.mean, current.prior
        if context.grouping is not None and accepted:
            prior, ratio, move = _moved(context, current, move)
        sites = current.proposed
        if current.sites is not None:
            sites = current.sites.towards(sites, damping)
        structure = _structure_at(context, sites, prior)
    if not has_settled:
        _warn_unless_settled(change, ratio, gives_up, len(progress))
    best = current if has_settled else best
    if context.grouping is not None:
        _warn_of_bounds(context.grouping, best)
        if move is not None and move.is_held:
            checks.warn(
                "the lower bound prefers a smaller prior precision, at which the Krylov decomposition has not "
                f"converged with max_vectors={context.krylov.max_vectors}; the smallest at which it has was used; "
                "raise max_vectors, or state the prior precision"
            )
    return _with_fresh_samples(context, best), progress


def _progress(iteration: int, new: Iterate, damping: float) -> Progress:
    settled, terms = new.settled, new.terms
    precision = float(new.prior.precision)
    return Progress(iteration, terms.elbo, terms.expected, precision, damping, settled.steps, settled.products)


def _moved(context: Context, best: Iterate, move: prior_step.Move | None) -> tuple[Prior, float, prior_step.Move]:
    """The prior after a step towards the maximum of the bound, and by which factor it has moved."""
    grouping = context.grouping
    before = grouping.precisions(best.prior)
    posterior = best.prior, best.structure, best.settled.mean
    after, move = prior_step.step(grouping, *posterior, move, context.krylov.max_vectors)
    ratio = float(np.exp(np.abs(np.log(after / before)).max()))
    dtype = number_type(context.model.network.params)
    return prior_step.prior_with(grouping, after, best.prior.mean, dtype), ratio, move


def _warn_unless_settled(change: float, ratio: float, gives_up: bool, iterations: int) -> None:
    """Say why the iteration ended before the bound had settled, and what to change."""
    if iterations == 1:
        checks.warn(
            "the variational posterior was stopped after one iteration, which cannot tell whether it has converged; "
            "raise Variational(max_iterations=...)"
        )
        return
    if gives_up:
        checks.warn(
            f"the variational posterior stopped after {iterations} iterations, as further steps lowered the evidence "
            "lower bound; its best one is kept. Use more samples (Variational(num_samples=...)), more probes and "
            "max_vectors for 'lanczos', or a larger prior precision"
        )
        return
    of_prior = f", and a prior precision by a factor of {ratio:.2g}" if ratio >= SETTLED_FACTOR else ""
    checks.warn(
        f"the variational posterior has not converged in {iterations} iterations: the evidence lower bound still "
        f"changed by {change:.3g} nats{of_prior}; raise Variational(max_iterations=...), or fit the result again"
    )


def _warn_of_bounds(grouping: Grouping, best: Iterate) -> None:
    """Warn of groups whose precision the bound does not determine."""
    limits = np.log(range_above(best.structure.resolution()))
    precisions = grouping.precisions(best.prior)
    at_bound = np.abs(np.log(precisions)[:, None] - limits).min(axis=1) < 1e-2
    grouping.warn_of_bounds("the lower bound", precisions, at_bound)


def _settled(
    context: Context, mean: Float[np.ndarray, " P"], prior: Prior, structure: Structure, sites: Sites | None
) -> Iterate:
    """Draw the outputs, find the best mean for the structure, and compute the bound and the sites there."""
    model, options = context.model, context.options
    posterior = _posterior(context, mean, prior, structure)
    draws = list(_draws(context, posterior, context.keys[0]))
    settled = settle(
        model,
        prior,
        partial(_preconditioner, context, prior, structure),
        draws,
        mean,
        scale=context.scale,
        tolerance=OF_TOLERANCE * options.tolerance,
        max_steps=0 if options.fixed_mean else options.max_newton_steps,
        microbatch=context.microbatch,
    )
    proposed = sites_of(model.likelihood, settled.draws, context.by_samples)
    terms = _terms(context, settled.expected, settled.mean, prior, structure)
    return Iterate(settled, structure, prior, sites, proposed, terms)


def _preconditioner(context: Context, prior: Prior, structure: Structure, there: Model) -> Structure:
    options = {"scale": context.scale, "microbatch": context.microbatch}
    return preconditioner(structure, there, prior, context.krylov.key, **options)


def _structure_at(context: Context, sites: Sites, prior: Prior) -> Structure:
    options = {"microbatch": context.microbatch, "shared_weights": context.shared_weights}
    return fit_structure(at_sites(context.model, sites), prior, context.structure_name, context.krylov, **options)


def _posterior(context: Context, mean: Float[np.ndarray, " P"], prior: Prior, structure: Structure | None) -> Fitted:
    """The posterior as predictions see it; its log likelihood is not known yet."""
    there = with_mean(context.model, mean)
    return Fitted(there.head, there.likelihood, prior, structure, None)


def _draws(context: Context, posterior: Fitted, key: Array) -> Iterator[Draws]:
    model = context.model
    options = {"num_pairs": context.num_pairs, "microbatch": context.microbatch, "kept": model.rows}
    return draw(posterior, model.data, key=key, **options)


def _with_fresh_samples(context: Context, best: Iterate) -> Iterate:
    """Average the bound anew: the fit chose mean and sites by its own samples, which flatter it."""
    posterior = _posterior(context, best.settled.mean, best.prior, best.structure)
    draws = _draws(context, posterior, context.keys[1])
    averages = [expectations(context.model.likelihood, each) for each in draws]
    return best._replace(terms=_terms(context, averages, best.settled.mean, best.prior, best.structure))


def _terms(
    context: Context,
    averages: list[Expectations],
    mean: Float[np.ndarray, " P"],
    prior: Prior,
    structure: Structure,
) -> Terms:
    """The bound with the divergence that the structure knows."""
    precision = float(prior.precision)
    expected = context.scale * math.fsum(each.log_likelihood.sum() for each in averages)
    forms = structure.log_determinant(precision)
    groups = np.zeros(size(context.model.network.params), int)
    effective = float(structure.effective_parameters(precision, groups).mean())
    deviation = mean - np.asarray(prior.mean, np.float64)
    quadratic = precision * prior.squared_norm(deviation)
    elbo = expected - 0.5 * (quadratic - effective + forms.mean())
    # The noise of covariances that probes estimate is not in it: to first order gamma has the same, and it cancels.
    sem = context.scale * math.sqrt(sum(each.squared_error for each in averages))
    return Terms(float(elbo), float(expected), sem, effective)
