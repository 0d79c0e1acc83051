"""What the numbers of a run mean, in plain words made from the numbers."""

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from bnnlaplace.calibration.bootstrap import Bootstrap, Interval, paired_differences
from training.report.results import MethodResult, ModeDistance, RunResults

if TYPE_CHECKING:
    from bnnlaplace.plots import PrecisionCurve

_NEAR_MODE = 0.01  # squared distance to the mode over the effective number of parameters
_SAME_OPTIMUM = 2.0  # prior precisions within this factor are called the same


class Finding(NamedTuple):
    """One paragraph: what it is about, and what it says."""

    title: str
    text: str


def findings(results: RunResults) -> list[Finding]:
    """The paragraphs of the report, in the order of their importance.

    Comparisons of methods rest on paired bootstrap intervals; where an interval includes zero the text says that the
    images do not tell the methods apart.
    """
    reserved = reservations(results)
    found = [Finding("Before reading the numbers", " ".join(reserved))] if reserved else []
    found += [_best(results), *(_structure(results, name) for name in results.curves)]
    if len(results.curves) > 1:
        found += [_structures_compared(results), *_hadamard(results)]
    if results.ood is not None:
        found.append(_out_of_distribution(results))
    return [*found, _krylov(results), _mode(results)]


def reservations(results: RunResults) -> list[str]:
    """What qualifies the numbers of a run, a sentence each: images that also chose, optima at the end of a search."""
    found = []
    if not results.held_out:
        found.append(
            f"The evaluated images are the {results.chosen_on} images, which also chose the temperature and the prior "
            f"precisions of the {results.chosen_on} NLL: methods that use these look better here than on images of "
            "their own."
        )
    for name, curve in results.curves.items():
        if curve.evidence_at_bound:
            found.append(
                f"The evidence of the {name} posterior still rises at the end of its search range, prior precision "
                f"{precision(curve.evidence_optimum)}: the optimum is not inside it."
            )
        if curve.nll_at_bound:
            found.append(
                f"The validation NLL of the {name} posterior is lowest at the {_end(curve)}, prior precision "
                f"{precision(curve.nll_optimum)}: the optimum may lie beyond it."
            )
    found += [
        f"The temperature of {method.label} is at the end of its search range, {number(method.temperature, 2)}: the "
        "optimum is not inside it."
        for method in results.methods
        if method.temperature_at_bound
    ]
    return found


def _end(curve: "PrecisionCurve") -> str:
    """Which end of the precisions to choose from is the one with the lowest validation NLL."""
    if curve.nll_optimum == curve.precision[-1]:
        return "upper end of the grid"
    if curve.nll_optimum == curve.precision[0]:
        return "lower end of the grid"
    return "end of that part of the grid where it is finite and the samples have converged"


def confidence_gap(bootstrap: Bootstrap) -> Interval:
    """Mean confidence minus accuracy with its 95 % interval: positive is overconfident."""
    gap = bootstrap.replicates["confidence"] - bootstrap.replicates["accuracy"]
    low, high = np.quantile(gap, (0.025, 0.975))
    return Interval(bootstrap.values["confidence"] - bootstrap.values["accuracy"], float(low), float(high))


def number(value: float, decimals: int = 3) -> str:
    """A number for readers: a fixed number of decimals, a proper minus sign, no NaN."""
    if np.isnan(value):
        return "undefined"
    if np.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def precision(value: float) -> str:
    """Two digits that count: 0.083, 1.7, 560, 1,800."""
    return f"{float(f'{value:.2g}'):,.10g}"


def _range(interval: Interval, decimals: int = 3) -> str:
    return f"[{number(interval.low, decimals)},\N{NO-BREAK SPACE}{number(interval.high, decimals)}]"


def _verdict(method: MethodResult) -> str:
    gap = confidence_gap(method.bootstrap)
    if gap.low > 0:
        return "overconfident"
    return "underconfident" if gap.high < 0 else "neither over- nor underconfident beyond chance"


def _word(metric: str, method: MethodResult, reference: MethodResult) -> str:
    """Whether the images tell `method` from `reference`, by the paired interval of their difference."""
    difference = paired_differences(method.bootstrap, reference.bootstrap)[metric]
    if difference.high < 0:
        return f"lower than that of {reference.label}"
    if difference.low > 0:
        return f"higher than that of {reference.label}"
    return f"not distinguishable from that of {reference.label}"


def _against(metric: str, method: MethodResult, reference: MethodResult) -> str:
    """The same with the difference and its interval."""
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
    """Evidence against validation for one structure, and what either choice does to the predictions."""
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
    """One value where all links agree, else each with its link."""
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
    """The diagonal's evidence must nowhere exceed another structure's: its log-determinant is never the smaller."""
    found = []
    diagonal = results.curves.get("diagonal")
    for name, curve in results.curves.items():
        if diagonal is None or curve is diagonal:
            continue
        here = np.interp(np.log(curve.precision), np.log(diagonal.precision), diagonal.log_evidence)
        excess = here - curve.log_evidence
        # Two standard errors, what truncation can have taken from the evidence, and the rounding of sums of this size:
        # at large precision the two evidences are all but equal.
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
        found.append(Finding("Evidence", text))
    return found


def _out_of_distribution(results: RunResults) -> Finding:
    baseline = results.methods[0]
    best = max(results.methods, key=lambda method: method.bootstrap.values["auroc"])
    found = best.metrics["auroc"]
    text = (
        f"Told apart from {results.ood} images by the largest probability, the best AUROC is {number(found.value)} "
        f"{_range(found)}, of {best.label} (0.5 is chance, 1 perfect)."
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
        f"posterior precision, is at most {number(100 * krylov.sample_error_bound, 1)} %, and truncation leaves the "
        f"log-determinant open by {number(high - low, 2)} nats (between {number(low, 2)} and {number(high, 2)}). "
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
    """At which precisions of the grid a curve is not to be believed, and what became of them."""
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
            "not quite a mode, so the evidence is that of a point beside it, mostly in directions that the prior alone "
            "determines and training reaches last; train longer to come closer."
        )
    text += (
        f" The mode moves with the prior: that of the precision which the evidence prefers, "
        f"{precision(there.prior_precision)}, is {_distance(there)}."
    )
    return Finding("Is this a mode?", text)


def _distance(mode: ModeDistance) -> str:
    return (
        f"{number(mode.decrement**0.5, 1)} standard deviations of the posterior away, where a sample is about "
        f"{number(mode.effective_parameters**0.5, 1)} away in the directions that the data determine, and a "
        f"Gauss-Newton step promises {number(mode.decrement / 2, 1)} nats"
    )
