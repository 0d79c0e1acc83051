"""Checkpoints of pytrees: written atomically, and verified byte by byte before they are read.

Orbax writes the arrays. It restores a flipped bit without noticing, so a manifest lists every file with its SHA-256.
The manifest is written last and checked before Orbax reads a byte:

    path/
      arrays/         Orbax (OCDBT); one entry per leaf, named by the leaf's path in the pytree
      metadata.json   format version, the caller's metadata, and path, shape and dtype of every leaf
      manifest.json   size and SHA-256 of every other file

Under its final name the directory is always complete; see `atomic.replacing`. One process writes. Arrays are gathered
to the host first, so a checkpoint can be loaded on other devices.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.checkpoint.atomic import recover, replacing
from bnnlaplace.core.tree import path_entry, path_name

FORMAT_VERSION = 1

_ARRAYS, _METADATA, _MANIFEST = "arrays", "metadata.json", "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint is missing, incomplete or damaged, or has another structure than the one asked for."""


def save_pytree(path: Path, tree: Any, metadata: dict[str, Any]) -> None:
    """Write a pytree of arrays and a dictionary of JSON values, atomically.

    A process killed at any point leaves either the old checkpoint at `path` or the new one.

    Parameters
    ----------
    path
        The directory to create. An existing checkpoint there is replaced. Two processes must not save to the
        same `path` at once.
    tree
        Any pytree whose leaves are `jax.Array` (PRNG key arrays included), NumPy arrays or NumPy scalars. The
        dtypes are kept as they are, with 64-bit types enabled in JAX or not.
    metadata
        Values that JSON can hold. Python numbers belong here rather than in the tree.

    Raises
    ------
    TypeError
        If a leaf is not an array, or the metadata cannot be written as JSON.
    ValueError
        If two leaves have the same path once written out, as in ``{"a/b": x, "a": {"b": y}}``.

    Notes
    -----
    Cost: one copy of the tree in host memory, and two reads of what was written.
    """
    path = Path(path)
    leaves, arrays = _describe(tree)
    document = {"format_version": FORMAT_VERSION, "metadata": metadata, "leaves": leaves}
    try:
        text = json.dumps(document, indent=1)
    except (TypeError, ValueError) as error:
        raise TypeError(f"`save_pytree(metadata=...)` must hold JSON values only; {error}; convert it first") from None

    with replacing(path) as directory:
        directory.mkdir()
        if arrays:
            _checkpointer().save(directory.absolute() / _ARRAYS, arrays)
        (directory / _METADATA).write_text(text)
        files = {str(file.relative_to(directory)): _fingerprint(file) for file in _files(directory)}
        (directory / _MANIFEST).write_text(json.dumps({"files": files}, indent=1))


def load_pytree(path: Path, like: Any = None) -> tuple[Any, dict[str, Any]]:
    """Read back what `save_pytree` wrote, after verifying every byte of it.

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
        If a file is missing, truncated, changed or not listed, or a leaf differs from `like`. The message names the
        file, or the first such leaf with both sides.

    Notes
    -----
    Cost: each file is read twice, once for its SHA-256 and once for its contents.
    """
    path = Path(path)
    recover(path)
    if not path.is_dir():
        raise CheckpointError(f"a checkpoint must be a directory; there is none at {path}; check the path")
    if damage := find_damage(path):
        raise CheckpointError(f"{path} must be as it was saved; {damage}; restore it from a copy, or save it again")
    document = json.loads((path / _METADATA).read_text())
    if document["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} must have format version {FORMAT_VERSION}; got {document['format_version']}; "
            "read it with the release of bnnlaplace that wrote it"
        )
    leaves = document["leaves"]
    if like is not None:
        _check_like(path, leaves, like)
    arrays = _read_arrays(path, leaves)
    if like is None:
        return _nested(leaves, arrays), document["metadata"]
    return _filled(like, arrays), document["metadata"]


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
    records = [{"path": name, "shape": leaf.shape, "dtype": str(leaf.dtype)} for name, leaf in arrays.items()]
    _check_like(path, records, like)
    return _filled(like, arrays)


def find_damage(path: Path) -> str | None:
    """Check every file of a checkpoint against its manifest.

    Parameters
    ----------
    path
        The directory.

    Returns
    -------
    str | None
        None if all files are as they were saved. Otherwise a clause that names the first file that is missing,
        truncated, changed, or not listed.
    """
    path = Path(path)
    manifest = path / _MANIFEST
    try:
        listed = json.loads(manifest.read_text())["files"]
        listed = {name: (entry["size"], entry["sha256"]) for name, entry in listed.items()}
    except FileNotFoundError:
        return f"{manifest} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"{manifest} is not readable as a manifest"
    present = {str(file.relative_to(path)): file for file in _files(path)}
    del present[_MANIFEST]
    for name, (size, digest) in listed.items():
        if name not in present:
            return f"{path / name} is missing"
        file = present.pop(name)
        actual = _fingerprint(file)
        if actual["size"] != size:
            return f"{file} has {actual['size']} bytes instead of {size}"
        if actual["sha256"] != digest:
            return f"{file} has other contents than were written (SHA-256 differs)"
    return f"{min(present.values())} is not in the manifest" if present else None


# --- leaves ---------------------------------------------------------------------------------------------------------


def _describe(tree: Any) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Return a JSON record for each leaf, and the arrays by path, without empty ones, which Orbax cannot store."""
    records: dict[str, dict[str, Any]] = {}
    arrays: dict[str, np.ndarray] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(keys)
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(
                f"every leaf of `save_pytree(tree=...)` must be an array; got {type(leaf).__name__} at {name!r}; "
                "convert it, or put it into the metadata"
            )
        if name in records:
            raise ValueError(f"leaf paths must differ; got {name!r} twice; rename one of the two keys")
        shape, dtype = _signature(leaf)
        records[name] = {"path": name, "keys": [path_entry(key) for key in keys], "shape": shape, "dtype": dtype}
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            records[name]["prng"] = str(jax.random.key_impl(leaf))
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        if array.dtype.hasobject or array.dtype.kind in "USmM":
            raise TypeError(f"arrays must be numeric; got dtype {array.dtype} at {name!r}; put it into the metadata")
        if array.size:
            arrays[name] = array
    return list(records.values()), arrays


def _signature(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype. What is not an array gets its type as the dtype, so it differs from every stored leaf."""
    return tuple(getattr(leaf, "shape", ())), str(getattr(leaf, "dtype", type(leaf).__name__))


def _read_arrays(path: Path, leaves: list[dict[str, Any]]) -> dict[str, Any]:
    """Read the arrays by the paths of their leaves, as NumPy arrays and as keys."""
    import orbax.checkpoint as ocp

    arrays: dict[str, Any] = {}
    if (path / _ARRAYS).exists():
        as_numpy = {leaf["path"]: ocp.RestoreArgs(restore_type=np.ndarray) for leaf in leaves if 0 not in leaf["shape"]}
        arrays = _checkpointer().restore((path / _ARRAYS).absolute(), restore_args=as_numpy)
    for leaf in leaves:
        name = leaf["path"]
        if "prng" in leaf:
            arrays[name] = jax.random.wrap_key_data(jnp.asarray(arrays[name]), impl=leaf["prng"])
        elif name not in arrays:
            arrays[name] = np.zeros(leaf["shape"], jnp.dtype(leaf["dtype"]))
    return arrays


def _filled(like: Any, arrays: dict[str, Any]) -> Any:
    """Replace every leaf of `like` by the array of its path."""
    expected, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(structure, [_as_in(leaf, arrays[path_name(keys)]) for keys, leaf in expected])


def _as_in(like: Any, array: Any) -> Any:
    return array if isinstance(like, (np.ndarray, np.generic)) else jnp.asarray(array)


def _check_like(path: Path, leaves: list[dict[str, Any]], like: Any) -> None:
    """Raise CheckpointError unless the stored leaves have the paths, shapes and dtypes of `like`."""
    stored = {leaf["path"]: (tuple(leaf["shape"]), leaf["dtype"]) for leaf in leaves}
    expected = {path_name(keys): _signature(leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
    differing = [name for name in {**expected, **stored} if expected.get(name) != stored.get(name)]
    if not differing:
        return

    def describe(side: dict[str, tuple[tuple[int, ...], str]]) -> str:
        if differing[0] not in side:
            return "nothing"
        shape, dtype = side[differing[0]]
        return f"{dtype}{list(shape)}"

    others = f" ({len(differing) - 1} more leaves differ)" if len(differing) > 1 else ""
    raise CheckpointError(
        f"the checkpoint must have the structure asked for; {path} holds {describe(stored)} at {differing[0]!r} where "
        f"{describe(expected)} is expected{others}; load it with the model and settings it was saved with"
    )


# --- loading without `like` -------------------------------------------------------------------------------------------


def _nested(leaves: list[dict[str, Any]], arrays: dict[str, Any]) -> Any:
    """Build dictionaries and lists from the recorded paths."""
    root: dict[Any, Any] = {}
    for leaf in leaves:
        node = root
        *parents, last = [("root", None)] + [tuple(key) for key in leaf["keys"]]
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = arrays[leaf["path"]]

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if node and all(kind == "index" for kind, _ in node):
            return [build(child) for _, child in sorted(node.items(), key=lambda item: item[0][1])]
        return {key: build(child) for (_, key), child in node.items()}

    return build(root.get(("root", None), {}))


# --- files ----------------------------------------------------------------------------------------------------------


def _checkpointer() -> Any:
    # Imported here, because a program that saves nothing should not wait a third of a second for it.
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointer()


def _files(directory: Path) -> list[Path]:
    return sorted(file for file in directory.rglob("*") if not file.is_dir())


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}
