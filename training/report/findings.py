"""The numbers of a run in plain words: which prediction is best, and what qualifies the numbers."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnnlaplace.calibration import Bootstrap, Interval, paired_differences
from training.report.results import MethodResult, ModeDistance, RunResults

if TYPE_CHECKING:
    from bnnlaplace.plots import PrecisionCurve

_NEAR_MODE = 0.01  # A point is a mode if its squared distance is below this times the effective number of parameters.
_SAME_OPTIMUM = 2.0  # Two prior precisions within this factor count as the same.


class Finding(NamedTuple):
    """One paragraph of the report: its title and its text."""

    title: str
    text: str


def findings(results: RunResults) -> list[Finding]:
    """Write the paragraphs of the report, in the order of their importance.

    Comparisons of methods rest on paired bootstrap intervals. If an interval includes zero, the text says that the
    images do not tell the methods apart.
    """
    qualified = reservations(results)
    paragraphs = [Finding("Before reading the numbers", " ".join(qualified))] if qualified else []
    paragraphs += [_best(results), *(_structure(results, name) for name in results.curves)]
    if len(results.curves) > 1:
        paragraphs += [_structures_compared(results), *_hadamard(results)]
    if results.ood is not None:
        paragraphs.append(_out_of_distribution(results))
    return [*paragraphs, _krylov(results), _mode(results)]


def reservations(results: RunResults) -> list[str]:
    """Write a sentence for all that qualifies the numbers: images that also chose, optima at the end of a search."""
    sentences = []
    if not results.held_out:
        sentences.append(
            f"The evaluated images are the {results.chosen_on} images, which also chose the temperature and the prior "
            f"precisions of the {results.chosen_on} NLL: methods that use these look better here than on images of "
            "their own."
        )
    for name, curve in results.curves.items():
        if curve.evidence_at_bound:
            sentences.append(
                f"The evidence of the {name} posterior still rises at the end of its search range, prior precision "
                f"{precision(curve.evidence_optimum)}: the optimum is not inside it."
            )
        if curve.nll_at_bound:
            sentences.append(
                f"The validation NLL of the {name} posterior is lowest at the {_end(curve)}, prior precision "
                f"{precision(curve.nll_optimum)}: the optimum may lie beyond it."
            )
    sentences += [
        f"The temperature of {method.label} is at the end of its search range, {number(method.temperature, 2)}: the "
        "optimum is not inside it."
        for method in results.methods
        if method.temperature_at_bound
    ]
    return sentences


def _end(curve: "PrecisionCurve") -> str:
    """Name the end of the grid at which the validation NLL is lowest."""
    if curve.nll_optimum == curve.precision[-1]:
        return "upper end of the grid"
    if curve.nll_optimum == curve.precision[0]:
        return "lower end of the grid"
    return "end of that part of the grid where it is finite and the samples have converged"


def confidence_gap(bootstrap: Bootstrap) -> Interval:
    """Compute mean confidence minus accuracy with its 95 % interval. Positive is overconfident."""
    gap = bootstrap.replicates["confidence"] - bootstrap.replicates["accuracy"]
    low, high = np.quantile(gap, (0.025, 0.975))
    return Interval(bootstrap.values["confidence"] - bootstrap.values["accuracy"], float(low), float(high))


def number(value: float, decimals: int = 3) -> str:
    """Write a number for readers, with a fixed number of decimals, a proper minus sign, and words for NaN."""
    if np.isnan(value):
        return "undefined"
    if np.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def precision(value: float) -> str:
    """Write a prior precision with two significant digits: 0.083, 1.7, 560, 1,800."""
    return f"{float(f'{value:.2g}'):,.10g}"


def _range(interval: Interval, decimals: int = 3) -> str:
    return f"[{number(interval.low, decimals)},\N{NO-BREAK SPACE}{number(interval.high, decimals)}]"


def _verdict(method: MethodResult) -> str:
    gap = confidence_gap(method.bootstrap)
    if gap.low > 0:
        return "overconfident"
    return "underconfident" if gap.high < 0 else "neither over- nor underconfident beyond chance"


def _word(metric: str, method: MethodResult, reference: MethodResult) -> str:
    """Say whether a metric is lower or higher than that of another method, or the images do not tell them apart."""
    difference = paired_differences(method.bootstrap, reference.bootstrap)[metric]
    if difference.high < 0:
        return f"lower than that of {reference.label}"
    if difference.low > 0:
        return f"higher than that of {reference.label}"
    return f"not distinguishable from that of {reference.label}"


def _against(metric: str, method: MethodResult, reference: MethodResult) -> str:
    """Say the same as `_word`, with the difference and its interval."""
    difference = paired_differences(method.bootstrap, reference.bootstrap)[metric]
    word = _word(metric, method, reference)
    return f"{word} (difference {number(difference.value)} {_range(difference)})"


def _best(results: RunResults) -> Finding:
    baseline = results.methods[0]
    best = min(results.methods, key=lambda method: method.bootstrap.values["nll"])
    interval = best.metrics["nll"]
    text = (
        f"The lowest {results.split} NLL is {number(interval.value)} {_range(interval)} nats per image, "
        f"of {best.label}."
    )
    if best is not baseline:
        text += f" It is {_against('nll', best, baseline)}."
    scaled = next((method for method in results.methods if method.temperature is not None), None)
    if scaled is not None and best is not scaled:
        text += (
            f" Against temperature scaling, which costs one number (here {number(scaled.temperature, 2)}), "
            f"it is {_against('nll', best, scaled)}."
        )
    accuracy = Interval(*(100 * end for end in baseline.metrics["accuracy"]))
    text += (
        f" {baseline.label} classifies {number(accuracy.value, 1)} % {_range(accuracy, 1)} correctly with a mean "
        f"confidence of {number(100 * baseline.bootstrap.values['confidence'], 1)} %: {_verdict(baseline)}."
    )
    return Finding("Which prediction is best", text)


def _structure(results: RunResults, structure: str) -> Finding:
    """Compare the choices of evidence and validation NLL for one structure, and the predictions that follow."""
    curve = results.curves[structure]
    ratio = curve.nll_optimum / curve.evidence_optimum
    if max(ratio, 1 / ratio) <= _SAME_OPTIMUM:
        relation = "the two agree within a factor of two, so the evidence chooses what also predicts well"
    else:
        relation = (
            f"{precision(max(ratio, 1 / ratio))} times {'larger' if ratio > 1 else 'smaller'}, "
            "so the evidence and the predictions disagree about the prior"
        )
    text = (
        f"The evidence prefers prior precision {precision(curve.evidence_optimum)}, the validation NLL "
        f"{precision(curve.nll_optimum)}: {relation}."
    )
    ours = [method for method in results.methods if method.structure == structure]
    for choice in dict.fromkeys(method.prior_choice for method in ours):
        methods = [method for method in ours if method.prior_choice == choice]
        scores = _by_link(methods, [number(method.bootstrap.values["nll"]) for method in methods])
        words = _by_link(methods, [_word("nll", method, results.methods[0]) for method in methods])
        verdicts = _by_link(methods, [_verdict(method) for method in methods])
        gaps = _by_link(methods, [number(confidence_gap(method.bootstrap).value) for method in methods])
        text += (
            f" At the precision of the {choice}, the {results.split} NLL is {scores}: {words}. The predictions are "
            f"{verdicts}: mean confidence minus accuracy is {gaps}."
        )
    return Finding(f"{structure[0].upper()}{structure[1:]} Laplace", text)


def _by_link(methods: list[MethodResult], values: list[str]) -> str:
    """Write one value if all links agree, and otherwise each value with its link."""
    if len(set(values)) == 1:
        return values[0]
    return " and ".join(f"{value} with {method.link}" for method, value in zip(methods, values, strict=True))


def _structures_compared(results: RunResults) -> Finding:
    sentences = []
    links = dict.fromkeys(method.link for method in results.methods if method.prior_choice == "evidence")
    for link in links:
        ranked = sorted(
            (method for method in results.methods if method.prior_choice == "evidence" and method.link == link),
            key=lambda method: method.bootstrap.values["nll"],
        )
        if len(ranked) > 1:
            sentences.append(
                f"With the {link} predictive, {ranked[0].structure} has the lower NLL: "
                f"{number(ranked[0].bootstrap.values['nll'])}, {_against('nll', *ranked[:2])}."
            )
    return Finding("Structures, each at its evidence optimum", " ".join(sentences))


def _hadamard(results: RunResults) -> list[Finding]:
    """Check Hadamard's inequality: the evidence of the diagonal nowhere exceeds that of another structure."""
    paragraphs = []
    diagonal = results.curves.get("diagonal")
    for name, curve in results.curves.items():
        if diagonal is None or curve is diagonal:
            continue
        here = np.interp(np.log(curve.precision), np.log(diagonal.precision), diagonal.log_evidence)
        excess = here - curve.log_evidence
        # Two standard errors, what truncation can have taken from the evidence, and the rounding of sums of this size.
        # Rounding counts at large precision, where the two evidences are almost equal.
        allowed = 2 * np.asarray(curve.log_evidence_sem) + curve.log_evidence_truncation + 1e-6 * np.abs(here)
        violated = (excess > allowed) & curve.converged
        best, best_diagonal = np.nanmax(curve.log_evidence), np.nanmax(diagonal.log_evidence)
        text = (
            f"The largest log evidence is {number(best, 0)} nats for {name} and {number(best_diagonal, 0)} for "
            "the diagonal. By Hadamard's inequality the diagonal's evidence is never the larger at equal precision; "
        )
        if violated.any():
            worst = int(np.argmax(np.where(violated, excess - allowed, -np.inf)))
            text += (
                f"here it is, by {number(excess[worst], 2)} nats at precision {precision(curve.precision[worst])}, "
                "beyond its error: the decomposition cannot be trusted there."
            )
        else:
            text += "that holds at every precision of the grid where the decomposition has converged, within the error."
        paragraphs.append(Finding("Evidence", text))
    return paragraphs


def _out_of_distribution(results: RunResults) -> Finding:
    baseline = results.methods[0]
    best = max(results.methods, key=lambda method: method.bootstrap.values["auroc"])
    auroc = best.metrics["auroc"]
    text = (
        f"Told apart from {results.ood} images by the largest probability, the best AUROC is {number(auroc.value)} "
        f"{_range(auroc)}, of {best.label} (0.5 is chance, 1 perfect)."
    )
    if best is not baseline:
        text += f" It is {_against('auroc', best, baseline)}."
    return Finding("Images unlike the training images", text)


def _krylov(results: RunResults) -> Finding:
    krylov = results.krylov
    low, high = krylov.log_det_low, krylov.log_det_high
    text = (
        f"The block decomposition with {krylov.num_probes} probes kept {krylov.num_vectors} vectors in {krylov.depth} "
        "steps. At the optimum of the evidence the relative error of a posterior sample, in the metric of the "
        f"posterior precision, is at most {number(100 * krylov.sample_error_bound, 1)} %, and the "
        f"log-determinant is open by {number(high - low, 2)} nats (between {number(low, 2)} and {number(high, 2)}). "
    )
    if krylov.converged:
        text += "That met the tolerance: the Lanczos results there are converged."
    else:
        text += (
            "That missed the tolerance: the Lanczos results there are not converged. "
            "Allow more vectors before reading much into them."
        )
    return Finding("Krylov decomposition", text + "".join(_unconverged(*named) for named in results.curves.items()))


def _unconverged(name: str, curve: "PrecisionCurve") -> str:
    """Name the precisions of the grid at which the samples have not converged."""
    outside = curve.precision[~curve.converged]
    if not len(outside):
        return ""
    return (
        f" On the grid the samples of {name} have not converged at {len(outside)} of {len(curve.precision)} prior "
        f"precisions: {', '.join(map(precision, outside))}. There the curves of validation NLL and ECE are drawn "
        "faint, and the validation NLL chooses among the other precisions alone."
    )


def _mode(results: RunResults) -> Finding:
    relative = results.gradient_norm / results.prior_gradient_norm
    here, there = results.mode_in_training, results.mode_of_evidence
    text = (
        "A Laplace approximation expands the log joint at a mode. At the trained weights its gradient has norm "
        f"{results.gradient_norm:.2g}, {number(100 * relative, 2)} % of the norm of the prior's gradient. At the prior "
        f"precision of training, {precision(here.prior_precision)}, the mode is {_distance(here)}: "
    )
    if here.decrement <= _NEAR_MODE * here.effective_parameters:
        text += "a mode for practical purposes."
    else:
        text += (
            "not quite a mode, so the evidence belongs to a point beside it. Most of the distance lies in directions "
            "that the prior alone determines and training reaches last; train longer to come closer."
        )
    if results.history and results.history[-1].get("prior_precision_by_layer"):
        text += " Every layer has a precision of its own; the numbers here are geometric means over the weights."
    text += (
        f" The mode moves with the prior: at the precision that the evidence prefers, "
        f"{precision(there.prior_precision)}, it is {_distance(there)}."
    )
    return Finding("Is this a mode?", text)


def _distance(mode: ModeDistance) -> str:
    return (
        f"{number(mode.decrement**0.5, 1)} standard deviations of the posterior away, where a sample is about "
        f"{number(mode.effective_parameters**0.5, 1)} away in the directions that the data determine, and a "
        f"Gauss-Newton step promises {number(mode.decrement / 2, 1)} nats"
    )
