"""The manifest of a checkpoint: the size and the SHA-256 of every other file, written last and believed first.

Nothing is read that the manifest does not list, and nothing but files: a link, a pipe or a device could lead elsewhere,
or never answer.
"""

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, NamedTuple

from bnnlaplace.checkpoint.errors import Damage, shown, why

ARRAYS, METADATA, MANIFEST = "arrays", "metadata.json", "manifest.json"

MAX_JSON_BYTES = 2**24
"""The largest JSON file: it describes tens of thousands of leaves, and more is not parsed."""
_MAX_JSON_CONTAINERS = 2**20  # Each takes a hundred bytes in memory, and the time of the garbage collector.

_DIGEST = re.compile(r"[0-9a-f]{64}")
# What release 0.1.0 and this one write, for directories whose manifest is damaged.
_NAMES = re.compile(
    r"manifest\.json|metadata\.json|arrays/\d{5,}\.bin|arrays/(_METADATA|_CHECKPOINT_METADATA|commit_success\.txt)"
    r"|arrays/array_metadatas/process_\d+|arrays/(ocdbt\.process_\d+/)?(manifest\.ocdbt|_sharding|d/[0-9a-f]{32})"
)


class Fingerprint(NamedTuple):
    """Size and SHA-256 of a file."""

    size: int
    sha256: str

    @classmethod
    def of(cls, content: Any) -> "Fingerprint":
        """The fingerprint of bytes in memory."""
        return cls(memoryview(content).nbytes, hashlib.sha256(content).hexdigest())


def write_manifest(directory: Path, files: dict[str, Fingerprint]) -> None:
    """Write the manifest of files by their paths in the directory, with `/` between folders."""
    listed = {name: fingerprint._asdict() for name, fingerprint in files.items()}
    (directory / MANIFEST).write_text(json.dumps({"files": listed}, indent=1), encoding="utf-8")


def read_manifest(path: Path) -> dict[str, Fingerprint]:
    """Read which files a checkpoint consists of. Raise Damage if it cannot be read, or is not a manifest."""
    manifest = path / MANIFEST
    with opened(manifest) as stream:
        document = parse(stream.read(MAX_JSON_BYTES + 1))
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, dict) or not all(_is_entry(name, entry) for name, entry in files.items()):
        raise Damage(f"{shown(manifest)} is not readable as a manifest")
    if METADATA not in files:
        raise Damage(f"{shown(manifest)} does not list {METADATA}")
    return {name: Fingerprint(entry["size"], entry["sha256"]) for name, entry in files.items()}


def _is_entry(name: str, entry: Any) -> bool:
    """Whether an entry of a manifest has a path inside the directory, a size and a digest."""
    path = PurePosixPath(name)
    if name != str(path) or path.is_absolute() or ".." in path.parts or name in (".", MANIFEST):
        return False
    if not isinstance(entry, dict) or set(entry) != {"size", "sha256"}:
        return False
    size, digest = entry["size"], entry["sha256"]
    is_size = isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 2**63
    return is_size and isinstance(digest, str) and _DIGEST.fullmatch(digest) is not None


def parse(content: bytes | bytearray) -> Any:
    """Parse JSON that somebody else may have written. If it is too long, too deep or not JSON: None."""
    if is_too_large(content):
        return None
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError, MemoryError):
        return None


def is_too_large(content: bytes | bytearray) -> bool:
    """Whether JSON is more than `parse` takes. Brackets in strings count, too."""
    return len(content) > MAX_JSON_BYTES or content.count(b"[") + content.count(b"{") > _MAX_JSON_CONTAINERS


def check_present(path: Path, listed: dict[str, Fingerprint]) -> None:
    """Raise Damage unless exactly the listed files are in the directory, with the listed sizes. Nothing is read."""
    missing = dict(listed)
    for name, file, status in _walk(path):
        if name == MANIFEST:
            continue
        is_folder = stat.S_ISDIR(status.st_mode)
        if is_folder and any(other.startswith(f"{name}/") for other in listed):
            continue
        if not stat.S_ISREG(status.st_mode) and (name in listed or not is_folder):
            raise Damage(f"{shown(file)} is {_kind(status.st_mode)}")
        if name not in missing:
            raise Damage(f"{shown(file)} is not in the manifest")
        size = missing.pop(name).size
        if status.st_size != size:
            raise Damage(f"{shown(file)} has {status.st_size} bytes instead of {size}")
    if missing:
        raise Damage(f"{shown(path / min(missing))} is missing")


def check_digest(path: Path, name: str, expected: Fingerprint) -> None:
    """Raise Damage unless a file has the contents that the manifest lists. It is not kept in memory."""
    with opened(path / name) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != expected.sha256:
        raise changed(path / name)


def read_verified(path: Path, name: str, expected: Fingerprint) -> bytearray:
    """Read a file of the expected size. Raise Damage unless the contents are those that the manifest lists."""
    content = bytearray(expected.size)
    with opened(path / name) as stream:
        count, extra = stream.readinto(content), stream.read(1)
    if count != expected.size or extra:
        raise Damage(f"{shown(path / name)} has another size than {expected.size} bytes")
    if Fingerprint.of(content) != expected:
        raise changed(path / name)
    return content


def changed(file: Path) -> Damage:
    """The damage of a file whose digest is another one."""
    return Damage(f"{shown(file)} has other contents than were written (SHA-256 differs)")


@contextmanager
def opened(file: Path) -> Iterator[BinaryIO]:
    """Open a file for reading. Raise Damage if it is anything but a file, or cannot be read."""
    try:
        kind = os.lstat(file).st_mode
        if not stat.S_ISREG(kind):
            raise Damage(f"{shown(file)} is {_kind(kind)}")
        # Should a pipe or a link take its place now, neither is waited for or followed.
        flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(os.open(file, flags), "rb") as stream:
            yield stream
    except FileNotFoundError:
        raise Damage(f"{shown(file)} is missing") from None
    except OSError as error:
        raise Damage(f"{shown(file)} cannot be read ({why(error)})") from None


def belongs_to_a_checkpoint(path: Path) -> str | None:
    """None if every file in a directory is one of a checkpoint, which may be damaged. Otherwise what else there is."""
    listed: set[str] = set()
    document = None
    try:
        listed = {MANIFEST, *read_manifest(path)}
    except Damage:
        with suppress(Damage), opened(path / METADATA) as stream:
            document = parse(stream.read(MAX_JSON_BYTES + 1))
    is_ours = listed or (isinstance(document, dict) and {"format_version", "leaves"} <= set(document))
    try:
        for name, _, status in _walk(path):
            known = name in listed or _NAMES.fullmatch(name)
            if stat.S_ISDIR(status.st_mode):
                # A directory inside a checkpoint is empty, or its files are looked at themselves.
                known = name in (ARRAYS, MANIFEST) or name.startswith(f"{ARRAYS}/")
            if not (is_ours and known) or stat.S_ISLNK(status.st_mode):
                return f"a directory that holds {name!r:.200}"
    except Damage as damage:
        return f"a directory of which {damage}"
    return None


def _walk(path: Path) -> Iterator[tuple[str, Path, os.stat_result]]:
    """Yield all entries below a directory: path inside it, path, status. Links are not followed."""
    remaining = [path]
    while remaining:
        directory = remaining.pop()
        try:
            entries = sorted(os.scandir(directory), key=lambda entry: entry.name)
            entries = [(entry, entry.stat(follow_symlinks=False)) for entry in entries]
        except OSError as error:
            raise Damage(f"{shown(directory)} cannot be read ({why(error)})") from None
        for entry, status in entries:
            file = Path(entry.path)
            yield file.relative_to(path).as_posix(), file, status
            if stat.S_ISDIR(status.st_mode):
                remaining.append(file)


def _kind(mode: int) -> str:
    """Say what something is that should have been a file."""
    if stat.S_ISLNK(mode):
        return "a symbolic link, where a file of its own must be"
    return "a directory" if stat.S_ISDIR(mode) else "neither a file nor a directory"
