"""The choice of prior precisions, and of a regression's noise, for a fitted Laplace."""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np

from bnnlaplace import prior
from bnnlaplace.core.types import NotAModeWarning
from bnnlaplace.evidence.log_joint import BestNoise, FixedNoise, LogJoint

PriorStructure = Literal["scalar", "layerwise", "diag"]

# Steps of the fixed point end where the largest one changes a precision by less than this factor, or than its error.
NEGLIGIBLE = np.log(1.1)


def by_evidence(
    la: Any,
    prior_structure: PriorStructure | None = None,
    *,
    optimize_sigma_noise: bool = False,
    refit: Callable[[Any], Any] | None = None,
    max_refits: int = 10,
) -> Any:
    """The same Laplace at the maximum of its evidence; `Laplace.optimize_prior_precision` says what is maximised over.

    Parameters
    ----------
    la
        A fitted `Laplace`.
    prior_structure
        None keeps the ratios of the prior precisions; otherwise one for all weights, for each group, for each weight.
    refit
        Needed where the curvature has to be fitted again for other ratios.
    max_refits
        Steps of the fixed point then.

    Raises
    ------
    ValueError
        If a name is unknown, the noise is none of a regression, or `refit` is needed and not given.
    """
    if prior_structure not in (None, "scalar", "layerwise", "diag"):
        raise ValueError(
            "optimize_prior_precision(prior_structure=...) must be 'scalar', 'layerwise', 'diag', or None to keep the "
            f"ratios of the precisions; got {prior_structure!r}"
        )
    if optimize_sigma_noise and la.sigma_noise is None:
        raise ValueError(
            f"optimize_prior_precision(optimize_sigma_noise=True) must be asked of a regression; got "
            f"{la.likelihood.name!r}"
        )
    if max_refits < 1:
        raise ValueError(f"optimize_prior_precision(max_refits=...) must be at least 1; got {max_refits}; try 10")
    if optimize_sigma_noise:
        la = _at_residual_noise(la)
    if prior_structure == "scalar" and la.prior.relative is not None:
        la = _at(la, la.prior.precision, refit)
    if prior_structure in (None, "scalar"):
        return _overall(la, optimize_sigma_noise)
    if prior_structure == "layerwise":
        names = prior.group_names(la.network.params, la.prior_groups)
        numbers = prior.group_numbers(la.network.params, la.prior_groups)
        as_given = lambda precisions: dict(zip(names, map(float, precisions), strict=True))  # noqa: E731
    else:
        numbers = np.arange(sum(leaf.size for leaf in jax.tree.leaves(la.network.params)))
        names = [f"weight {number}" for number in numbers]
        as_given = np.asarray
    grouping = _Grouping(numbers, names, as_given)
    if hasattr(la.structure, "num_probes"):
        return _by_fixed_point(la, grouping, optimize_sigma_noise, refit, max_refits)
    return _by_gradient(la, grouping, optimize_sigma_noise)


@dataclasses.dataclass(frozen=True)
class _Grouping:
    numbers: np.ndarray
    """For each weight the position of its group."""
    names: list[str]
    as_given: Callable[[np.ndarray], Any]
    """From one precision a group to what `Laplace(prior_precision=...)` takes."""

    def start(self, la: Any) -> np.ndarray:
        """The present precisions, a geometric mean in each group."""
        relative = np.ones(len(self.numbers)) if la.prior.relative is None else np.asarray(la.prior.relative, float)
        logs = np.bincount(self.numbers, weights=np.log(relative)) / np.bincount(self.numbers)
        return float(la.prior.precision) * np.exp(logs)


def _log_joint(la: Any, optimize_sigma_noise: bool) -> LogJoint:
    if not optimize_sigma_noise:
        return FixedNoise(float(la.fitted.log_likelihood))
    return BestNoise.of(float(la.fitted.squared_residuals), float(la.fitted.num_outputs), la.sigma_noise)


def _at_residual_noise(la: Any) -> Any:
    """With the noise that the residuals alone have: in its units the search range of the precisions is a wide one."""
    log_joint = _log_joint(la, optimize_sigma_noise=True)
    return _with_noise(la, log_joint, 0.0)[0] if log_joint.factor(0.0) > 0 else la


def _with_noise(la: Any, log_joint: LogJoint, q: float) -> tuple[Any, float]:
    """The Laplace with the noise that is best at q, and the factor of its variance."""
    if not isinstance(log_joint, BestNoise):
        return la, 1.0
    factor = log_joint.factor(q)
    return la.with_sigma_noise(la.sigma_noise * np.sqrt(factor)), factor


def _overall(la: Any, optimize_sigma_noise: bool) -> Any:
    """One factor of all precisions: from the decomposition at hand."""
    log_joint = _log_joint(la, optimize_sigma_noise)
    squared = la.prior.squared_distance(la.network.params)
    found = prior.optimum(la.structure.log_determinant, log_joint, squared)
    if found.at_bound:
        warnings.warn(
            f"the evidence still rises at the end of its search range, prior precision {found.prior_precision:.3g}: "
            "the optimum is not inside it; look for weights that are zero",
            stacklevel=4,
        )
    before = float(la.prior.precision)
    la, factor = _with_noise(la, log_joint, found.prior_precision * squared)
    ratio = found.prior_precision / factor / before
    if prior.is_scalar(la.prior_precision):
        return la.with_prior_precision(found.prior_precision / factor)
    return la.with_prior_precision(jax.tree.map(lambda value: value * ratio, la.prior_precision))


def _by_gradient(la: Any, grouping: _Grouping, optimize_sigma_noise: bool) -> Any:
    log_joint = _log_joint(la, optimize_sigma_noise)
    squares = np.asarray(la.prior.deviation(la.network.params), np.float64) ** 2
    plain = _at(la, 1.0, None).structure
    found = prior.grouped_optimum(plain, log_joint, squares, grouping.numbers, grouping.start(la))
    _report_bounds(found, grouping)
    q = float(found.precisions[grouping.numbers] @ squares)
    la, factor = _with_noise(la, log_joint, q)
    return la.with_prior_precision(grouping.as_given(found.precisions / factor))


def _by_fixed_point(
    la: Any,
    grouping: _Grouping,
    optimize_sigma_noise: bool,
    refit: Callable[[Any], Any] | None,
    max_refits: int,
) -> Any:
    squares = np.asarray(la.prior.deviation(la.network.params), np.float64) ** 2
    before = None
    for _ in range(max_refits):
        la = _overall(la, optimize_sigma_noise)
        now = grouping.start(la)
        gamma = la.structure.effective_parameters(float(la.prior.precision), grouping.numbers)
        found = prior.fixed_point_step(gamma, _log_joint(la, optimize_sigma_noise), squares, grouping.numbers, now)
        towards = prior.accelerated(now, found.precisions, before)
        la, before = _at(la, grouping.as_given(towards), refit), (now, found.precisions)
        if found.largest_step <= max(NEGLIGIBLE, found.step_error):
            break
    else:
        warnings.warn(
            f"the prior precisions have not settled after {max_refits} fits: the last step changed one by a factor of "
            f"{np.exp(found.largest_step):.2g}; raise max_refits",
            stacklevel=4,
        )
    _report_bounds(found, grouping)
    return la


def _at(la: Any, prior_precision: Any, refit: Callable[[Any], Any] | None) -> Any:
    """At other ratios of the precisions, by fitting again where the structure needs that."""
    if not hasattr(la.structure, "num_probes"):
        return la.with_prior_precision(prior_precision)
    if refit is None:
        raise ValueError(
            "optimize_prior_precision(refit=...) must be given for 'lanczos' where ratios of prior precisions change, "
            "as its space depends on them; pass refit=lambda la: la.fit(data, key=key), or use 'diag', 'kron' or 'full'"
        )
    with warnings.catch_warnings():
        # Moving the prior precision at fixed weights is what was asked for.
        warnings.simplefilter("ignore", NotAModeWarning)
        again = refit(dataclasses.replace(la, prior_precision=prior_precision, structure=None, fitted=None))
    if getattr(again, "structure", None) is None:
        raise ValueError(
            f"optimize_prior_precision(refit=...) must return the fitted Laplace; got {type(again).__name__}; pass "
            "refit=lambda la: la.fit(data, key=key)"
        )
    return again


def _report_bounds(found: prior.GroupedOptimum, grouping: _Grouping) -> None:
    stuck = [f"{grouping.names[i]} at {found.precisions[i]:.3g}" for i in np.flatnonzero(found.at_bound)]
    if stuck:
        more = f" and {len(stuck) - 5} more" if len(stuck) > 5 else ""
        warnings.warn(
            f"the evidence does not determine the prior precision of {', '.join(stuck[:5])}{more}: it was stopped at "
            "an end of the search range; look for weights that are zero or that outputs do not depend on",
            stacklevel=5,
        )
