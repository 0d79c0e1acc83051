"""The arrays of a checkpoint: the bytes of each leaf in a file of its own, in C order.

The file has no header. Shape and dtype are in metadata.json, and say exactly how long the file must be, so nothing is
allocated for an array that is not there. `np.fromfile(file, dtype).reshape(shape)` reads one without this package.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bnnlaplace.checkpoint.errors import CheckpointError, Damage, shown
from bnnlaplace.checkpoint.leaves import Leaf
from bnnlaplace.checkpoint.manifest import ARRAYS, METADATA, Fingerprint, read_verified
from bnnlaplace.core.memory import free_bytes, in_words


def file_name(number: int) -> str:
    """The path of the file of a leaf, by its position in metadata.json."""
    return f"{ARRAYS}/{number:05d}.bin"


def write_arrays(directory: Path, described: Sequence[tuple[Leaf, Any]]) -> tuple[list[Leaf], dict[str, Fingerprint]]:
    """Write the arrays of leaves. Return the records with their digests, and the fingerprints of the files."""
    leaves, files = [], {}
    for number, (leaf, array) in enumerate(described):
        content = np.ascontiguousarray(array).reshape(-1).view(np.uint8)  # one leaf after another is on the host
        if content.size:
            (directory / ARRAYS).mkdir(exist_ok=True)
            name = file_name(number)
            (directory / name).write_bytes(content.data)
            files[name] = Fingerprint.of(content)
            leaf = leaf._replace(sha256=files[name].sha256)
        leaves.append(leaf)
    return leaves, files


def check_sizes(path: Path, leaves: Sequence[Leaf], listed: dict[str, Fingerprint]) -> None:
    """Raise Damage unless each leaf has a file of just its bytes, and there is no other file."""
    expected = {file_name(number): leaf for number, leaf in enumerate(leaves) if leaf.num_bytes}
    for name, leaf in expected.items():
        claim = f"{shown(path / METADATA)} declares {leaf.num_bytes} bytes for {leaf.path!r:.80}"
        if name not in listed:
            raise Damage(f"{claim}, which are not in the manifest")
        if listed[name].size != leaf.num_bytes:
            raise Damage(f"{claim}, where {name} has {listed[name].size}")
        if leaf.sha256 != listed[name].sha256:
            raise Damage(f"{claim} with another SHA-256 than {name} has")
    if others := set(listed) - set(expected) - {METADATA}:
        raise Damage(f"{shown(path / min(others))} belongs to no leaf that is declared")


def check_memory(path: Path, num_bytes: int) -> None:
    """Raise CheckpointError if arrays do not fit into the memory of the host."""
    free = free_bytes(jax.local_devices(backend="cpu")[0])
    if free is not None and num_bytes > free:
        raise CheckpointError(
            f"the arrays of {shown(path)} must fit into memory; they take {in_words(num_bytes)} of {in_words(free)} "
            "that are free; free memory, or load on another machine"
        )


def read_arrays(path: Path, leaves: Sequence[Leaf], listed: dict[str, Fingerprint]) -> dict[str, np.ndarray]:
    """Read the arrays by the paths of their leaves. `check_sizes` has passed."""
    arrays = {}
    for number, leaf in enumerate(leaves):
        shape, dtype = leaf.stored
        if not leaf.num_bytes:
            arrays[leaf.path] = np.zeros(shape, dtype)
            continue
        name = file_name(number)
        content = read_verified(path, name, listed[name])
        arrays[leaf.path] = np.frombuffer(content, dtype).reshape(shape)
    return arrays
