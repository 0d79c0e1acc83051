"""Put several runs of one experiment, such as those of several seeds, into one table: mean and range of each metric.

python -m training.summarise checkpoints/van_digits checkpoints/van_digits_1 checkpoints/van_digits_2
"""

import sys

if __name__ == "__main__":  # The imports below take seconds.
    from training.cli.interruption import end_while_loading

    end_while_loading()

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import tyro
from rich.console import Console

from training import sealed
from training.cli import program
from training.cli.arguments import parse_record
from training.errors import UserError
from training.report.numbers import digits
from training.report.results import FORMAT_VERSION
from training.settings import flattened

# Settings that may differ between the runs of one experiment: none of them but the seed changes a result.
_MAY_DIFFER = ("seed", "data.dir", "curvature.microbatch")

# Format 1 differs in the labels of posteriors alone, as far as is read here.
_FORMATS = (1, FORMAT_VERSION)

_METRICS = ("accuracy", "nll", "ece", "brier", "confidence", "auroc", "fpr95")


class Run(NamedTuple):
    """The part of a `metrics.json` that the table needs. A value that was not finite is None."""

    data: str
    split: str
    ood: str | None
    labels: tuple[str, ...]
    """Labels of the methods, in order."""
    num_images: int
    """Images in the split."""
    seed: int
    seconds: float
    precisions: tuple[float | None, ...]
    """Prior precision of each method. None if the method has no prior."""
    scores: tuple[dict[str, float | None], ...]
    """For each method, its value of each metric."""
    evidence: dict[str, float | None]
    """Highest log evidence on the grid, or lower bound of a variational posterior, by structure."""
    config: dict[str, Any]
    """Settings by the dotted name of their field."""
    nll_differences: tuple[tuple[float | None, float | None], ...]
    """For each method, the paired 95 % interval of its NLL minus the NLL of MAP."""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Print a Markdown table: for each method the mean over runs and, in brackets, the lowest and the highest value.

    Prior precisions spread over decades, so their mean is geometric. Lines below the table say in how many runs the
    NLL of a method differs from that of MAP.
    """

    workdirs: Annotated[
        tyro.conf.Positional[tuple[Path, ...]],
        tyro.conf.arg(metavar="PATH [PATH ...]", help_behavior_hint="(at least one is required)"),
    ]
    """Directories that hold a metrics.json: work directories of finished runs, or evaluations of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return program.run(lambda console: summarise(sys.argv[1:] if argv is None else argv, console))


def summarise(argv: Sequence[str], console: Console) -> None:
    """Read the metrics of each run and print the table."""
    arguments = parse_record(Arguments, argv, "python -m training.summarise")
    if not arguments.workdirs:
        raise UserError(
            "the work directories of one or more finished runs must be named; got none; try python -m "
            "training.summarise checkpoints/digits"
        )
    for line in table([read(workdir) for workdir in arguments.workdirs]):
        console.out(line, highlight=False)


def read(workdir: Path) -> Run:
    """Read the part of `workdir/metrics.json` that the table needs.

    Raises
    ------
    UserError
        The file is missing, damaged, or of another program or format. The message names it.
    """
    path = workdir / "metrics.json"
    try:
        content, _ = sealed.load(path)
    except FileNotFoundError as error:
        raise UserError(f"{workdir} must hold metrics.json; {error.strerror}; finish the run first") from error
    except UserError as error:
        raise UserError(f"{path} must be JSON as it was written; {error}; run training.evaluate again") from error
    version = content.get("format_version")
    if isinstance(version, bool) or version not in _FORMATS:
        raise UserError(
            f"{path} must be the metrics of a run in format {' or '.join(map(str, _FORMATS))}; got "
            f"{'no format' if version is None else f'format {version!r}'}; run training.evaluate again, or leave it out"
        )
    try:
        return _parsed(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{path} must be the metrics of a run, complete; got {fault}; run training.evaluate again, or leave it out"
        ) from error


def _parsed(content: dict[str, Any]) -> Run:
    methods, split = content["methods"], content["split"]
    return Run(
        data=content["data"],
        split=split,
        ood=content["ood"],
        labels=tuple(method["label"] for method in methods),
        num_images=content.get("num_evaluated", content["num_images"][split]),  # all, in earlier releases
        seed=content["seed"],
        seconds=sum(content["seconds"].values()),
        precisions=tuple(_number(method["prior_precision"]) for method in methods),
        scores=tuple({name: _number(method["metrics"][name]["value"]) for name in _METRICS} for method in methods),
        evidence={
            name: max((value for value in map(_number, curve["log_evidence"]) if value is not None), default=None)
            for name, curve in content["curves"].items()
        },
        config=flattened(content["config"]),
        nll_differences=tuple(
            (_number(interval["low"]), _number(interval["high"]))
            for interval in (method["difference_from_map"]["nll"] for method in methods)
        ),
    )


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def table(runs: Sequence[Run]) -> list[str]:
    """Return the lines of the table.

    Raises
    ------
    UserError
        The runs differ in their data, splits, methods, or settings other than the seed.
    """
    first = runs[0]
    _require_same_settings(runs)
    if len({(run.data, run.split, run.ood, run.labels, tuple(run.evidence)) for run in runs}) != 1:
        raise UserError(
            "all runs must be of one experiment; these differ in data, split or methods; compare like with like"
        )
    averaged = "prior precision" if len(runs) == 1 else "prior precision (geometric mean)"
    lines = [f"| method | {averaged} | " + " | ".join(_METRICS) + " |", "|---" * (len(_METRICS) + 2) + "|"]
    for index, label in enumerate(first.labels):
        precisions = [run.precisions[index] for run in runs]
        cells = [label, "–" if precisions[0] is None else _range(precisions, digits, statistics.geometric_mean)]
        cells += [_range([run.scores[index][name] for run in runs], "{:.3f}".format) for name in _METRICS]
        lines.append("| " + " | ".join(cells) + " |")
    seconds = [run.seconds for run in runs]
    lines.append("")
    lines.append(
        f"{first.data}, {first.split}, {first.num_images} images; out of distribution: {first.ood}; "
        f"seeds {', '.join(str(run.seed) for run in runs)}; {min(seconds):.0f} to {max(seconds):.0f} s a run."
    )
    for name in first.evidence:
        highest = _range([run.evidence[name] for run in runs], "{:.0f}".format)
        lines.append(f"Highest log evidence or lower bound on the grid, {name}: {highest} nats.")
    lines += ["", "NLL against that of MAP, by the paired 95 % interval of each run:"]
    for index, label in enumerate(first.labels[1:], start=1):
        lines.append(f"- {label}: {_verdicts([run.nll_differences[index] for run in runs])}")
    return lines


def _require_same_settings(runs: Sequence[Run]) -> None:
    names = sorted({name for run in runs for name in run.config} - set(_MAY_DIFFER))
    values = {name: list(dict.fromkeys(repr(run.config.get(name)) for run in runs)) for name in names}
    if differing := [f"{name}: {', '.join(different)}" for name, different in values.items() if len(different) > 1]:
        raise UserError(
            f"all runs must be of one experiment, of the same settings beside the seed; these differ in "
            f"{'; '.join(differing)}; compare like with like"
        )


def _verdicts(differences: Sequence[tuple[float | None, float | None]]) -> str:
    """Say in how many runs the interval lies below zero, above zero, or neither. One that is not finite is neither."""
    better = sum(high is not None and high < 0 for _, high in differences)
    worse = sum(low is not None and low > 0 for low, _ in differences)
    return f"better in {better}, worse in {worse}, not told in {len(differences) - better - worse}"


def _range(
    values: Sequence[float | None],
    written: Callable[[float], str],
    mean: Callable[[Sequence[float]], float] = statistics.fmean,
) -> str:
    """Write the mean and, in brackets, the lowest and the highest value."""
    if any(value is None for value in values):
        return "not finite"
    if len(values) == 1:
        return written(values[0])
    return f"{written(mean(values))} [{written(min(values))}, {written(max(values))}]"


if __name__ == "__main__":
    sys.exit(main())
