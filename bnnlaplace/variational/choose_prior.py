"""Choose the prior precision by the evidence, or by the lower bound of a variational posterior."""

import warnings

import jax
import numpy as np
from jaxtyping import Float

from bnnlaplace.core import checks
from bnnlaplace.fitted import Fitted
from bnnlaplace.fitting.optimize_prior import NEGLIGIBLE_FACTOR, Chosen, PriorStructure, by_evidence
from bnnlaplace.predictive.validation import ValidationCurve
from bnnlaplace.prior import accelerated
from bnnlaplace.prior.gaussian import Precision
from bnnlaplace.structure import SampleStructure
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
    """Maximise the bound at the present sites and mean, and fit again, until the precisions have settled.

    While the sites stay, the bound depends on the prior as the evidence of a Laplace approximation does. So each step
    is that of `by_evidence`, and the steps are extrapolated, because they are those of a fixed point.
    """
    checks.count(max_refits, "optimize_prior_precision(max_refits=...)", advice="try 10")
    before = None
    for _ in range(max_refits):
        now = chosen
        with warnings.catch_warnings():
            # If ratios change, "lanczos" is fitted again within the step, too.
            warnings.filterwarnings("ignore", "the prior precisions have not settled")
            chosen = by_evidence(now, prior_structure, optimize_sigma_noise=optimize_sigma_noise, max_refits=1)
        change = float(np.abs(np.log(_precisions(chosen.fitted) / _precisions(now.fitted))).max())
        if chosen.refit is None:
            remedy = (
                "pass optimize_prior_precision(refit=lambda la: la.fit(data, key=key, approximation='variational'))"
            )
            _warn_of_old_sites(change, f"{remedy} to settle both")
            return chosen
        is_fitted = prior_structure == "layerwise" and isinstance(chosen.fitted.structure, SampleStructure)
        if not is_fitted:
            step = _numbers(now.settings.prior_precision), _numbers(chosen.settings.prior_precision)
            if before is not None and len(before[0]) == len(step[0]) == len(step[1]):
                chosen = chosen.at(_like(chosen.settings.prior_precision, accelerated(*step, before)))
            chosen, before = chosen.fitted_again(), step
        if change <= np.log(NEGLIGIBLE_FACTOR):
            return chosen
    checks.warn(
        f"the prior precisions have not settled after {max_refits} fits: the last step changed one by a factor of "
        f"{np.exp(change):.2g}; raise max_refits"
    )
    return chosen


def _numbers(precision: Precision) -> Float[np.ndarray, " g"]:
    """All numbers of a prior precision as the user states it: one, one for each group, or one for each weight."""
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(precision)])


def _like(precision: Precision, numbers: Float[np.ndarray, " g"]) -> Precision:
    """The prior precision with other numbers, in the same form."""
    leaves, structure = jax.tree.flatten(precision)
    parts = np.split(numbers, np.cumsum([np.size(leaf) for leaf in leaves])[:-1])
    pairs = zip(leaves, parts, strict=True)
    return structure.unflatten([part.reshape(np.shape(leaf)) if np.ndim(leaf) else part.item() for leaf, part in pairs])


def _precisions(fitted: Fitted) -> Float[np.ndarray, "..."]:
    return float(fitted.prior.precision) * np.atleast_1d(np.asarray(fitted.prior.relative, np.float64))


def _warn_of_old_sites(change: float, remedy: str) -> None:
    if change > np.log(NEGLIGIBLE_FACTOR):
        checks.warn(
            f"the prior precision has moved by a factor of {np.exp(change):.2g}, and the averaged curvature is still "
            f"that of the former one; {remedy}"
        )
