"""Atomic writes: under its final name a file or directory is complete, or it does not exist.

It is made in a hidden directory beside the final name, flushed to disk, and renamed. That directory is locked while it
is in use, so two writers wait for each other. The system releases the lock of a killed process. Then the next writer or
reader finds the directory unlocked and clears it away:

    .x.writing/
      new         what is being written
      replaced    the old directory, between the two renames that replace one
"""

import errno
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where writers to one path do not wait for each other
    fcntl = None

from bnnlaplace.checkpoint.errors import shown

_NEW, _REPLACED = "new", "replaced"
# What a killed save of release 0.1.0 leaves in the hidden directory.
_EARLIER = ("arrays", "arrays.", "metadata.json", "manifest.json")
# A killed write of it to one of these left a file in place of the hidden directory.
_EARLIER_FILES = (".json", ".html", ".png")


def holds_something(path: Path) -> str | None:
    """Say what a directory holds, if anything: such a one must not be replaced."""
    if not path.is_dir():
        return None
    first = min((entry.name for entry in os.scandir(path)), default=None)
    return None if first is None else f"a directory that holds {first!r}"


@contextmanager
def replacing(path: Path, refusal: Callable[[Path], str | None] = holds_something) -> Iterator[Path]:
    """Yield a temporary path. The file or directory that the block makes there then takes the place of `path`.

    Until then `path` stays as it was, and it stays so if the block fails. A process killed at any point leaves the old
    content or the new. To replace a directory takes two renames; between them the old one is in a hidden directory,
    from which `recover` puts it back. Parents are created. If another process writes to the same path, this one waits.

    Parameters
    ----------
    path
        The file or directory to write or to replace. A symbolic link is followed: what it points to is replaced.
    refusal
        Called with what is at `path`, before anything is written. It returns None if that may be replaced. Otherwise it
        says what is there. By default files and empty directories may be replaced.

    Raises
    ------
    OSError
        If the file system refuses: the disk is full, a parent is a file, or permission is missing. Also if what is at
        `path` must not be replaced. That is true of the current directory, the home directory and all their parents, of
        mounted file systems, of links to nowhere, and of devices.
    """
    target = _followed(path)
    _check_replaceable(target, refusal)
    made = _make_parents(target.parent)
    try:
        with _locked_workspace(target) as workspace:
            new, replaced = workspace / _NEW, workspace / _REPLACED
            try:
                yield new
                _flush(new)
                _check_replaceable(target, refusal)  # the block may have taken hours
                if target.is_dir() and any(target.iterdir()):  # a rename cannot replace a full directory
                    os.replace(target, replaced)
                os.replace(new, target)
            except BaseException:
                _put_back(replaced, target)
                raise
            _flush_entry(target.parent)
    except BaseException:
        for parent in made:
            with suppress(OSError):  # another process may use it by now
                parent.rmdir()
        raise


def write_text(path: Path, text: str) -> None:
    """Write a file in UTF-8 by `replacing`: a reader sees all of the old text or all of the new.

    Parameters
    ----------
    path
        The file to write or to replace.
    text
        All of its new text.

    Raises
    ------
    OSError
        If the file system refuses, as for `replacing`.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def recover(path: Path) -> None:
    """Clear away what a killed write to `path` left, and put the old directory back if it was moved aside.

    Nothing is done while another process writes, except to wait for the moment between its two renames. Nothing is done
    on a file system that cannot be written either.
    """
    target = Path(os.path.realpath(path))
    with suppress(OSError):
        earlier = target.with_name(f".{target.name}.replaced")  # of release 0.1.0
        if earlier.is_dir() and not target.exists():
            os.replace(earlier, target)
        workspace = _workspace_of(target)
        if workspace.is_dir():
            is_between = not target.exists() and (workspace / _REPLACED).exists()
            with _locked_workspace(target, wait=is_between):
                pass


# --- what may be replaced -------------------------------------------------------------------------------------------


def _followed(path: Path) -> Path:
    """The absolute path without symbolic links. Raise FileNotFoundError if a link leads nowhere."""
    target = Path(os.path.realpath(path))
    if path.is_symlink() and not path.exists():
        raise FileNotFoundError(
            f"the path to write must not be a link to nowhere; got {shown(path)}; create {shown(target)}"
        )
    return target


def _check_replaceable(target: Path, refusal: Callable[[Path], str | None]) -> None:
    """Raise FileExistsError if something is at `target` that must not be replaced."""
    try:
        kind = os.lstat(target).st_mode
    except FileNotFoundError:
        return
    found = None
    if stat.S_ISDIR(kind):
        found = _place_of(target) or refusal(target)
    elif stat.S_ISREG(kind):
        found = refusal(target)
    else:
        found = "neither a file nor a directory"
    if found is not None:
        raise FileExistsError(f"the path to write must be free; {shown(target)} is {found}; choose another path")


def _place_of(target: Path) -> str | None:
    """Say which place a directory is that nobody means to replace, even if it is empty."""
    places = {"the current directory": ".", "the home directory": os.path.expanduser("~")}
    for name, place in places.items():
        try:
            here = Path(os.path.realpath(place))
        except FileNotFoundError:  # the current directory was removed
            continue
        if target == here:
            return name
        if target in here.parents:
            return f"a parent of {name}"
    return "a mounted file system" if os.path.ismount(target) else None


def _make_parents(directory: Path) -> list[Path]:
    """Create a directory with its parents. Return those that did not exist, the deepest first."""
    missing = [place for place in (directory, *directory.parents) if not place.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return missing


# --- the hidden directory -------------------------------------------------------------------------------------------


def _workspace_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.writing")


@contextmanager
def _locked_workspace(target: Path, wait: bool = True) -> Iterator[Path]:
    """Make, lock and clear the hidden directory of a target; remove it at the end.

    Raises
    ------
    BlockingIOError
        If another process holds it, and this one should not wait.
    """
    workspace = _workspace_of(target)
    with _locked(workspace, wait):
        _check_ours(workspace)
        try:
            _put_back(workspace / _REPLACED, target)
            _clear(workspace)
            yield workspace
        finally:
            with suppress(OSError):
                _clear(workspace)
                workspace.rmdir()


@contextmanager
def _locked(directory: Path, wait: bool) -> Iterator[None]:
    """Hold the lock of a directory, which is made if it is absent."""
    if fcntl is None:
        directory.mkdir(exist_ok=True)
        yield
        return
    lock = _lock(directory, wait)
    try:
        yield
    finally:
        os.close(lock)


def _lock(directory: Path, wait: bool) -> int:
    """Return an open descriptor of a directory that carries its lock."""
    while True:
        with suppress(FileExistsError):
            directory.mkdir()
        try:
            lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # its last holder removed it after we saw it
        except NotADirectoryError:
            _remove_earlier_file(directory)
            continue
        try:
            with _without_locks_on_network_files():
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # The holder that we waited for has removed the directory, and somebody may have made another one.
            if os.path.samestat(os.fstat(lock), os.stat(directory)):
                return lock
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(lock)
            raise
        os.close(lock)


@contextmanager
def _without_locks_on_network_files() -> Iterator[None]:
    """Go on where the file system has no locks: there writers to one path must not run at once."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EBADF, errno.EINVAL):
            raise


def _remove_earlier_file(workspace: Path) -> None:
    """Remove what a killed write of release 0.1.0 left. Raise FileExistsError if something else is there."""
    target = workspace.name.removesuffix(".writing")
    if workspace.is_symlink() or not workspace.is_file() or not target.endswith(_EARLIER_FILES):
        raise FileExistsError(f"{shown(workspace)} must be free for an unfinished write; move what is there away")
    workspace.unlink()


def _check_ours(workspace: Path) -> None:
    """Raise FileExistsError if the hidden directory holds what no write of ours makes."""
    for entry in workspace.iterdir():
        if entry.name not in (_NEW, _REPLACED) and not entry.name.startswith(_EARLIER):
            raise FileExistsError(
                f"{shown(workspace)} must hold an unfinished write; it holds {entry.name!r}; move it away"
            )


def _put_back(replaced: Path, target: Path) -> None:
    """Put the old directory back if a write ended between moving it aside and moving the new one in."""
    # A program that is started again may have created its empty directory by then.
    if replaced.exists() and not (target.exists() and (target.is_file() or any(target.iterdir()))):
        os.replace(replaced, target)


def _clear(workspace: Path) -> None:
    for entry in workspace.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


# --- flushing -------------------------------------------------------------------------------------------------------


def _flush(path: Path) -> None:
    """Force a file, or all of a directory, to disk, so that the rename never reaches the disk before the content."""
    for entry in [*path.rglob("*"), path]:
        _flush_entry(entry)


def _flush_entry(entry: Path) -> None:
    if entry.is_dir() and os.name == "nt":
        return  # Windows neither needs nor allows flushing a directory.
    descriptor = os.open(entry, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
