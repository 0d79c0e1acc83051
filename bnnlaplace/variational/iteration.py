"""The iteration of the variational fit: draw the outputs, settle the mean, average the curvature, fit its structure."""

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core import checks
from bnnlaplace.core.tree import number_type, ravel
from bnnlaplace.curvature.kronecker import SharedWeights
from bnnlaplace.fitted import Fitted
from bnnlaplace.fitting.fit import fit_structure
from bnnlaplace.fitting.krylov import KrylovOptions
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.prior import Prior
from bnnlaplace.prior.grouping import Grouping
from bnnlaplace.structure import SampleStructure, Structure
from bnnlaplace.structure.finite import NotFiniteError
from bnnlaplace.variational import prior_step
from bnnlaplace.variational.bound import OVERFLOWED, EffectiveParameters, Terms, terms_of
from bnnlaplace.variational.draws import Draws, draw, without_spread
from bnnlaplace.variational.expectations import expectations
from bnnlaplace.variational.mean import MeanStep, settle, with_mean
from bnnlaplace.variational.mixing import Past
from bnnlaplace.variational.newton import Newton
from bnnlaplace.variational.newton_outputs import Kernel, OutputNewton
from bnnlaplace.variational.newton_weights import WeightNewton
from bnnlaplace.variational.options import Progress, Variational
from bnnlaplace.variational.preconditioner import preconditioner
from bnnlaplace.variational.promise import promised_gain
from bnnlaplace.variational.sites import Sites, at_sites, factors_of, sites_of

# The first step of the sites, by how much it grows after one that raised the bound, how far it shrinks where the bound
# falls within its error, and the smallest one before the fit gives up.
FIRST_DAMPING, GROWTH, CAUTIOUS_DAMPING, LEAST_DAMPING = 0.7, 1.25, 0.35, 1 / 64
# Newton's method ends if it gains less than this part of the tolerance.
OF_TOLERANCE = 0.1
# The bound has settled if a step changes it by less than the tolerance, and the next one promises less than this many
# times the tolerance. A small change alone may be that from one side of the maximum to the other.
PROMISE = 4
# The shortest step that is asked. One of 1/50 gains little wherever it is.
LEAST_PROMISING = 0.25
# The mean is fitted to the samples if fresh ones lower the bound by more than so many standard errors.
FITTED_TO_SAMPLES = 3


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
    kernel
        The products of the rows of the Jacobian, if Newton steps of the mean are found in the space of the outputs.
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
    kernel: Kernel | None

    @property
    def keys(self) -> tuple[Array, Array]:
        """The keys of the samples of the outputs: those of the fit, and those that its bound is averaged over."""
        return tuple(jax.random.split(self.krylov.key))


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
    has_overflowed
        Whether the curvature of a step from here was not finite.
    """

    settled: MeanStep
    structure: Structure
    prior: Prior
    sites: Sites | None
    proposed: Sites
    terms: Terms
    has_overflowed: bool = False


def iterate(context: Context, prior: Prior, structure: Structure | None) -> tuple[Iterate, list[Progress]]:
    """Improve the sites until the bound changes by less than the tolerance; return the posterior at its end.

    Parameters
    ----------
    context
        The model and the options.
    prior, structure
        The prior and the structure to begin with. Without one it begins at the curvature of the weights as they are.

    Raises
    ------
    ValueError
        If no posterior that was tried has a finite bound.
    """
    options, damping, move = context.options, FIRST_DAMPING, None
    current = best = _first(context, prior, structure)
    past = _past_with(Past(), current)
    progress, change, is_settled, is_held, has_restarted = [], math.inf, False, False, False
    _report(context, progress, current, 1.0)
    # A step may not fall below the best bound at its prior. The sites of a fitted posterior are not known, so that the
    # step from there cannot be shortened: the iteration goes on from where it leads, the first bound to keep.
    reference = OVERFLOWED if current.sites is None else current.terms
    prior = current.prior
    while not is_settled and damping >= LEAST_DAMPING and len(progress) < options.max_iterations:
        sites, share = _next_sites(context, current, past, damping)
        new = _step(context, current, prior, sites)
        _report(context, progress, new, share)
        # The sites maximise the bound itself and not its average over finitely many samples and probes, which may fall.
        noise = max(options.tolerance, current.terms.sem, new.terms.noise_beside(reference))
        if not new.terms.elbo > reference.elbo - noise:
            # A step that was extrapolated too far says nothing about one to the averages: such are tried from now on.
            damping, past = (damping, past.given_up()) if past.is_mixed else (damping / 2, past)
            current = current._replace(has_overflowed=new.has_overflowed)
            if damping < LEAST_DAMPING and not has_restarted and math.isfinite(best.terms.elbo):
                # A fit of the result again may get past what has stopped this one.
                has_restarted, damping, past = True, FIRST_DAMPING, past.forgotten()
                current, reference, prior = best._replace(sites=None), OVERFLOWED, best.prior
            continue
        change, prior_before = new.terms.elbo - current.terms.elbo, current.prior
        enough = max(options.tolerance, new.terms.noise_beside(current.terms))
        # A fall within the error may be the sign of a step that was too long.
        damping = min(1.0, GROWTH * damping) if change > 0 else max(damping / 2, min(damping, CAUTIOUS_DAMPING))
        current, past = new, _past_with(past, new)
        reference = new.terms if new.terms.elbo > reference.elbo else reference
        best = new if new.terms.elbo > best.terms.elbo else best
        # A step to another prior changes more than the sites.
        is_settled = new.prior is prior_before and abs(change) < enough
        is_settled = is_settled and _promise(context, new, past, damping) < PROMISE * enough
        if is_settled and context.grouping is not None:
            # The derivative of the bound in the prior is known where the rest has settled.
            then = _move(context, current, move)
            is_held = then.is_held
            if then.pays(options.tolerance):
                move, is_settled, reference = then, False, OVERFLOWED
                damping, past, prior = max(damping, FIRST_DAMPING), past.forgotten(), _moved(context, current, move)
    if not math.isfinite(best.terms.elbo):
        raise _overflow(context, best.prior)
    if not is_settled:
        _warn_unless_settled(change, move, damping < LEAST_DAMPING, len(progress))
    elif current.terms.elbo > best.terms.elbo - max(enough, best.terms.sem, best.terms.noise_beside(current.terms)):
        best = current
    if context.grouping is not None:
        prior_step.warn_of_bounds(context.grouping, best.prior, best.structure)
        if is_held:
            checks.warn(
                "the lower bound prefers a smaller prior precision, at which the Krylov decomposition has not "
                f"converged with max_vectors={context.krylov.max_vectors}; the smallest at which it has was used; "
                "raise max_vectors, or state the prior precision"
            )
    fresh = _with_fresh_samples(context, best)
    _warn_of_mean(context, best, fresh.terms)
    return fresh, progress


def _first(context: Context, prior: Prior, structure: Structure | None) -> Iterate:
    """The posterior with which the iteration begins."""
    mean, sites = np.asarray(ravel(context.model.network.params), np.float64), None
    if structure is None:
        posterior = _posterior(context, mean, prior, None)
        start = without_spread(posterior, context.model.data, microbatch=context.microbatch)
        sites = sites_of(context.model.likelihood, list(start), context.by_samples)
        structure = _structure_at(context, sites, prior)
    try:
        return _settled(context, mean, prior, structure, sites)
    except np.linalg.LinAlgError:
        raise _overflow(context, prior) from None


def _past_with(past: Past, iterate: Iterate) -> Past:
    return past if iterate.sites is None else past.with_step(iterate.sites, iterate.proposed)


def _next_sites(context: Context, current: Iterate, past: Past, damping: float) -> tuple[Sites, float]:
    """Choose sites on the way from those of an iterate to the ones it proposes, and say how far that is.

    If the last step from here overflowed, sites are averages over samples that are drawn towards the mean. Where the
    likelihood grows exponentially its average over all samples may be infinite, and so would be any share of that.
    """
    if current.has_overflowed:
        nearer = [each._replace(deviations=damping * each.deviations) for each in current.settled.draws]
        return sites_of(context.model.likelihood, nearer, context.by_samples), damping
    if current.sites is None:
        return current.proposed, 1.0
    return past.next(current.sites, current.proposed, damping), damping


def _promise(context: Context, current: Iterate, past: Past, damping: float) -> float:
    """Estimate how many nats the next step of the sites gains, or one that is not much shorter than a whole one."""
    sites = current.sites, current.proposed, _next_sites(context, current, past, max(damping, LEAST_PROMISING))[0]
    posterior = context.model, current.prior, current.structure
    options = {"scale": context.scale, "microbatch": context.microbatch}
    return promised_gain(*posterior, sites, context.keys[1], **options)


def _step(context: Context, current: Iterate, prior: Prior, sites: Sites) -> Iterate:
    """Fit the curvature to the sites, and settle the mean."""
    try:
        if sites.are_finite():
            structure = _structure_at(context, sites, prior)
            new = _settled(context, current.settled.mean, prior, structure, sites)
            # Without sites, only samples nearer to the mean make a shorter step.
            is_lost = current.sites is None and not math.isfinite(new.terms.elbo)
            return new._replace(has_overflowed=is_lost)
    except (np.linalg.LinAlgError, NotFiniteError):
        pass
    no_steps = current.settled._replace(steps=0, products=0)
    return current._replace(settled=no_steps, terms=OVERFLOWED, has_overflowed=True)


def _report(context: Context, progress: list[Progress], new: Iterate, damping: float) -> None:
    settled, terms = new.settled, new.terms
    numbers = terms.elbo, terms.expected, float(new.prior.precision), damping, settled.steps, settled.products
    progress.append(Progress(len(progress) + 1, *numbers))
    if context.options.on_iteration is not None:
        context.options.on_iteration(progress[-1])


def _overflow(context: Context, prior: Prior) -> ValueError:
    """The error for a fit without a finite bound."""
    return ValueError(
        "fit(approximation='variational') must find a posterior with a finite evidence lower bound; got none, as the "
        f"log likelihood of {context.model.likelihood.name!r} is not finite at samples of the outputs at prior "
        f"precision {float(prior.precision):.3g}; use a larger prior precision, or compute in float64, if it overflows"
    )


def _move(context: Context, current: Iterate, last: prior_step.Move | None) -> prior_step.Move:
    """The step of the prior towards the maximum of the bound."""
    posterior = current.prior, current.structure, current.settled.mean
    return prior_step.step(context.grouping, *posterior, last, context.krylov.max_vectors)


def _moved(context: Context, current: Iterate, move: prior_step.Move) -> Prior:
    dtype = number_type(context.model.network.params)
    return prior_step.prior_with(context.grouping, move.after, current.prior.mean, dtype)


def _warn_unless_settled(change: float, move: prior_step.Move | None, gives_up: bool, iterations: int) -> None:
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
    of_prior = "" if move is None else f", and a prior precision by a factor of {move.factor:.2g}"
    checks.warn(
        f"the variational posterior has not converged in {iterations} iterations: the evidence lower bound still "
        f"changed by {change:.3g} nats{of_prior}; raise Variational(max_iterations=...), or fit the result again"
    )


def _warn_of_mean(context: Context, best: Iterate, fresh: Terms) -> None:
    """Warn if the mean has not settled, or the bound is much lower with fresh samples than with those of the fit."""
    if not best.settled.is_settled:
        checks.warn(
            f"the mean of the variational posterior has not settled in {context.options.max_newton_steps} Newton "
            "steps; raise Variational(max_newton_steps=...), or use a larger prior precision"
        )
    own = best.terms
    gap = own.elbo - fresh.elbo
    if math.isfinite(gap) and gap > max(context.options.tolerance, FITTED_TO_SAMPLES * math.hypot(own.sem, fresh.sem)):
        checks.warn(
            f"the mean of the variational posterior is fitted to its {2 * context.num_pairs} samples of the outputs: "
            f"with fresh ones the evidence lower bound is lower by {gap:.3g} nats; use more of them, such as "
            f"Variational(num_samples={8 * context.num_pairs})"
        )


@np.errstate(over="ignore", invalid="ignore")  # a bound that is not finite is refused
def _settled(
    context: Context, mean: Float[np.ndarray, " P"], prior: Prior, structure: Structure, sites: Sites | None
) -> Iterate:
    """Draw the outputs, find the best mean for the structure, and compute the bound and the sites there."""
    model, options = context.model, context.options
    posterior = _posterior(context, mean, prior, structure)
    gamma = _effective_parameters(context, structure, sites)
    draws = list(_draws(context, posterior, context.keys[0], sites, gamma))
    settled = settle(
        model,
        _newton(context, mean, prior, structure),
        draws,
        scale=context.scale,
        tolerance=OF_TOLERANCE * options.tolerance,
        max_steps=0 if options.fixed_mean else options.max_newton_steps,
    )
    proposed = sites_of(model.likelihood, settled.draws, context.by_samples)
    terms = terms_of(settled.expected, settled.mean, prior, structure, gamma, scale=context.scale)
    return Iterate(settled, structure, prior, sites, proposed, terms)


def _newton(context: Context, mean: Float[np.ndarray, " P"], prior: Prior, structure: Structure) -> Newton:
    options = {"scale": context.scale, "microbatch": context.microbatch}
    if context.kernel is not None:
        return OutputNewton(context.model, prior, context.kernel.of(context.model, prior), mean, **options)
    inverse_at = partial(_preconditioner, context, prior, structure)
    return WeightNewton(context.model, prior, inverse_at, mean, **options)


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


def _draws(
    context: Context, posterior: Fitted, key: Array, sites: Sites | None, gamma: EffectiveParameters
) -> Iterator[Draws]:
    model = context.model
    options = {"num_pairs": context.num_pairs, "microbatch": context.microbatch, "kept": model.rows}
    if sites is not None and isinstance(posterior.structure, SampleStructure):
        options["factors"] = factors_of(model, sites, context.scale, microbatch=context.microbatch)
    options["read_roots"] = gamma.read if gamma.is_read else None
    return draw(posterior, model.data, key=key, **options)


def _with_fresh_samples(context: Context, best: Iterate) -> Iterate:
    """Average the bound anew: the fit chose mean and sites by its own samples, which flatter it."""
    posterior = _posterior(context, best.settled.mean, best.prior, best.structure)
    gamma = _effective_parameters(context, best.structure, best.sites)
    draws = _draws(context, posterior, context.keys[1], best.sites, gamma)
    averages = [expectations(context.model.likelihood, each) for each in draws]
    posterior = best.settled.mean, best.prior, best.structure
    terms = terms_of(averages, *posterior, gamma, scale=context.scale)
    return best._replace(terms=terms)


def _effective_parameters(context: Context, structure: Structure, sites: Sites | None) -> EffectiveParameters:
    return EffectiveParameters(context.model, structure, sites, scale=context.scale, microbatch=context.microbatch)
