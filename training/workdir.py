"""The work directory of a run: which run may use it, the config that it keeps, and how its files are written."""

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bnnlaplace.checkpoint import replacing
from training.config import Config, from_json, to_json
from training.errors import UserError

CONFIG_FILE = "config.json"

POSTERIORS = "laplace"
"""The folder of a work directory that holds the fitted posteriors."""

# Settings that a run may leave to measurement: there None agrees with any saved value.
_MEASURED = {"data.mean", "data.std"}

# Settings that a resumed run may always change: how it is evaluated, and how many images are in memory at once.
_CHANGEABLE = ("evaluation.", "curvature.microbatch:")


def open_workdir(workdir: Path, config: Config, resume: bool) -> Config:
    """Claim a work directory for a run, and return the config to run with.

    ======================================  ===============================  ==================
    the directory                           without ``resume``               with ``resume``
    ======================================  ===============================  ==================
    is absent, or empty                     is created; the config is saved  the same
    holds only a config                     is used; the config is saved     is used; see below
    holds a partial or finished run of it   UserError                        is used; see below
    holds a run of another config           UserError with the differences   the same
    holds other files                       UserError                        UserError
    ======================================  ===============================  ==================

    A directory holds only a config if a run ended before it kept anything. A finished run that is resumed keeps its
    training and goes on to the posteriors and the evaluation.

    A resumed run may change settings with which nothing on disk was computed. It may always change ``evaluation`` and
    ``curvature.microbatch`` (memory, not results). It may change the rest of ``curvature`` if no posterior is fitted
    yet and no online update of the prior used it during training. The config is saved with the change. Pixel
    statistics that ``config`` leaves to measurement are taken from the saved config.

    Raises
    ------
    UserError
        See the table. Also if the directory cannot be written.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"`--workdir` must be a directory; {workdir} is a file; use another --workdir")
    if fault := why_not_writable(workdir):
        raise UserError(f"`--workdir` must be writable; got {fault}; use another --workdir, or free the disk")
    entries = list(workdir.iterdir()) if workdir.exists() else []
    entries = sorted(entry for entry in entries if not entry.name.startswith("."))
    if not entries:
        save_config(workdir, config)
        return config
    if CONFIG_FILE not in (entry.name for entry in entries):
        raise UserError(
            f"`--workdir` must be new, empty, or hold a run; {workdir} holds {entries[0].name} and no {CONFIG_FILE}; "
            "use another --workdir"
        )
    saved = load_saved_config(workdir)
    # An empty file, such as the log before its first record, holds nothing that could be lost.
    holds_more = any(entry.name != CONFIG_FILE and not _is_empty_file(entry) for entry in entries)
    if not holds_more and not resume:
        save_config(workdir, config)
        return config
    _require_same_run(workdir, saved, config, holds_more)
    if not resume:
        raise UserError(
            f"a run must not overwrite another; {workdir} holds one that these settings continue; "
            "continue it with --resume, or use another --workdir"
        )
    continued = dataclasses.replace(saved, evaluation=config.evaluation, curvature=config.curvature)
    if continued != saved:
        save_config(workdir, continued)
    return continued


def _is_empty_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _require_same_run(workdir: Path, saved: Config, config: Config, holds_more: bool) -> None:
    """Refuse settings with which the files in the directory would be different."""
    curvature_used = (workdir / POSTERIORS).exists() or config.prior.update == "online"
    changeable = _CHANGEABLE if curvature_used else (*_CHANGEABLE, "curvature.")
    differences = [line for line in describe_difference(saved, config) if not line.startswith(changeable)]
    if not differences:
        return
    advice = "the same settings with --resume"
    if not holds_more:
        advice = "start anew there without --resume"
    elif config.prior.update == "fixed" and all(line.startswith("curvature.") for line in differences):
        advice = f"remove {workdir / POSTERIORS} to have the posteriors fitted again"
    raise UserError(
        f"`--workdir` must hold a run of the same settings; {workdir} differs in {'; '.join(differences)}; "
        f"use another --workdir, or {advice}"
    )


def save_config(workdir: Path, config: Config) -> None:
    """Write `workdir/config.json`, atomically."""
    write_atomically(workdir / CONFIG_FILE, to_json(config))


def load_saved_config(workdir: Path) -> Config:
    """Read `workdir/config.json` back, every field in its declared type."""
    path = workdir / CONFIG_FILE
    try:
        return from_json(path.read_text())
    except FileNotFoundError:
        raise UserError(f"a work directory must hold {CONFIG_FILE}; {workdir} does not; check the path") from None
    except (UserError, UnicodeDecodeError) as error:
        advice = "restore it, or use another --workdir"
        raise UserError(f"{path} must be a config as it was saved; {error}; {advice}") from None


def describe_difference(there: Config, here: Config) -> list[str]:
    """Write one line for each field that differs, such as ``optimizer.learning_rate: 0.003 there, 0.001 here``.

    Pixel statistics that are None here are left to measurement, so they agree with any there.
    """
    ours = dict(_fields(here))
    return [
        f"{name}: {value} there, {ours[name]} here"
        for name, value in _fields(there)
        if value != ours[name] and not (name in _MEASURED and ours[name] is None)
    ]


def _fields(record: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """List the dotted names and the values of all fields."""
    flat: list[tuple[str, Any]] = []
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        name = prefix + field.name
        flat += _fields(value, f"{name}.") if dataclasses.is_dataclass(value) else [(name, value)]
    return flat


def write_atomically(path: Path, text: str) -> None:
    """Write a text file. Readers see the old content or the new one, never a part.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file. The new file replaces `path` when the block ends.

    Raises
    ------
    UserError
        The file cannot be written. The old file is still there.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(
            f"{path} must be writable; got {error.strerror or error}; free the disk or choose another directory"
        ) from error


def why_not_writable(directory: Path) -> str | None:
    """Say why no file can be made in a directory, which need not exist. If a file can be made: None.

    The check leaves nothing behind and does not make the directory.
    """
    place = directory.absolute()
    try:
        while not place.exists():
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place}: {error.strerror or error}"
