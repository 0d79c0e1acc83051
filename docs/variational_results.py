"""The table of five structures, Laplace and variational, and of what a variational fit costs."""

import math
import statistics
from collections.abc import Sequence

from result_numbers import digits
from result_table import Record, Remark, Row, Table, row_of

_NUMBERS = ("prior_precision", "evidence", "train_nll", "nll", "ece", "probit_nll", "fits")

STRUCTURES = ("full", "Lanczos", "kron", "diagonal", "last layer, full")


def value(rows: Sequence[Row], method: str, name: str) -> float:
    """Return a number of a method; "inf" is above all others."""
    return float(row_of(rows, method)[1 + _NUMBERS.index(name)])


def read(records: list[Record]) -> list[Row]:
    seeds = list(records[0]["seeds"].values())
    if len(seeds) < 3:
        raise KeyError("3 networks")

    def mean(method: str, name: str) -> float | str | None:
        values = [seed[method][name] for seed in seeds if name in seed[method]]
        if not values:
            return None
        value = statistics.fmean(values)
        return value if math.isfinite(value) else "inf"  # JSON has no such number

    return [[method, *(mean(method, name) for name in _NUMBERS)] for method in seeds[0]]


def write(row: Row) -> list[str]:
    name, precision, *numbers, fits = row
    written = ["–" if number is None else number if number == "inf" else f"{number:.3f}" for number in numbers]
    return [name, digits(precision, 2), *written, "–" if fits is None else f"{fits:.1f}"]


TABLE = Table(
    "variational",
    "Laplace and variational posteriors of five structures, and what a variational fit costs",
    "python benchmarks/variational.py",
    "A convolutional network of 3,818 weights, trained on 300 digits to the mode under prior precision 1; means "
    "over three networks, on 1,000 test images. Precisions are at the optimum of the evidence, or of its lower "
    "bound. The NLL of training images under a posterior cannot exceed the negative log evidence an image, if the "
    "posterior is right. Where no link is named, probabilities are averaged over samples. The last column is the "
    "processor time of a fit at the chosen precision, as a multiple of the Laplace fit.",
    (
        "method",
        "prior precision",
        "- log evidence / N",
        "training NLL",
        "NLL",
        "ECE",
        "NLL, probit link",
        "Laplace fits",
    ),
    read,
    write,
    "variational.json",
    [
        Remark(
            'At the optimum of the evidence "full", Lanczos and the last layer predict training images worse than that '
            "evidence says, and every Laplace posterior has two to four times the NLL of MAP on test images. No "
            "variational posterior predicts training images worse than its bound says.",
            lambda rows: (
                all(
                    value(rows, f"{name}, laplace", "train_nll") > value(rows, f"{name}, laplace", "evidence")
                    for name in ("full", "Lanczos", "last layer, full")
                )
                and all(
                    1.9 < value(rows, f"{name}, laplace", "nll") / value(rows, "MAP", "nll") < 4.1
                    for name in STRUCTURES
                )
                and all(
                    value(rows, f"{name}, variational", "train_nll") < value(rows, f"{name}, variational", "evidence")
                    for name in STRUCTURES
                )
            ),
        ),
        Remark(
            "Through the probit link the variational posteriors of all weights are near MAP and above MAP with a "
            "temperature. Averaged over samples, those with covariances between weights have about twice the NLL: they "
            "are wide, and 100 samples, or 32 with Lanczos, do not cover them.",
            lambda rows: (
                all(
                    value(rows, "MAP + T", "nll")
                    < value(rows, f"{name}, variational", "probit_nll")
                    < 1.25 * value(rows, "MAP", "nll")
                    for name in STRUCTURES[:-1]
                )
                and all(
                    value(rows, f"{name}, variational", "nll") / value(rows, f"{name}, variational", "probit_nll") > 1.7
                    for name in ("full", "Lanczos", "kron")
                )
            ),
        ),
        Remark(
            'A variational fit from the weights takes 9 Laplace fits for the last layer, 11 for "full", and 40 to 90 '
            "for the others, whose Laplace fit takes a fraction of a second where the rows of the Jacobian are kept.",
            lambda rows: all(
                low < value(rows, f"{name}, variational", "fits") < high
                for name, low, high in zip(STRUCTURES, (10, 35, 35, 35, 8), (12, 95, 95, 95, 10), strict=True)
            ),
        ),
    ],
)
