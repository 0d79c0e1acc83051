"""Evaluate a finished run again, on another split or other out-of-distribution images.

python -m training.evaluate checkpoints/van_digits --split test --ood inverted
"""

import sys

if __name__ == "__main__":  # The imports below take seconds.
    from training.cli.interruption import end_while_loading

    end_while_loading()

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console

from training import lock, posteriors, trained_on
from training.cli import interruption, program
from training.cli.arguments import parse_record
from training.config import Config
from training.data.load import load, with_statistics
from training.errors import UserError
from training.models import van
from training.report import evaluation
from training.report.html import write_results
from training.train.checkpoints import load_trained
from training.workdir import load_saved_config, why_not_writable


def _as_in_the_run(metavar: str) -> object:
    """Describe an option whose default, None, stands for the setting of the run."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="(default: as in the run)")


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Evaluate a finished run again, from its work directory alone.

    Writes metrics.json, report.html and figures to WORKDIR/evaluation-SPLIT-OOD. A run that keeps no posteriors has
    them fitted first.
    """

    workdir: Annotated[Path, tyro.conf.Positional]
    """The work directory of a run of training.fit_van."""
    split: Annotated[Literal["test", "validation"] | None, _as_in_the_run("test|validation")] = None
    """The split to evaluate on. The validation images also chose the temperature and the prior
    precisions, so scores on them are not held-out scores. The report says so."""
    ood: Annotated[str | None, _as_in_the_run("NAME")] = None
    """Out-of-distribution images: inverted, noise, or a prepared TFDS set."""
    examples: Annotated[int | None, _as_in_the_run("COUNT")] = None
    """Evaluate on at most this many images, stratified by class, and as many out-of-distribution ones."""
    data_dir: Annotated[Path | None, _as_in_the_run("DIR")] = None
    """The TFDS data directory."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return program.run(lambda console: evaluate(sys.argv[1:] if argv is None else argv, console), "--data-dir")


def evaluate(argv: Sequence[str], console: Console) -> None:
    """Read config, weights and posteriors of a run, verify them, and evaluate."""
    arguments = parse_record(Arguments, argv, "python -m training.evaluate")
    report = program.reporter(console)
    saved = load_saved_config(arguments.workdir, report)
    chosen = {name: value for name in ("split", "ood", "examples") if (value := getattr(arguments, name)) is not None}
    config = dataclasses.replace(
        saved,
        evaluation=dataclasses.replace(saved.evaluation, **chosen),
        data=dataclasses.replace(saved.data, dir=arguments.data_dir or saved.data.dir),
    )
    directory = arguments.workdir / f"evaluation-{config.evaluation.split}-{config.evaluation.ood}"
    if fault := why_not_writable(directory):
        raise UserError(f"the work directory must be writable; got {fault}; evaluate a copy of it")
    words = ["-m", "training.evaluate", *argv]
    command = shlex.join([(sys.orig_argv or ["python"])[0], *words])
    with lock.held(arguments.workdir, shared=True, report=report), program.continued_by(command):
        _evaluate(arguments.workdir, directory, config, ["python", *words], console)


def _evaluate(workdir: Path, directory: Path, config: Config, command: Sequence[str], console: Console) -> None:
    report = program.reporter(console)
    watch = program.Stopwatch(console)
    with watch.stage("data"), interruption.promptly("stopped in stage data; nothing is written"):
        trained = load_trained(workdir, config, report)
        data = load(config.data)
        trained_on.require_same(workdir, data, config.data.dir)
        foreign = evaluation.foreign_images(config, data)
        config = dataclasses.replace(config, data=with_statistics(config.data, data.train.images))
        module = van.from_config(config, len(data.class_names))
        network = posteriors.make_network(module, trained.params, trained.batch_stats)
        fitted = posteriors.load(workdir, network, config, report) if posteriors.are_kept(workdir) else None
    if fitted is None:
        report("the run keeps no posteriors: fitting them on its training images")
        with watch.stage("posterior"):
            fitted = posteriors.fit(config, data, network, trained.prior, console)
    with watch.stage("evaluation"):
        results = evaluation.evaluate(config, data, foreign, trained, fitted, watch.seconds)
        # Not the command that trains, which would make another network.
        results = dataclasses.replace(results, command=command)
    with lock.held(directory, report=report):
        write_results(directory, results, console)


if __name__ == "__main__":
    sys.exit(main())
