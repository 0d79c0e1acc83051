"""Choose the prior precision by the evidence, or by the lower bound of a variational posterior."""

import jax
import numpy as np
from jaxtyping import Float

from bnnlaplace.core import checks
from bnnlaplace.core.tree import ravel
from bnnlaplace.fitted import Fitted
from bnnlaplace.fitting.optimize_prior import (
    NEGLIGIBLE_FACTOR,
    Chosen,
    PriorStructure,
    by_evidence,
    check_evidence_options,
)
from bnnlaplace.predictive.validation import ValidationCurve
from bnnlaplace.prior.grouping import Grouping
from bnnlaplace.structure import SampleStructure
from bnnlaplace.variational import prior_step
from bnnlaplace.variational.options import Variational
from bnnlaplace.variational.saturation import training_fit, warn_if_saturated


def choose_prior(
    chosen: Chosen, prior_structure: PriorStructure | None, *, optimize_sigma_noise: bool, max_refits: int
) -> Chosen:
    """Maximise the evidence or the lower bound. Parameters are those of `fitting.optimize_prior.by_evidence`.

    A Laplace approximation is compared with a few training examples afterwards, and a warning says if it does not fit
    them.
    """
    if chosen.fitted.bound is not None:
        return _by_bound(chosen, prior_structure, optimize_sigma_noise, max_refits)
    best = by_evidence(chosen, prior_structure, optimize_sigma_noise=optimize_sigma_noise, max_refits=max_refits)
    sample, is_gaussian = best.fitted.sample.data, best.fitted.likelihood.sigma_noise is not None
    if sample is not None and not is_gaussian:  # the posterior of a regression is the Gaussian at the mode
        warn_if_saturated(training_fit(best.fitted, sample))
    return best


def by_validation(chosen: Chosen, curve: ValidationCurve) -> Chosen:
    """Take the precision with the lowest NLL on validation data, with mean and curvature as they are."""
    factor = curve.choose() / float(chosen.fitted.prior.precision)
    if chosen.fitted.bound is not None:
        remedy = "the NLL of each precision is that of a fit at another one; fit at each of them, and compare these"
        _warn_of_old_sites(abs(float(np.log(factor))), remedy)
    return chosen.times(factor)


def _by_bound(
    chosen: Chosen, prior_structure: PriorStructure | None, optimize_sigma_noise: bool, max_refits: int
) -> Chosen:
    """Maximise the bound: fit again after each step of the precisions, until the next one promises little."""
    if chosen.refit is None or optimize_sigma_noise:
        return _at_present_sites(chosen, prior_structure, optimize_sigma_noise)
    check_evidence_options(chosen, prior_structure, max_refits)
    if prior_structure == "scalar" and not chosen.fitted.prior.is_isotropic:
        chosen = chosen.at_ratios(float(chosen.fitted.prior.precision))
    grouping, move = _grouping(chosen, prior_structure), None
    for number in range(max_refits + 1):
        fitted = chosen.fitted
        mean = np.asarray(ravel(fitted.network.params), np.float64)
        then = prior_step.step(grouping, fitted.prior, fitted.structure, mean, move, np.inf)
        if not then.pays(Variational.tolerance):  # as fits have by default
            prior_step.warn_of_bounds(grouping, fitted.prior, fitted.structure)
            return chosen
        if number < max_refits:
            move, precision = then, grouping.as_given(then.after)
            needs_fit = prior_structure in ("layerwise", "diag") and isinstance(fitted.structure, SampleStructure)
            chosen = chosen.at_ratios(precision) if needs_fit else chosen.at(precision).fitted_again()
    checks.warn(
        f"the prior precisions have not settled after {max_refits} fits: the next step would change one by a factor of "
        f"{then.factor:.2g}; raise max_refits"
    )
    return chosen


def _at_present_sites(chosen: Chosen, prior_structure: PriorStructure | None, optimize_sigma_noise: bool) -> Chosen:
    """Maximise the bound as if sites and mean stayed, and say how far it went: they follow the precision."""
    options = {"optimize_sigma_noise": optimize_sigma_noise, "max_refits": 1}
    best = by_evidence(chosen, prior_structure, **options)
    change = float(np.abs(np.log(_precisions(best.fitted) / _precisions(chosen.fitted))).max())
    remedy = "pass optimize_prior_precision(refit=lambda la: la.fit(data, key=key, approximation=...))"
    _warn_of_old_sites(change, f"{remedy} to settle both")
    return best


def _grouping(chosen: Chosen, prior_structure: PriorStructure | None) -> Grouping:
    """Which weights share a precision; without a structure they share a factor, and their ratios stay."""
    params = chosen.fitted.network.params
    if prior_structure is not None:
        return Grouping.of(prior_structure, params, chosen.settings.prior_groups)
    whole = Grouping.of("scalar", params, chosen.settings.prior_groups)
    given, mean = chosen.settings.prior_precision, whole.precisions(chosen.fitted.prior)[0]
    return whole._replace(as_given=lambda after: jax.tree.map(lambda each: each * float(after[0] / mean), given))


def _precisions(fitted: Fitted) -> Float[np.ndarray, "..."]:
    return float(fitted.prior.precision) * np.atleast_1d(np.asarray(fitted.prior.relative, np.float64))


def _warn_of_old_sites(change: float, remedy: str) -> None:
    if change > np.log(NEGLIGIBLE_FACTOR):
        checks.warn(
            f"the prior precision has moved by a factor of {np.exp(change):.2g}, and the averaged curvature is still "
            f"that of the former one; {remedy}"
        )
