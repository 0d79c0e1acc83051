"""Put several runs of one experiment, usually of several seeds, into one table: mean and range of every metric.

python -m training.summarise checkpoints/van_digits checkpoints/van_digits_1 checkpoints/van_digits_2
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from training import program
from training.errors import UserError

_METRICS = ("accuracy", "nll", "ece", "brier", "confidence", "auroc", "fpr95")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Print a Markdown table: for each method the mean over runs and, in brackets, the lowest and the highest."""

    workdirs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Directories that hold a metrics.json: work directories of finished runs, or evaluations of them."""


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit status."""
    return program.run(lambda console: summarise(sys.argv[1:] if argv is None else argv, console))


def summarise(argv: Sequence[str], console: Console) -> None:
    """Read the metrics of each run and print the table."""
    arguments = tyro.cli(Arguments, args=list(argv), prog="python -m training.summarise")
    for line in table([read(workdir) for workdir in arguments.workdirs]):
        print(line)


def read(workdir: Path) -> dict[str, Any]:
    """The content of `workdir/metrics.json`.

    Raises
    ------
    UserError
        There is none, or it is damaged.
    """
    path = workdir / "metrics.json"
    try:
        return json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{workdir} must hold metrics.json; {error.strerror}; finish the run first") from error
    except ValueError as error:
        raise UserError(f"{path} must be JSON as it was written; {error}; run training.evaluate again") from error


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The lines of the table.

    Raises
    ------
    UserError
        The runs are of different data, splits or methods.
    """
    kinds = {
        (run["data"], run["split"], run["ood"], tuple(method["label"] for method in run["methods"])) for run in runs
    }
    if len(kinds) != 1:
        raise UserError(
            "all runs must be of one experiment; these differ in data, split or methods; compare like with like"
        )
    lines = ["| method | prior precision | " + " | ".join(_METRICS) + " |", "|---" * (len(_METRICS) + 2) + "|"]
    for methods in zip(*(run["methods"] for run in runs), strict=True):
        precisions = [method["prior_precision"] for method in methods]
        cells = [methods[0]["label"], "–" if precisions[0] is None else _range(precisions, ".3g")]
        cells += [_range([method["metrics"][name]["value"] for method in methods], ".3f") for name in _METRICS]
        lines.append("| " + " | ".join(cells) + " |")
    seeds = ", ".join(str(run["seed"]) for run in runs)
    seconds = [sum(run["seconds"].values()) for run in runs]
    lines.append("")
    lines.append(
        f"{runs[0]['data']}, {runs[0]['split']}, {runs[0]['num_images'][runs[0]['split']]} images; out of distribution: "
        f"{runs[0]['ood']}; seeds {seeds}; {min(seconds):.0f} to {max(seconds):.0f} s a run."
    )
    for name in runs[0]["curves"]:
        best = [max(run["curves"][name]["log_evidence"]) for run in runs]
        lines.append(f"Highest log evidence on the grid, {name}: {_range(best, '.0f')} nats.")
    return lines


def _range(values: Sequence[float | None], form: str) -> str:
    """Mean, lowest and highest; a value that was not finite is null in the file."""
    if any(value is None for value in values):
        return "not finite"
    mean = sum(values) / len(values)
    return f"{mean:{form}}" if len(values) == 1 else f"{mean:{form}} [{min(values):{form}}, {max(values):{form}}]"


if __name__ == "__main__":
    sys.exit(main())
