"""Command lines as typed records, and the config file that a command line of `training.fit_van` starts from.

A config file is a Python file that defines ``config``, a `training.config.Config`. It is code: to read it is to run it.
Its docstring is the card of the experiment: command, hardware, time, expected result. The command line overrides single
fields. A run that is resumed starts from the settings in its work directory.
"""

import argparse
import contextlib
import dataclasses
import io
import runpy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from training.config import Config, checked
from training.errors import UserError, one_line
from training.workdir import CONFIG_FILE, load_saved_config

DEFAULT_CONFIG = Path("configs/van_digits.py")

ROOT = Path(__file__).resolve().parents[2]

Record = TypeVar("Record")

_FRAME = "│╭╮╰╯─ "


def parse_record(record: type[Record], argv: Sequence[str], program: str, **options: Any) -> Record:
    """Read the arguments into a record. `tyro.cli` does the work and takes the `options`.

    Raises
    ------
    UserError
        An option is unknown, has no value, or has a value of the wrong type. The message names the option and `--help`.
    SystemExit
        After `--help`.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(record, args=list(argv), prog=program, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
    raise UserError(f"{first_paragraph(said.getvalue())}; see {program} --help")


def first_paragraph(box: str) -> str:
    """Return the fault from the box that tyro draws, as one line, without help texts and suggestions."""
    lines = []
    for line in box.splitlines():
        text = line.strip(_FRAME)
        if text and not line.startswith("╭"):  # The corner begins the line of the title.
            lines.append(text)
        elif lines:
            break
    said = " ".join(lines).removeprefix("Error parsing ").removesuffix(" (required)").rstrip(".")
    return said or "the arguments must be those that the program knows"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a Visual Attention Network, fit Laplace and variational posteriors to it, and evaluate all of them.

    Every setting below comes from the config file, or with --resume from the work directory. An option overrides it.
    """

    config: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The experiment: a Python file that defines `config`. The defaults shown below come from this file. It is code
    that is executed: use files that you trust."""
    workdir: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Where the run writes its config, log, checkpoints and report; default: checkpoints/<name of the config file>."""
    resume: tyro.conf.FlagCreatePairsOff[bool]
    """Continue the run in the work directory, with the settings saved there; --config is not needed. Its numbers will
    be the same as without an interruption. If its training has finished, go on with the posteriors and the evaluation.
    """
    settings: Annotated[Config, tyro.conf.arg(name="")]


def parse(argv: Sequence[str], program: str) -> Arguments:
    """Parse ``--config FILE --workdir DIR --resume`` and one option for every field of the config.

    With ``--resume`` and without ``--config`` the settings are those saved in the work directory, if it has any.

    Parameters
    ----------
    argv
        The arguments after the program's name.
    program
        What the user typed to start the program, for `--help`.

    Raises
    ------
    UserError
        The config file or the saved config cannot be used, an option is unknown, or a value has the wrong type or is
        out of its range.
    SystemExit
        After `--help`.
    """
    given = _scan(argv)
    config = find_config(given.config or DEFAULT_CONFIG)
    workdir = given.workdir or Path("checkpoints") / config.stem
    saved = workdir / CONFIG_FILE
    if given.resume and given.config is None and saved.exists():
        config, settings = saved, load_saved_config(workdir)
    else:
        settings = load_config(config)
    default = Arguments(config=config, workdir=workdir, resume=False, settings=settings)
    arguments = parse_record(Arguments, argv, program, default=default, config=())
    return dataclasses.replace(arguments, config=config)


def load_config(path: Path) -> Config:
    """Run a config file and return the ``config`` that it defines.

    Raises
    ------
    UserError
        The file does not exist, fails, or does not define a `Config` called ``config`` whose values are all valid.
    """
    return load_definition(path, "config", Config, checked)


def load_definition(path: Path, name: str, record: type[Record], check: Callable[[Record], Record]) -> Record:
    """Run a Python file, and return a record that it defines under a name, as `check` returns it.

    Raises
    ------
    UserError
        The file does not exist, fails, or does not define such a record. Or `check` raises it.
    """
    if not path.is_file():
        known = ", ".join(str(file) for file in sorted((ROOT / "configs").glob("*.py"))) or "none"
        raise UserError(f"`--config` must name a Python file; there is none at {path}; known configs: {known}")
    try:
        names = runpy.run_path(str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # such as SystemExit
        fault = one_line(error)
        raise UserError(f"a config file must run without errors; {path} raised {fault}; mend the file") from None
    defined = names.get(name)
    if not isinstance(defined, record):
        present = "nothing of that name" if name not in names else type(defined).__name__
        raise UserError(
            f"a config file must define `{name}`, a {record.__module__}.{record.__name__}; {path} has {present}; "
            "define it"
        )
    try:
        return check(defined)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


@dataclasses.dataclass
class _Given:
    """The options that decide which settings the others start from."""

    config: Path | None = None
    workdir: Path | None = None
    resume: bool = False


def _scan(argv: Sequence[str]) -> _Given:
    """Find the options that are needed before tyro runs, because tyro shows defaults that depend on them."""
    scanner = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scanner.add_argument("--config", type=Path)
    scanner.add_argument("--workdir", type=Path)
    scanner.add_argument("--resume", action="store_true")
    given = _Given()
    with contextlib.suppress(argparse.ArgumentError):  # A value is missing, and tyro will say so.
        scanner.parse_known_args(argv, namespace=given)
    return given


def find_config(path: Path) -> Path:
    """Return the path as given, or the same path below the repository, so that the programs run from anywhere."""
    return ROOT / path if not path.exists() and (ROOT / path).exists() else path
