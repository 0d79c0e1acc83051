"""Checkpoints of pytrees: written atomically, and verified byte by byte while they are read.

    path/
      arrays/         a file for each leaf with its bytes; see `arrays`
      metadata.json   format version, the caller's metadata, and path, shape, dtype and SHA-256 of every leaf
      manifest.json   size and SHA-256 of every other file

What is loaded is what was declared: each file is listed in the manifest, each leaf is declared in metadata.json, and
sizes are compared before anything is allocated. Under its final name the directory is always complete; see
`atomic.replacing`. One process writes. Arrays are gathered to the host first, so a checkpoint can be loaded on other
devices.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bnnlaplace.checkpoint import version_1
from bnnlaplace.checkpoint.arrays import check_memory, check_sizes, read_arrays, write_arrays
from bnnlaplace.checkpoint.atomic import recover, replacing
from bnnlaplace.checkpoint.errors import CheckpointError, Damage, SaveError, shown, why
from bnnlaplace.checkpoint.leaves import Leaf, check_like, describe, filled, nested, parse_leaves, signature
from bnnlaplace.checkpoint.manifest import (
    MAX_JSON_BYTES,
    METADATA,
    Fingerprint,
    belongs_to_a_checkpoint,
    check_digest,
    check_present,
    is_too_large,
    parse,
    read_manifest,
    read_verified,
    write_manifest,
)
from bnnlaplace.core.memory import in_words
from bnnlaplace.core.tree import path_name

FORMAT_VERSION = 2
"""The version that is written. Version 1, of release 0.1.0, is read as well."""

_READABLE = (1, FORMAT_VERSION)


def save_pytree(path: Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Write a pytree of arrays and a dictionary of JSON values, atomically.

    A process killed at any point leaves either the old checkpoint at `path` or the new one. The next save or load
    clears away what else it left. Processes that save to the same path on one machine wait for each other.

    Parameters
    ----------
    path
        The directory to create. A checkpoint there is replaced, and so is an empty directory; anything else is
        refused. A symbolic link is followed.
    tree
        Any pytree whose leaves are `jax.Array` (PRNG key arrays included), NumPy arrays or NumPy scalars. The
        dtypes are kept as they are, with 64-bit types enabled in JAX or not.
    metadata
        Values that JSON can hold, at most 16 MiB of it and a million lists and dictionaries. Python numbers belong here
        rather than in the tree.

    Raises
    ------
    TypeError
        If a leaf is not an array, or the metadata cannot be written as JSON.
    ValueError
        If two leaves have the same path once written out, as in ``{"a/b": x, "a": {"b": y}}``.
    CheckpointError
        If something else is at `path`, or the disk is full, or permission is missing. It is an `OSError` as well. What
        was at `path` is still there, and nothing else.

    Notes
    -----
    Cost: one leaf at a time in host memory, and one write of its bytes.
    """
    path = as_path(path, "save_pytree(path=...)")
    described = describe(tree)
    try:
        text = json.dumps(_document([leaf for leaf, _ in described], metadata), indent=1)
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"`save_pytree(metadata=...)` must hold JSON values only; {error}; convert it first") from None
    if is_too_large(text.encode() + bytes(100 * len(described))):  # the digests come on top
        raise ValueError(
            f"`save_pytree(metadata=...)` must be at most {in_words(MAX_JSON_BYTES)} of JSON with the records of the "
            f"leaves, and a million lists; got {in_words(len(text))}; put numbers into the tree as arrays"
        )
    try:
        _check_outside(Path(os.path.realpath(path)))
        with replacing(path, refusal=_refusal) as directory:
            directory.mkdir()
            leaves, files = write_arrays(directory, described)
            content = json.dumps(_document(leaves, metadata), indent=1).encode()
            (directory / METADATA).write_bytes(content)
            write_manifest(directory, {**files, METADATA: Fingerprint.of(content)})
    except OSError as error:
        raise SaveError(_reason(path, error)) from None


def load_pytree(path: Path, like: Any = None) -> tuple[Any, dict[str, Any]]:
    """Read back what `save_pytree` wrote, and verify every byte of it.

    Parameters
    ----------
    path
        The directory.
    like
        A pytree with the structure, shapes and dtypes that are expected. Its leaves are arrays or
        `jax.ShapeDtypeStruct`. NamedTuples, dataclasses and other registered containers come back as in `like`. A leaf
        comes back as a NumPy array if `like` holds one there, otherwise as a `jax.Array` on the default device.
        Without `like` the result is made of dictionaries (also in place of NamedTuples and dataclasses) and lists (also
        in place of tuples) of NumPy arrays, and containers without leaves are absent.

    Returns
    -------
    tuple[Any, dict[str, Any]]
        The pytree and the metadata.

    Raises
    ------
    CheckpointError
        If a file is missing, truncated, changed, not listed or not a file, what is declared cannot be or does not fit
        into memory, or a leaf differs from `like`. The message names the file, or the first such leaf with both sides.

    Notes
    -----
    Cost: each file is read once. Memory: the arrays, and no more than the files hold.
    """
    return load_version(as_path(path, "load_pytree(path=...)"), like)[:2]


def load_version(path: Path, like: Any = None) -> tuple[Any, dict[str, Any], int]:
    """`load_pytree`, with the format version of the files."""
    try:
        return _load_settled(path, like)
    except OSError as error:  # the path itself: a name too long, or a current directory that was removed
        raise CheckpointError(
            f"a checkpoint must be readable; got {why(error)} at {shown(path)}; check the path"
        ) from None


def _load_settled(path: Path, like: Any) -> tuple[Any, dict[str, Any], int]:
    """Load, and again if another process replaces the checkpoint meanwhile."""
    while True:
        recover(path)
        before = _identity(path)
        try:
            return _load(path, like)
        except CheckpointError:
            # Another process may have replaced the checkpoint while this one read it, or be about to.
            recover(path)
            if _identity(path) == before:
                raise


def _load(path: Path, like: Any) -> tuple[Any, dict[str, Any], int]:
    if not path.is_dir():
        raise CheckpointError(f"a checkpoint must be a directory; there is none at {shown(path)}; check the path")
    try:
        declared = _declared(path)
        if like is not None:
            check_like(path, declared.leaves, like)
        check_memory(path, sum(leaf.num_bytes for leaf in declared.leaves))
        arrays = _arrays(path, declared)
    except Damage as damage:
        raise damaged(path, str(damage)) from None
    tree = nested(declared.leaves, arrays) if like is None else filled(like, arrays)
    return tree, declared.metadata, declared.version


def restructure(path: Path, stored: Any, like: Any) -> Any:
    """Give the structure of `like` to a part of what `load_pytree` read without it, after checking that it fits.

    Parameters
    ----------
    path
        The checkpoint, for messages.
    stored
        The part of its pytree.
    like
        As for `load_pytree`.

    Raises
    ------
    CheckpointError
        If a leaf differs in path, shape or dtype. The message names the first one, with both sides.
    """
    arrays = {path_name(keys): leaf for keys, leaf in jax.tree_util.tree_flatten_with_path(stored)[0]}
    check_like(path, [Leaf(name, (), *signature(leaf)) for name, leaf in arrays.items()], like)
    return filled(like, arrays)


def find_damage(path: Path) -> str | None:
    """Check every file of a checkpoint against its manifest, and what it declares against its files.

    Parameters
    ----------
    path
        The directory.

    Returns
    -------
    str | None
        None if all files are as they were saved. Otherwise a clause that names the first file that is missing,
        truncated, changed, not listed or not a file.
    """
    path = as_path(path, "find_damage(path=...)")
    try:
        listed = _declared(path).listed
        for name, fingerprint in listed.items():
            check_digest(path, name, fingerprint)
    except Damage as damage:
        return str(damage)
    except CheckpointError:  # of a newer format, which is not damage
        return None
    return None


def damaged(path: Path, clause: str) -> CheckpointError:
    """The error of a checkpoint that is not as it was saved."""
    return CheckpointError(f"{shown(path)} must be as it was saved; {clause}; restore it from a copy, or save it again")


def as_path(path: Any, where: str) -> Path:
    """Make a path of what a user gives, or raise TypeError or ValueError."""
    if not isinstance(path, (str, os.PathLike)) or isinstance(os.fspath(path), bytes):
        raise TypeError(f"{where} must be a path; got {type(path).__name__}; try a string")
    text = os.fspath(path)
    try:
        is_name = bool(text) and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a pair of surrogates
        is_name = False
    if not is_name:
        raise ValueError(f"{where} must be a path; got {text!r:.200}; try a name such as 'posterior'")
    return Path(path)


# --- what a checkpoint declares -------------------------------------------------------------------------------------


class _Declared(NamedTuple):
    """The files of a checkpoint, and what it says of them."""

    listed: dict[str, Fingerprint]
    version: int
    leaves: list[Leaf]
    metadata: dict[str, Any]


def _document(leaves: Sequence[Leaf], metadata: dict[str, Any]) -> dict[str, Any]:
    return {"format_version": FORMAT_VERSION, "metadata": metadata, "leaves": [leaf.as_json() for leaf in leaves]}


def _declared(path: Path) -> _Declared:
    """Read what a checkpoint declares. No array is read.

    Raises
    ------
    Damage
        If a file is missing, has another size or is not a file, or the declarations do not fit the files.
    CheckpointError
        If the format is one that this release does not read.
    """
    listed = read_manifest(path)
    check_present(path, listed)
    if listed[METADATA].size > MAX_JSON_BYTES:
        raise Damage(f"{shown(path / METADATA)} has more than {MAX_JSON_BYTES} bytes")
    document = parse(read_verified(path, METADATA, listed[METADATA]))
    if not isinstance(document, dict) or not {"format_version", "metadata", "leaves"} <= set(document):
        raise Damage(f"{shown(path / METADATA)} is not readable as the metadata of a checkpoint")
    version, metadata = document["format_version"], document["metadata"]
    if type(version) is not int or not isinstance(metadata, dict):
        raise Damage(f"{shown(path / METADATA)} is not readable as the metadata of a checkpoint")
    if version not in _READABLE:
        raise CheckpointError(
            f"{shown(path)} must have format version {' or '.join(map(str, _READABLE))}; got {version!r:.20}; read it "
            "with the release of bnnlaplace that wrote it"
        )
    try:
        leaves = parse_leaves(document["leaves"])
    except Damage as damage:
        raise Damage(f"{shown(path / METADATA)} {damage}") from None
    (version_1.check_sizes if version == 1 else check_sizes)(path, leaves, listed)
    return _Declared(listed, version, leaves, metadata)


def _arrays(path: Path, declared: _Declared) -> dict[str, Any]:
    """Read the arrays by the paths of their leaves, as NumPy arrays and as keys."""
    if declared.version == 1:
        for name, fingerprint in declared.listed.items():
            check_digest(path, name, fingerprint)
        arrays = version_1.read_arrays(path, declared.leaves)
    else:
        arrays = read_arrays(path, declared.leaves, declared.listed)
    keys = {leaf.path: leaf.prng for leaf in declared.leaves if leaf.prng is not None}
    wrapped = {name: jax.random.wrap_key_data(jnp.asarray(arrays[name]), impl=prng) for name, prng in keys.items()}
    return {**arrays, **wrapped}


# --- the place of a checkpoint --------------------------------------------------------------------------------------


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells one directory at a path from its successor. None if there is nothing."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _refusal(target: Path) -> str | None:
    """Say what is at a path, unless a checkpoint may take its place."""
    return belongs_to_a_checkpoint(target) if target.is_dir() else "a file"


def _check_outside(target: Path) -> None:
    """Raise FileExistsError inside another checkpoint: what the manifest of that one does not list would damage it."""
    for parent in target.parents:
        try:
            read_manifest(parent)
        except Damage:
            continue
        raise FileExistsError(
            f"{shown(target)} lies in the checkpoint {shown(parent)}, which would be damaged; choose another path"
        )


def _reason(path: Path, error: OSError) -> str:
    """Write what the file system refuses as one sentence. What `replacing` refuses is one already."""
    if error.errno is None:
        return f"a save must not overwrite anything but a checkpoint; {error}"
    return f"a save must be able to write to {shown(path)}; got {why(error)}; free the disk, or choose another path"
