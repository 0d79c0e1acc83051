"""The work directory of a run: which run may use it, the config that it keeps, and how its files are written."""

import dataclasses
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bnnlaplace.checkpoint import replacing
from training import lock, sealed
from training.config import Config, from_document, to_document
from training.errors import StorageError, UserError
from training.settings import describe_difference

CONFIG_FILE = "config.json"

DATA_FILE = "data.json"
"""The digests of the images that a run was trained on; see `training.trained_on`."""

POSTERIORS = "laplace"
"""The folder of a work directory that holds the fitted posteriors."""

# Settings that a resumed run may always change: how it is evaluated, and how many images are in memory at once.
_CHANGEABLE = ("evaluation.", "curvature.microbatch:")


def continue_command(workdir: Path) -> str:
    """Return what to type to continue the run in a work directory, with the interpreter that runs now."""
    interpreter = (sys.orig_argv or ["python"])[0]
    return shlex.join([interpreter, "-m", "training.fit_van", "--workdir", str(workdir), "--resume"])


@contextmanager
def claimed(workdir: Path, config: Config, resume: bool, report: Callable[[str], None]) -> Iterator[Config]:
    """Claim a work directory as `open_workdir` does, and hold its lock within the block.

    `report` is told of what is unusual but no error, a line at a time.

    Raises
    ------
    UserError
        Another program uses the directory, or as `open_workdir`.
    """
    _require_usable(workdir)
    with lock.held(workdir, report=report):
        yield open_workdir(workdir, config, resume, report)


def open_workdir(
    workdir: Path, config: Config, resume: bool, report: Callable[[str], None] = lambda message: None
) -> Config:
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
    yet. The config is saved with the change. Pixel statistics that ``config`` leaves to measurement are taken from the
    saved config.

    Raises
    ------
    UserError
        See the table. Also if the directory cannot be written, or its config was changed after it was saved.
    """
    entries = _require_usable(workdir)
    if not entries:
        save_config(workdir, config)
        return config
    saved = load_saved_config(workdir, report)
    # An empty file, such as the log before its first record, holds nothing that could be lost. A run writes the digests
    # of its images before it trains.
    known = (CONFIG_FILE, DATA_FILE)
    holds_more = any(entry.name not in known and not _is_empty_file(entry) for entry in entries)
    if not holds_more and not resume:
        save_config(workdir, config)
        return config
    _require_same_run(workdir, saved, config, holds_more)
    if not resume:
        raise UserError(
            f"a run must not overwrite another; {workdir} holds one that these settings continue; "
            f"continue it with: {continue_command(workdir)}; or use another --workdir"
        )
    continued = dataclasses.replace(saved, evaluation=config.evaluation, curvature=config.curvature)
    if continued != saved:
        save_config(workdir, continued)
    return continued


def _require_usable(workdir: Path) -> list[Path]:
    """Refuse a directory that cannot be written or holds something else. Return its entries that are not hidden."""
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"`--workdir` must be a directory; {workdir} is a file; use another --workdir")
    if fault := why_not_writable(workdir):
        raise UserError(f"`--workdir` must be writable; got {fault}; use another --workdir, or free the disk")
    entries = list(workdir.iterdir()) if workdir.exists() else []
    entries = sorted(entry for entry in entries if not entry.name.startswith("."))
    if entries and CONFIG_FILE not in (entry.name for entry in entries):
        raise UserError(
            f"`--workdir` must be new, empty, or hold a run; {workdir} holds {entries[0].name} and no {CONFIG_FILE}; "
            "use another --workdir"
        )
    return entries


def _is_empty_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size == 0


def _require_same_run(workdir: Path, saved: Config, config: Config, holds_more: bool) -> None:
    """Refuse settings with which the files in the directory would be different."""
    changeable = _CHANGEABLE if (workdir / POSTERIORS).exists() else (*_CHANGEABLE, "curvature.")
    differences = [line for line in describe_difference(saved, config) if not line.startswith(changeable)]
    if not differences:
        return
    advice = f"continue with the settings that it has: {continue_command(workdir)}"
    if not holds_more:
        advice = "start anew there without --resume"
    elif all(line.startswith("curvature.") for line in differences):
        advice = f"remove {workdir / POSTERIORS} to have the posteriors fitted again"
    raise UserError(
        f"`--workdir` must hold a run of the same settings; {workdir} differs in {'; '.join(differences)}; "
        f"use another --workdir, or {advice}"
    )


def save_config(workdir: Path, config: Config) -> None:
    """Write `workdir/config.json` with its digest, atomically."""
    write_atomically(workdir / CONFIG_FILE, sealed.dump(to_document(config), indent=2))


def load_saved_config(workdir: Path, report: Callable[[str], None] = lambda message: None) -> Config:
    """Read `workdir/config.json` back, every field in its declared type.

    `report` is told if the file has no digest, as those of earlier releases.

    Raises
    ------
    UserError
        There is no such file, it is not what was saved, or it was changed afterwards.
    """
    path = workdir / CONFIG_FILE
    try:
        document, verified = sealed.load(path)
        config = from_document(document)
    except FileNotFoundError:
        raise UserError(f"a work directory must hold {CONFIG_FILE}; {workdir} does not; check the path") from None
    except UserError as error:
        raise UserError(
            f"{path} must be a config as it was saved; {error}; restore it, or use another --workdir; if you changed "
            f"it on purpose, undo that and give the change as an option of {continue_command(workdir)}, or remove the "
            f"entry {sealed.ENTRY} to have the settings compared with the checkpoints alone"
        ) from None
    if not verified:
        report(f"{path} has no entry {sealed.ENTRY}: whether it is as it was saved is unverified")
    return config


def write_atomically(path: Path, text: str) -> None:
    """Write a text file. Readers see the old content or the new one, never a part.

    Raises
    ------
    StorageError
        The file cannot be written.
    """
    with writing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def writing(path: Path) -> Iterator[Path]:
    """Yield a temporary path for a new file. The new file replaces `path` when the block ends.

    Raises
    ------
    StorageError
        The file cannot be written. The old file is still there.
    """
    try:
        with replacing(path) as temporary:
            yield temporary
    except OSError as error:
        if error.errno is None:  # a sentence already, of something else that is in the way
            raise StorageError(" ".join(str(error).split())) from error
        raise StorageError(
            f"{path} must be writable; got {error.strerror}; free the disk, or mend the permissions"
        ) from error


def why_not_writable(directory: Path) -> str | None:
    """Say why no file can be made in a directory, which need not exist. If a file can be made: None.

    The check leaves nothing behind and does not make the directory.
    """
    place = directory.absolute()
    try:
        while not place.exists():
            if place.is_symlink():
                return f"{place}: a link to nowhere"
            place = place.parent
        with tempfile.TemporaryFile(dir=place):
            return None
    except OSError as error:
        return f"{place}: {error.strerror or error}"
