"""The numbers of a run in plain words: the three that the report opens with, what qualifies them, and what they mean.

A finding is one sentence with a number. Methods are compared by paired bootstrap intervals.
"""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnnlaplace.calibration import Interval, paired_differences
from bnnlaplace.variational.saturation import TrainingFit
from training.report.numbers import difference, number, precision
from training.report.results import MethodResult, ModeDistance, RunResults

if TYPE_CHECKING:
    from bnnlaplace.plots import PrecisionCurve

_NEAR_MODE = 0.01  # A point is a mode if its squared distance is below this times the effective number of parameters.


class Headline(NamedTuple):
    """One of the numbers that the report opens with."""

    value: str
    metric: str
    text: str
    """What the metric is."""
    comparisons: list[str]
    """For each baseline, whether the images tell the method from it."""


def headlines(results: RunResults) -> list[Headline]:
    """Write NLL, ECE and AUROC of the foremost method beside the baselines; without foreign images two of them."""
    own = f"a {results.split} image"
    meaning = {
        "nll": f"The cost of {own}: \N{MINUS SIGN}log of the probability of its class, in nats (the unit "
        "of natural logarithms); lower is better.",
        "ece": "Calibration error: how far confidence and accuracy are apart on average; lower is better.",
        "auroc": f"The chance that {own} gets more confidence than a foreign one ({results.ood}); higher is better.",
    }
    method, scaled = results.foremost, results.temperature_scaled
    references = [results.methods[0], *([] if scaled is None else [scaled])]
    return [
        Headline(
            number(method.bootstrap.values[metric]),
            metric.upper(),
            text,
            [_comparison(metric, method, reference) for reference in references],
        )
        for metric, text in meaning.items()
        if metric in method.bootstrap.values
    ]


def _comparison(metric: str, method: MethodResult, reference: MethodResult) -> str:
    """Write the value of a reference, and the difference from it."""
    interval = paired_differences(method.bootstrap, reference.bootstrap)[metric]
    value = number(reference.bootstrap.values[metric])
    return f"{_verdict(metric, interval)} {reference.name} ({value}): {difference(interval)}"


def _verdict(metric: str, interval: Interval) -> str:
    if not interval.excludes_zero:
        return "not told apart from"
    return "better than" if (interval.value > 0) == (metric == "auroc") else "worse than"


# --- what qualifies the numbers -------------------------------------------------------------------------------------


def reservations(results: RunResults) -> list[str]:
    """Write a sentence for all that qualifies the numbers, such as images that also chose, or optima at an end."""
    sentences = []
    if not results.held_out:
        sentences.append(
            f"The evaluated images are the {results.chosen_on} images, which also chose the temperature and the prior "
            f"precisions of the {results.chosen_on} NLL: methods that use these look better here than on images of "
            "their own."
        )
    sentences += [
        f"The evidence of {results.posterior_name(name)} still rises at the end of its search range, prior precision "
        f"{precision(curve.evidence_optimum)}: the optimum is not inside it."
        for name, curve in results.curves.items()
        if curve.evidence_at_bound
    ]
    at_end: dict[str, list[str]] = {}
    for name, curve in results.curves.items():
        if curve.nll_at_bound:
            where = f"{_end(curve)}, prior precision {precision(curve.nll_optimum)}"
            at_end.setdefault(where, []).append(results.posterior_name(name))
    sentences += [
        f"The validation NLL of {' and '.join(names)} is lowest at the {where}: the optimum may lie beyond it."
        for where, names in at_end.items()
    ]
    sentences += [
        f"The temperature of {method.label} is at the end of its search range, {number(method.temperature, 2)}: the "
        "optimum is not inside it."
        for method in results.methods
        if method.temperature_at_bound
    ]
    if (part := _part(results)) is not None:
        sentences.append(
            f"Evidence and curvature are estimates from {part:,} of {results.num_images['train']:,} training images."
        )
    if not results.krylov.converged:
        sentences.append(
            "The decomposition of Lanczos Laplace missed its tolerance: a posterior sample is off by up to "
            f"{number(100 * results.krylov.sample_error_bound, 1)} %; allow more --curvature.max-vectors."
        )
    fit = results.training_fits.get(results.foremost.curve)
    if fit is not None and fit.is_saturated:
        sentences.append(f"Training images contradict the evidence of {about_training_fit(results.foremost.name, fit)}")
    return sentences + _hadamard(results)


def _end(curve: "PrecisionCurve") -> str:
    """Name the end of the grid at which the validation NLL is lowest."""
    if curve.nll_optimum == curve.precision[-1]:
        return "upper end of the grid"
    if curve.nll_optimum == curve.precision[0]:
        return "lower end of the grid"
    return "end of that part of the grid where it is finite and the samples have converged"


def _hadamard(results: RunResults) -> list[str]:
    """Say where Hadamard's inequality is violated, by which the diagonal's evidence is nowhere the larger."""
    diagonal, curve = results.curves.get("diagonal"), results.curves["Lanczos"]
    if diagonal is None:
        return []
    here = np.interp(np.log(curve.precision), np.log(diagonal.precision), diagonal.log_evidence)
    excess = here - curve.log_evidence
    # Two standard errors, what truncation can have taken from the evidence, and the rounding of sums of this size.
    # Rounding counts at large precision, where the two evidences are almost equal.
    allowed = 2 * np.asarray(curve.log_evidence_sem) + curve.log_evidence_truncation + 1e-6 * np.abs(here)
    violated = (excess > allowed) & curve.converged
    if not violated.any():
        return []
    worst = int(np.argmax(np.where(violated, excess - allowed, -np.inf)))
    return [
        f"The diagonal's evidence exceeds that of Lanczos by {number(excess[worst], 2)} nats at prior precision "
        f"{precision(curve.precision[worst])}, which exact arithmetic rules out (Hadamard's inequality): the "
        "decomposition cannot be trusted there."
    ]


# --- one sentence each ----------------------------------------------------------------------------------------------


def about_precisions(results: RunResults) -> list[str]:
    """Write what the evidence and the validation NLL prefer, and where samples have not converged."""
    method = results.foremost
    curve = results.curves[method.curve]
    ratio = curve.nll_optimum / curve.evidence_optimum
    times = precision(max(ratio, 1 / ratio))
    chosen_by = "training" if curve.from_training else "the evidence"
    sentences = [] if results.kept_precision is None else [results.kept_precision]
    sentences.append(
        f"For {method.name} {chosen_by} chose {precision(curve.evidence_optimum)} and the validation NLL "
        f"{precision(curve.nll_optimum)}, {times} times as {'large' if ratio >= 1 else 'small'}."
    )
    if results.history and results.history[-1].get("prior_precision_by_layer"):
        sentences.append("Every layer has a precision of its own; the numbers are geometric means over the weights.")
    unconverged: dict[str, list[str]] = {}
    for name, each in results.curves.items():
        outside = each.precision[~each.converged]
        if len(outside):
            ends = f"({precision(outside.min())} to {precision(outside.max())})"
            where = f"{len(outside)} of {len(each.precision)} prior precisions {ends}"
            unconverged.setdefault(where, []).append(results.posterior_name(name))
    return sentences + [
        f"The samples of {' and '.join(names)} have not converged at {where}, and the validation NLL chooses none of "
        "them."
        for where, names in unconverged.items()
    ]


def about_training_fit(name: str, fit: TrainingFit) -> str:
    """Write whether a posterior predicts training images as well as its evidence promises."""
    numbers = (
        f"{name}: an NLL of {number(fit.nll)}\N{NO-BREAK SPACE}\N{PLUS-MINUS SIGN}\N{NO-BREAK SPACE}{number(fit.sem)} "
        f"nats a training image, where the evidence allows {number(fit.evidence)}"
    )
    if fit.is_saturated:
        return f"{numbers}. It is larger: trust neither this posterior nor the prior precision that its evidence chose."
    return f"{numbers}. It is not larger, within two standard errors."


def about_krylov(results: RunResults) -> str:
    """Write how far the decomposition behind Lanczos Laplace can be off."""
    krylov = results.krylov
    low, high = krylov.log_det_low, krylov.log_det_high
    return (
        f"The decomposition of the curvature kept {krylov.num_vectors} vectors from {krylov.num_probes} probes in "
        f"{krylov.depth} steps; at the optimum of the evidence a posterior sample is off by at most "
        f"{number(100 * krylov.sample_error_bound, 1)} %, and the log-determinant lies between {number(low, 2)} and "
        f"{number(high, 2)} nats."
    )


def _part(results: RunResults) -> int | None:
    """Return how many training images the posteriors were fitted to; None if it was all of them."""
    count = results.config.get("curvature", {}).get("examples")
    return None if count is None or count >= results.num_images["train"] else count


def about_modes(results: RunResults) -> list[str]:
    """Write how far the weights are from the modes, where Laplace approximations belong.

    The gradient of a part of the images has the noise of the part, which would count as a distance. Then: nothing.
    """
    if _part(results) is not None:
        return []
    relative = results.gradient_norm / results.prior_gradient_norm
    here, there = results.mode_in_training, results.mode_of_evidence
    is_mode = here.decrement <= _NEAR_MODE * here.effective_parameters
    return [
        "Laplace expands at a mode, where the gradient of the log joint (log likelihood plus log prior) is zero. At "
        f"the trained weights the norm of this gradient is {results.gradient_norm:.2g}, which is "
        f"{number(100 * relative, 2)} % of the norm of the prior's part.",
        f"At the prior precision of training, {precision(here.prior_precision)}, {_distance(here)} "
        + ("They are at a mode for practical purposes." if is_mode else "Train longer to come closer to the mode."),
        f"At the precision that the evidence of Lanczos Laplace prefers, {precision(there.prior_precision)}, "
        f"{_distance(there)}",
    ]


def _distance(mode: ModeDistance) -> str:
    return (
        f"the weights are {number(mode.decrement**0.5, 1)} standard deviations of the posterior away from the mode. "
        f"Samples of the posterior are about {number(mode.effective_parameters**0.5, 1)} away from its mean."
    )
