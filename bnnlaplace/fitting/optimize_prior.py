"""Maximise the evidence over prior precisions, and over the noise of a regression, for a fitted posterior."""

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from bnnlaplace.core import checks
from bnnlaplace.core.types import NotAModeWarning
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.fitted import Fitted, Settings, Unfitted
from bnnlaplace.prior import accelerated, fixed_point_step, grouped_optimum, optimum, range_above
from bnnlaplace.prior.gaussian import Precision, is_scalar
from bnnlaplace.prior.grouping import Grouping
from bnnlaplace.structure import SampleStructure

PriorStructure = Literal["scalar", "layerwise", "diag"]

# Steps of the fixed point end if the largest one changes a precision by less than this factor, or than its error.
NEGLIGIBLE_FACTOR = 1.1
# Log likelihoods at the same weights and data agree to this, in 16 bits and in other microbatches too.
_SAME_VALUE = 1e-2


class Chosen(NamedTuple):
    """A fitted posterior, with the settings in which its prior precision is stated as a user states it.

    Attributes
    ----------
    fitted
        The posterior under the prior.
    settings
        Its prior precision is one number, a number for each group, or a number for each weight.
    refit
        The user's function from an unfitted model to the fitted one, for a structure that needs it if ratios of
        precisions change. None if the user gave none.
    wrap
        Makes the user's object, a `Laplace`, of the two records.
    """

    fitted: Fitted
    settings: Settings
    refit: Callable[[Any], Any] | None = None
    wrap: Callable[[Unfitted | Fitted, Settings], Any] | None = None

    def at(self, precision: Precision) -> "Chosen":
        """The same curvature at another precision. Raises ValueError if it depends on ratios that change."""
        settings = self.settings.at(precision)
        return self._replace(fitted=self.fitted.at(settings.prior(self.fitted.network)), settings=settings)

    def times(self, factor: float) -> "Chosen":
        """The same curvature with all precisions multiplied by a factor."""
        self.fitted.check_known("the best prior precision")
        prior = self.fitted.prior
        scaled = jax.tree.map(lambda value: value * factor, self.settings.prior_precision)
        fitted = self.fitted.at(prior._replace(precision=float(prior.precision) * factor))
        return self._replace(fitted=fitted, settings=self.settings.at(scaled))

    def at_ratios(self, precision: Precision) -> "Chosen":
        """Move to a precision with other ratios between weights, and fit again if the structure needs that."""
        if not isinstance(self.fitted.structure, SampleStructure):
            return self.at(precision)
        if self.refit is None:
            raise ValueError(
                "optimize_prior_precision(refit=...) must be given for 'lanczos' if ratios of prior precisions change, "
                f"because its space depends on them; pass {_refit_like(self.fitted)}, or use 'diag', 'kron' or 'full'"
            )
        settings = self.settings.at(precision)
        return self._refitted(Unfitted.of(self.fitted.network, self.fitted.likelihood, settings), settings)

    def fitted_again(self) -> "Chosen":
        """Fit the posterior again, from where it is now."""
        return self._refitted(self.fitted, self.settings)

    def _refitted(self, state: Unfitted | Fitted, settings: Settings) -> "Chosen":
        """Call the user's function, and check what it returns."""
        with warnings.catch_warnings():
            # The user asked to move the prior precision at fixed weights, and knows that they leave the mode.
            warnings.simplefilter("ignore", NotAModeWarning)
            refitted = self.refit(self.wrap(state, settings))
        if not isinstance(getattr(refitted, "state", None), Fitted):
            raise ValueError(
                "optimize_prior_precision(refit=...) must return the fitted Laplace; got "
                f"{type(refitted).__name__}; pass {_refit_like(self.fitted)}"
            )
        _check_refitted(self._replace(settings=settings), refitted.fitted, refitted.settings)
        return self._replace(fitted=refitted.fitted, settings=refitted.settings)

    def at_best_noise(self, log_joint: LogJoint, q: float) -> tuple["Chosen", float]:
        """Move to the best noise at q, and return the factor by which its variance has changed."""
        factor = float(log_joint.noise_factor(q))
        if log_joint.num_targets is None:
            return self, factor
        sigma_noise = self.fitted.likelihood.sigma_noise * np.sqrt(factor)
        return self._replace(fitted=self.fitted.with_sigma_noise(sigma_noise)), factor


def _check_refitted(asked: Chosen, fitted: Fitted, settings: Settings) -> None:
    """Raise ValueError if another model, or data that differ visibly, were fitted than in the fit before.

    Data of the same size are told apart by the log likelihood, which is that of the same weights.
    """
    before, now = asked.fitted, fitted.log_likelihood
    centre, weights = before.network.unlinearised().params, fitted.network.unlinearised().params
    ratios = np.asarray(asked.settings.prior(before.network).relative, np.float64)

    def differ(a: Any, b: Any, rtol: float, atol: float = 0.0) -> bool:
        pair = np.asarray(a, np.float64), np.asarray(b, np.float64)
        # Checkpoints of the first format do not hold all numbers, which are NaN then.
        return not np.isnan(pair[0]).any() and not np.allclose(*pair, rtol=rtol, atol=atol)

    got = None
    if (fitted.bound is None) != (before.bound is None):
        got = "a variational posterior" if before.bound is None else "a Laplace approximation"
    elif settings.hessian_structure != asked.settings.hessian_structure:
        got = f"hessian_structure={settings.hessian_structure!r}"
    elif fitted.likelihood.name != before.likelihood.name:
        got = f"the likelihood {fitted.likelihood.name!r:.80} for {before.likelihood.name!r:.80}"
    elif jax.tree.map(np.shape, weights) != jax.tree.map(np.shape, centre):
        got = "weights of other paths or shapes"
    elif not all(map(np.array_equal, jax.tree.leaves(weights), jax.tree.leaves(centre))):
        got = "other weights"
    elif differ(before.log_likelihood.num_targets, now.num_targets, 1e-4):
        got = f"{now.num_targets:.6g} targets for {before.log_likelihood.num_targets:.6g}"
    elif fitted.likelihood.sigma_noise is not None and differ(
        before.likelihood.sigma_noise, fitted.likelihood.sigma_noise, 1e-4
    ):
        got = f"sigma_noise={fitted.likelihood.sigma_noise} for {before.likelihood.sigma_noise}"
    elif differ(ratios, fitted.prior.relative, 1e-3):
        got = "prior precisions with other ratios than those of the Laplace that it is given"
    elif not fitted.network.is_linearised and differ(
        before.log_likelihood.value, now.value, _SAME_VALUE, 1e-6 * float(now.num_targets)
    ):
        got = f"data with log likelihood {now.value:.6g} for {before.log_likelihood.value:.6g}"
    if got is not None:
        raise ValueError(
            "optimize_prior_precision(refit=...) must fit the Laplace that it is given, to the data of the first fit; "
            f"got {got}; pass {_refit_like(before)}"
        )


def _refit_like(fitted: Fitted) -> str:
    """The argument that fits again as before, for error messages."""
    approximation = "" if fitted.bound is None else ", approximation=..."  # a name, or options that would be lost
    return f"refit=lambda la: la.fit(data, key=key{approximation})"


def check_method(method: str, evidence_options: dict[str, Any], grid_options: dict[str, Any]) -> None:
    """Check the method of `Laplace.optimize_prior_precision`, and that it is given no argument of the other one.

    An argument that is None or False counts as not given.

    Raises
    ------
    ValueError
        If the method is unknown, an argument belongs to the other one, or validation data are missing.
    """
    checks.choice(method, "optimize_prior_precision(method=...)", ("marglik", "gridsearch"))
    foreign_options = grid_options if method == "marglik" else evidence_options
    for name, value in foreign_options.items():
        if value is not None and value is not False:
            raise ValueError(
                f"optimize_prior_precision({method!r}) must not be given {name}=..., which is of the other method; "
                "leave it out"
            )
    if method == "gridsearch" and grid_options["validation"] is None:
        raise ValueError(
            "optimize_prior_precision('gridsearch') must be given validation=(x, y), or batches of such, with weights "
            "of examples or without"
        )


def by_evidence(
    chosen: Chosen,
    prior_structure: PriorStructure | None = None,
    *,
    optimize_sigma_noise: bool = False,
    max_refits: int = 10,
) -> Chosen:
    """Move to the maximum of the evidence; `Laplace.optimize_prior_precision` says what is maximised over.

    Raises
    ------
    ValueError
        If a name is unknown, the noise of another likelihood is asked for, or `refit` is needed and not given.
    """
    check_evidence_options(chosen, prior_structure, max_refits)
    fitted = chosen.fitted
    if optimize_sigma_noise:
        if fitted.likelihood.sigma_noise is None:
            raise ValueError(
                "optimize_prior_precision(optimize_sigma_noise=True) must be asked of a regression; got "
                f"{fitted.likelihood.name!r}"
            )
        # Precisions are searched relative to the present noise. If that is the noise of the residuals, the search range
        # is wide enough.
        log_joint = fitted.log_joint(best_noise=True)
        if log_joint.noise_factor(0.0) > 0:
            chosen, _ = chosen.at_best_noise(log_joint, 0.0)
    if prior_structure == "scalar" and not fitted.prior.is_isotropic:
        chosen = chosen.at_ratios(fitted.prior.precision)
    if prior_structure in (None, "scalar"):
        return _overall(chosen, optimize_sigma_noise)
    grouping = Grouping.of(prior_structure, fitted.network.params, chosen.settings.prior_groups)
    if isinstance(fitted.structure, SampleStructure):
        return _by_fixed_point(chosen, grouping, optimize_sigma_noise, max_refits)
    return _by_gradient(chosen, grouping, optimize_sigma_noise)


def check_evidence_options(chosen: Chosen, prior_structure: PriorStructure | None, max_refits: int) -> None:
    """Raise ValueError if a name is unknown, a number of refits is not positive, or `refit` is not a function."""
    if prior_structure is not None and not (
        isinstance(prior_structure, str) and prior_structure in ("scalar", "layerwise", "diag")
    ):
        raise ValueError(
            "optimize_prior_precision(prior_structure=...) must be 'scalar', 'layerwise', 'diag', or None to keep the "
            f"ratios of the precisions; got {prior_structure!r:.80}"
        )
    if chosen.refit is not None and not callable(chosen.refit):
        raise ValueError(
            "optimize_prior_precision(refit=...) must be a function from the new Laplace to the fitted one; got "
            f"{chosen.refit!r:.80}; try lambda la: la.fit(data, key=key)"
        )
    checks.count(max_refits, "optimize_prior_precision(max_refits=...)", advice="try 10")


def _overall(chosen: Chosen, best_noise: bool) -> Chosen:
    """Find the best common factor of all precisions, from the present decomposition."""
    fitted = chosen.fitted
    log_joint, squared = fitted.log_joint(best_noise=best_noise), fitted.squared_distance
    resolution = fitted.structure.resolution()
    best = optimum(fitted.structure.log_determinant, log_joint, squared, search_range=range_above(resolution))
    if best.at_bound:
        is_rounding = best.prior_precision < 1.01 * resolution
        checks.warn(
            f"the evidence still rises at the end of its search range, prior precision {best.prior_precision:.3g}: the "
            "optimum is not inside it; "
            + (
                "below it rounding hides the curvature: standardise the inputs, or compute in float64"
                if is_rounding
                else "look for weights that are zero"
            )
        )
    before = float(fitted.prior.precision)
    # The search keeps G fixed. If the noise variance is multiplied by s, the same determinant belongs to the precision
    # divided by s; see `LogJoint`.
    chosen, noise_factor = chosen.at_best_noise(log_joint, best.prior_precision * squared)
    after = best.prior_precision / noise_factor
    return chosen.at(after) if is_scalar(chosen.settings.prior_precision) else chosen.times(after / before)


def _by_gradient(chosen: Chosen, grouping: Grouping, best_noise: bool) -> Chosen:
    """Find one precision for each group by L-BFGS, for a structure that can be whitened by any D."""
    fitted = chosen.fitted
    log_joint = fitted.log_joint(best_noise=best_noise)
    squares = np.asarray(fitted.prior.deviation(fitted.network.params), np.float64) ** 2
    plain = chosen.at(1.0).fitted.structure
    limits, start = range_above(plain.resolution()), grouping.precisions(fitted.prior)
    best = grouped_optimum(plain, log_joint, squares, grouping.numbers, start, search_range=limits)
    grouping.warn_of_bounds("the evidence", best.precisions, best.at_bound)
    q = float(best.precisions[grouping.numbers] @ squares)
    chosen, noise_factor = chosen.at_best_noise(log_joint, q)
    return chosen.at(grouping.as_given(best.precisions / noise_factor))


def _by_fixed_point(chosen: Chosen, grouping: Grouping, best_noise: bool, max_refits: int) -> Chosen:
    """Find one precision for each group by MacKay's fixed point, for a structure that every step fits again."""
    fitted = chosen.fitted
    squares = np.asarray(fitted.prior.deviation(fitted.network.params), np.float64) ** 2
    before = None
    for _ in range(max_refits):
        chosen = _overall(chosen, best_noise)
        fitted = chosen.fitted
        now = grouping.precisions(fitted.prior)
        effective = fitted.structure.effective_parameters(float(fitted.prior.precision), grouping.numbers)
        log_joint = fitted.log_joint(best_noise=best_noise)
        step = fixed_point_step(effective, log_joint, squares, grouping.numbers, now)
        towards = accelerated(now, step.precisions, before)
        chosen, before = chosen.at_ratios(grouping.as_given(towards)), (now, step.precisions)
        if step.largest_step <= max(np.log(NEGLIGIBLE_FACTOR), step.step_error):
            break
    else:
        checks.warn(
            f"the prior precisions have not settled after {max_refits} fits: the last step changed one by a factor of "
            f"{np.exp(step.largest_step):.2g}; raise max_refits"
        )
    grouping.warn_of_bounds("the evidence", step.precisions, step.at_bound)
    return chosen
