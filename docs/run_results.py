"""The tables of the default experiment, from the metrics of runs of `training.fit_van`."""

import statistics
from collections.abc import Callable, Sequence

from result_numbers import digits, spread
from result_table import Record, Remark, Row, Table, row_of

METRICS = ("accuracy", "nll", "ece", "brier", "confidence", "auroc", "fpr95")


LAPLACE_BY_EVIDENCE = ("diagonal Laplace (evidence, probit)", "Lanczos Laplace (evidence, probit)")
VARIATIONAL = "Lanczos variational (training, probit)"


def of_runs(values: Sequence[float], mean: Callable[[Sequence[float]], float] = statistics.fmean) -> list[float]:
    """Return mean, lowest and highest value of several runs."""
    return [mean(values), min(values), max(values)]


def read_methods(runs: list[Record]) -> list[Row]:
    rows = []
    for methods in zip(*(run["methods"] for run in runs), strict=True):
        precisions = [method["prior_precision"] for method in methods]
        row = [methods[0]["label"], None if None in precisions else of_runs(precisions, statistics.geometric_mean)]
        row += [of_runs([method["metrics"][name]["value"] for method in methods]) for name in METRICS]
        rows.append([*row, against_map(methods)])
    return rows


def against_map(methods: Sequence[Record]) -> list[int] | None:
    """Return in how many runs the paired interval of the NLL minus that of MAP is below zero, and above it."""
    intervals = [method["difference_from_map"]["nll"] for method in methods]
    if methods[0]["label"] == "MAP":
        return None
    below, above = (sum(map(is_so, intervals)) for is_so in (lambda x: x["high"] < 0, lambda x: x["low"] > 0))
    return [below, above, len(intervals)]


def write_methods(row: Row) -> list[str]:
    label, precision, *metrics, against = row
    verdict = "–" if against is None else "{} better, {} worse of {}".format(*against)
    return [label, spread(precision, digits), *map(spread, metrics), verdict]


def mean_of(rows: Sequence[Row], label: str, metric: str) -> float:
    return row_of(rows, label)[2 + METRICS.index(metric)][0]


def read_evidence_of_runs(runs: list[Record]) -> list[Row]:
    def highest(run: Record, name: str) -> float:
        return max(value for value in run["curves"][name]["log_evidence"] if value is not None)

    return [[name, of_runs([highest(run, name) for run in runs])] for name in runs[0]["curves"]]


def read_modes(runs: list[Record]) -> list[Row]:
    def between(what: str, value: Callable[[Record], float]) -> Row:
        values = [value(run) for run in runs]
        return [what, min(values), max(values)]

    rows = [
        between(
            "gradient of the log joint at the weights, in % of the prior's gradient",
            lambda run: 100 * run["gradient_norm"] / run["prior_gradient_norm"],
        )
    ]
    for name, what in (("mode_in_training", "training"), ("mode_of_evidence", "the best evidence")):
        rows += [
            between(
                f"distance to the mode at the prior precision of {what}", lambda run, n=name: run[n]["decrement"] ** 0.5
            ),
            between(
                "distance of a posterior sample there, in the directions that the data determine",
                lambda run, n=name: run[n]["effective_parameters"] ** 0.5,
            ),
        ]
    return rows


def write_modes(row: Row) -> list[str]:
    return [row[0], f"{digits(row[1])} to {digits(row[2])}"]


SUMMARISE = "python -m training.summarise checkpoints/van_digits checkpoints/van_digits_1 checkpoints/van_digits_2"

TABLES = [
    Table(
        "methods",
        "The default experiment",
        SUMMARISE,
        "A Visual Attention Network is trained on 1,257 handwritten digits of 8 x 8 pixels and tested on 360. Foreign "
        "images are the same test images, inverted. Each number is the mean over three runs (`--seed 0`, `1` and `2`), "
        "with the lowest and the highest in brackets; means of prior precisions are geometric. The last column counts "
        "runs whose paired 95 % interval of the difference in NLL excludes zero. Training follows rounding, so that a "
        "seed gives the same network on the same machine with as many threads, and another one elsewhere. In brackets "
        "after the structure: what chose the prior precision, and the link. With (training) it is the "
        "prior precision of training, which the evidence of Lanczos Laplace chose there.",
        (
            "method",
            "prior precision",
            "accuracy",
            "NLL",
            "ECE",
            "Brier",
            "confidence",
            "AUROC",
            "FPR95",
            "NLL against MAP",
        ),
        read_methods,
        write_methods,
        remarks=[
            Remark(
                "At the prior precision of its evidence Laplace is **underconfident**, with either structure, and its "
                "NLL is far above that of MAP. The Gaussian at the mode is not the posterior where training has "
                "saturated the softmax.",
                lambda rows: all(
                    mean_of(rows, name, "confidence") < mean_of(rows, name, "accuracy") - 0.1
                    and mean_of(rows, name, "nll") > 5 * mean_of(rows, "MAP", "nll")
                    for name in LAPLACE_BY_EVIDENCE
                ),
            ),
            Remark(
                "The variational posteriors, at the prior precision of training, are nearly as well calibrated as MAP "
                "through the probit link. With Lanczos their NLL is **above that of MAP** in most runs, and they tell "
                "foreign images from digits better. Their own lower bound did not choose that precision.",
                lambda rows: (
                    all(
                        mean_of(rows, f"{name} variational (training, probit)", "ece")
                        < mean_of(rows, "MAP", "ece") + 0.015
                        for name in ("diagonal", "Lanczos")
                    )
                    and row_of(rows, VARIATIONAL)[-1][1] > row_of(rows, VARIATIONAL)[-1][2] / 2
                    and mean_of(rows, VARIATIONAL, "auroc") > mean_of(rows, "MAP", "auroc")
                ),
            ),
            Remark(
                "The wide posterior of Laplace with Lanczos and the probit link has the highest AUROC of all.",
                lambda rows: (
                    mean_of(rows, LAPLACE_BY_EVIDENCE[1], "auroc")
                    == max(mean_of(rows, row[0], "auroc") for row in rows)
                ),
            ),
            Remark(
                "The validation NLL takes Laplace to the upper end of the grid, where the posterior is almost a point. "
                "A temperature does not lower the NLL in most runs either: MAP is calibrated on images like the "
                "training images.",
                lambda rows: (
                    row_of(rows, "Lanczos Laplace (validation NLL, probit)")[1][1] >= 1e5
                    and row_of(rows, "MAP + temperature")[-1][0] == 0
                ),
            ),
            Remark(
                "At small prior precisions the Lanczos samples have not converged. The report draws the curves of "
                "validation NLL and ECE faint there and names these precisions, and the validation NLL does not choose "
                "among them."
            ),
        ],
    ),
    Table(
        "evidence_of_runs",
        "The evidence of the whole GGN and of its diagonal",
        SUMMARISE,
        "The highest log evidence on the grid, in nats, and that of the lower bound of the variational posteriors, as "
        "it extrapolates from the fit: mean, lowest and highest of the three runs.",
        ("structure", "highest log evidence or lower bound"),
        read_evidence_of_runs,
        lambda row: [row[0], spread(row[1], "{:,.0f}".format)],
    ),
    Table(
        "modes",
        "How near the weights are to a mode",
        "make fit-van",
        "Lowest and highest of the three runs. Distances are in standard deviations of the Lanczos posterior. "
        "`report.html` gives these numbers for every run.",
        ("what", "value"),
        read_modes,
        write_modes,
        remarks=[
            Remark(
                "The mode is further from the weights than one standard deviation, and nearer than a posterior sample. "
                "So the weights are near a mode and not at it, and the evidence is that of a point beside its mode.",
                lambda rows: all(rows[at][1] > 1 and rows[at][2] < rows[at + 1][1] for at in (1, 3)),
            )
        ],
    ),
]
