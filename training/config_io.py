"""Where a run's settings come from and where they are kept: config files, the command line, `workdir/config.json`.

A config file is a Python file that defines ``config``, a `training.config.Config`; its docstring is the experiment's
card (command, hardware, time, expected result). The command line overrides single fields.
"""

import argparse
import dataclasses
import json
import os
import runpy
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from training.config import Config
from training.errors import UserError

DEFAULT_CONFIG = Path("configs/van_digits.py")

CONFIG_FILE = "config.json"

_ROOT = Path(__file__).resolve().parents[1]

# What a run may leave to measurement: None agrees with whatever the saved config records.
_MEASURED = {"data.mean", "data.std"}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Train a Visual Attention Network, put a Laplace approximation on it, and evaluate both on held-out images.

    Every setting below comes from the config file; an option overrides it.
    """

    config: Annotated[Path, tyro.conf.arg(metavar="FILE")]
    """The experiment: a Python file that defines `config`. The defaults shown below are those of this file."""
    workdir: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """Where the run writes its config, log, checkpoints and report; default: checkpoints/<name of the config file>."""
    resume: tyro.conf.FlagCreatePairsOff[bool]
    """Continue the run in the work directory to the same numbers as if it had not been interrupted; after training
    has finished, go on with what comes after it."""
    settings: Annotated[Config, tyro.conf.arg(name="")]


def parse(argv: Sequence[str], program: str) -> Arguments:
    """Parse ``--config FILE --workdir DIR --resume`` and one option for every field of the config.

    Parameters
    ----------
    argv
        The arguments after the program's name.
    program
        What the user typed to start the program, for `--help`.

    Raises
    ------
    UserError
        The config file cannot be used, or a value is out of its range.
    SystemExit
        With status 2 for an unknown option or a value of the wrong type (described on stderr), with status 0 after
        `--help`.
    """
    config = _find(_config_option(argv) or DEFAULT_CONFIG)
    settings = load_config(config)
    default = Arguments(config=config, workdir=Path("checkpoints") / config.stem, resume=False, settings=settings)
    arguments = tyro.cli(Arguments, args=list(argv), default=default, prog=program, config=())
    return dataclasses.replace(arguments, config=config)


def load_config(path: Path) -> Config:
    """Run a config file and return the ``config`` that it defines.

    Raises
    ------
    UserError
        The file does not exist, fails, or does not define a `Config` called ``config``.
    """
    if not path.is_file():
        known = ", ".join(str(file) for file in sorted((_ROOT / "configs").glob("*.py"))) or "none"
        raise UserError(f"`--config` must name a Python file; there is none at {path}; known configs: {known}")
    try:
        names = runpy.run_path(str(path))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:
        fault = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"a config file must run without errors; {path} raised {fault}; mend the file") from None
    config = names.get("config")
    if not isinstance(config, Config):
        found = "nothing of that name" if "config" not in names else type(config).__name__
        raise UserError(f"a config file must define `config`, a training.config.Config; {path} has {found}; define it")
    return config


def _config_option(argv: Sequence[str]) -> Path | None:
    """The value of `--config`, found before tyro runs because the defaults that tyro shows depend on it."""
    scanner = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scanner.add_argument("--config", type=Path)
    try:
        return scanner.parse_known_args(argv)[0].config
    except argparse.ArgumentError:
        return None  # The value is missing: tyro says so.


def _find(path: Path) -> Path:
    """The path as given, or the same path below the repository, so that the programs run from anywhere."""
    return _ROOT / path if not path.exists() and (_ROOT / path).exists() else path


# --- the work directory ---------------------------------------------------------------------------------------------


def open_workdir(workdir: Path, config: Config, resume: bool) -> Config:
    """Claim a work directory for a run, and return the config to run with.

    ======================================  ===============================  ==================
    the directory                           without ``resume``               with ``resume``
    ======================================  ===============================  ==================
    is absent, or empty                     is created; the config is saved  the same
    holds only a config, and it is equal    is used                          is used
    holds a partial or finished run of it   UserError                        is used; see below
    holds a run of another config           UserError with the differences   the same
    holds other files                       UserError                        UserError
    ======================================  ===============================  ==================

    A finished run that is resumed keeps its training and goes on to what comes after it. Pixel statistics that
    ``config`` leaves to measurement agree with whatever the saved config records, and are taken from it.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"`--workdir` must be a directory; {workdir} is a file; use another --workdir")
    entries = workdir.iterdir() if workdir.exists() else ()
    content = sorted(entry.name for entry in entries if not entry.name.startswith("."))
    if not content:
        save_config(workdir, config)
        return config
    if CONFIG_FILE not in content:
        raise UserError(
            f"`--workdir` must be new, empty, or hold a run; {workdir} holds {content[0]} and no {CONFIG_FILE}; "
            "use another --workdir"
        )
    saved = load_saved_config(workdir)
    if differences := describe_difference(saved, config):
        raise UserError(
            f"`--workdir` must hold a run of the same settings; {workdir} differs in {'; '.join(differences)}; "
            "use another --workdir, or the same settings with --resume"
        )
    if len(content) > 1 and not resume:
        raise UserError(
            f"a run must not overwrite another; {workdir} holds one with these settings; "
            "continue it with --resume, or use another --workdir"
        )
    return saved


def save_config(workdir: Path, config: Config) -> None:
    """Write `workdir/config.json`, atomically."""
    workdir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dataclasses.asdict(config), indent=2, default=str)
    temporary = workdir / f".{CONFIG_FILE}.writing"
    temporary.write_text(text + "\n")
    os.replace(temporary, workdir / CONFIG_FILE)


def load_saved_config(workdir: Path) -> Config:
    """Read `workdir/config.json` back, every field in its declared type."""
    path = workdir / CONFIG_FILE
    try:
        return _decode(Config, json.loads(path.read_text()), "")
    except FileNotFoundError:
        raise UserError(f"a work directory must hold {CONFIG_FILE}; {workdir} does not; check the path") from None
    except (ValueError, UserError) as error:
        advice = "restore it, or use another --workdir"
        raise UserError(f"{path} must be a config as it was saved; {error}; {advice}") from None


def describe_difference(there: Config, here: Config) -> list[str]:
    """One line for each field that differs, such as ``optimizer.learning_rate: 0.003 there, 0.001 here``.

    Pixel statistics that are None here (left to measurement) agree with any there.
    """
    ours = dict(_fields(here))
    return [
        f"{name}: {value} there, {ours[name]} here"
        for name, value in _fields(there)
        if value != ours[name] and not (name in _MEASURED and ours[name] is None)
    ]


def _fields(record: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Dotted names and values of all fields."""
    flat: list[tuple[str, Any]] = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        name = prefix + field.name
        flat += _fields(value, f"{name}.") if dataclasses.is_dataclass(value) else [(name, value)]
    return flat


def _decode(declared: Any, value: Any, name: str) -> Any:
    """A JSON value as the declared type, which is one of those that `training.config` uses."""
    if dataclasses.is_dataclass(declared):
        hints = typing.get_type_hints(declared)
        if not isinstance(value, dict):
            raise ValueError(f"{name or 'the file'} has the value {value!r}")
        if unknown := sorted(value.keys() - hints.keys()):
            raise ValueError(f"the field {unknown[0]} is unknown")
        # A field that a later release has added takes its default.
        return declared(**{key: _decode(hints[key], item, f"{name}.{key}".strip(".")) for key, item in value.items()})
    origin, arguments = typing.get_origin(declared), typing.get_args(declared)
    if origin is types.UnionType:
        return None if value is None else _decode(arguments[0], value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, name) for item in value)
    if origin is Literal and value in arguments:
        return value
    if declared is Path and isinstance(value, str):
        return Path(value)
    if declared is float and type(value) in (int, float):
        return float(value)
    if declared in (bool, int, str) and type(value) is declared:
        return value
    raise ValueError(f"{name} has the value {value!r}")
