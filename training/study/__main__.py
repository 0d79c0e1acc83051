"""Compare methods over regimes of data and seeds: train, fit posteriors, measure, and put all into tables.

python -m training.study --config configs/study_digits.py --workdir checkpoints/study_digits --resume
"""

import sys

if __name__ == "__main__":  # The imports below take seconds.
    from training.cli.interruption import end_while_loading

    end_while_loading()

import dataclasses
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from training import lock
from training.cli import program
from training.cli.arguments import find_config, load_definition, parse_record
from training.errors import UserError
from training.study import store, summary
from training.study.cell import run_cells
from training.study.config import Study, from_document, to_document
from training.study.networks import check_trainings

PROGRAM = "python -m training.study"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Run the cells of a study that are missing, one after another, and summarise those that are there.

    A cell is one regime of data with one seed. Each of its methods is kept as soon as it is finished.
    """

    workdir: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Where the study keeps its networks, its results and its summary."""
    config: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """A Python file that defines `study`; default: the study that the work directory holds. It is code that is
    executed: use files that you trust."""
    resume: tyro.conf.FlagCreatePairsOff[bool] = False
    """Continue the study in the work directory. The config may have more regimes, seeds, trainings and posteriors, and
    show other methods. All that is there must have been computed with its settings."""
    summary_only: tyro.conf.FlagCreatePairsOff[bool] = False
    """Compute nothing but the summary of what is there."""
    regimes: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Run only the cells of these regimes; default: all."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="SEED ...")] = ()
    """Run only the cells of these seeds; default: all."""
    data_dir: Annotated[Path | None, tyro.conf.arg(metavar="DIR")] = None
    """The TFDS data directory; default: that of the config."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return program.run(lambda console: run(sys.argv[1:] if argv is None else argv, console), "--data-dir")


def run(argv: Sequence[str], console: Console) -> None:
    """Run what is missing, and summarise."""
    arguments = parse_record(Arguments, argv, PROGRAM)
    root, report = arguments.workdir, program.reporter(console)
    study = _study(arguments)
    units = store.units_of(study, arguments.regimes, arguments.seeds)
    again = shlex.join([(sys.orig_argv or ["python"])[0], "-m", "training.study", *_with_resume(argv)])
    with lock.held(root, report=report), program.continued_by(again):
        if not arguments.summary_only:
            check_trainings(study, arguments.regimes)
            store.claim_study(root, study, arguments.resume)
            run_cells(study, units, root=root, data_dir=arguments.data_dir, console=console)
        command = shlex.join(["python", "-m", "training.study", *argv])
        for line in summary.summarise(root, study, command):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def _study(arguments: Arguments) -> Study:
    """Read the study from the config file, or from the work directory, and check what is asked of it."""
    if arguments.summary_only:
        store.require_study(arguments.workdir)
    if arguments.config is None:
        study = store.load_study(arguments.workdir)
    else:
        study = load_definition(
            find_config(arguments.config), "study", Study, lambda record: from_document(to_document(record))
        )
    for option, asked, known in (
        ("regimes", arguments.regimes, [regime.name for regime in study.regimes]),
        ("seeds", arguments.seeds, list(study.seeds)),
    ):
        if unknown := [each for each in asked if each not in known]:
            raise UserError(
                f"`--{option}` must be of the study, {', '.join(map(str, known))}; got {unknown[0]}; choose among these"
            )
    return study


def _with_resume(argv: Sequence[str]) -> list[str]:
    return [*argv] if "--resume" in argv else [*argv, "--resume"]


if __name__ == "__main__":
    sys.exit(main())
