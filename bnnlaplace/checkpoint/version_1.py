"""Arrays of format version 1, which release 0.1.0 wrote by Orbax. This release reads them and writes version 2.

Orbax gave up on a full disk with pages of traceback from its threads, and it wrote all arrays twice. Its files are read
by TensorStore, which lies under it: an array is opened, compared with what is declared, and then read.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnnlaplace.checkpoint.errors import Damage, shown
from bnnlaplace.checkpoint.leaves import Leaf
from bnnlaplace.checkpoint.manifest import ARRAYS, METADATA, Fingerprint

# Zstandard, which Orbax compresses with, makes at least four bytes of a block of 128 KiB.
_BEST_COMPRESSION = 2**15


def check_sizes(path: Path, leaves: Sequence[Leaf], listed: dict[str, Fingerprint]) -> None:
    """Raise Damage unless files of arrays are there if arrays are declared, and could hold as much."""
    declared = sum(leaf.num_bytes for leaf in leaves)
    present = sum(fingerprint.size for name, fingerprint in listed.items() if name.startswith(f"{ARRAYS}/"))
    if declared > present * _BEST_COMPRESSION:
        raise Damage(f"{shown(path / METADATA)} declares {declared} bytes of arrays, where {present} are in {ARRAYS}")
    if others := [name for name in listed if name != METADATA and not name.startswith(f"{ARRAYS}/")]:
        raise Damage(f"{shown(path / min(others))} belongs to no leaf that is declared")


def read_arrays(path: Path, leaves: Sequence[Leaf]) -> dict[str, np.ndarray]:
    """Read the arrays by the paths of their leaves. Every file has been verified, and `check_sizes` has passed."""
    # Empty arrays were not stored.
    stored = {leaf.path: leaf.stored for leaf in leaves if leaf.num_bytes}
    arrays = {leaf.path: np.zeros(*leaf.stored) for leaf in leaves if not leaf.num_bytes}
    if not stored:
        return arrays
    database = {"driver": "ocdbt", "base": (path / ARRAYS).absolute().as_uri() + "/"}
    try:
        _check_names(path, database, set(stored))
        opened = {name: _open(database, name) for name in stored}
        for name, (shape, dtype) in stored.items():
            # A chunk is read whole, so it must not be larger than the array.
            array, chunk = opened[name], opened[name].chunk_layout.read_chunk.shape or ()
            if (array.shape, array.dtype.numpy_dtype) != (shape, dtype) or math.prod(chunk) > math.prod(shape):
                raise Damage(f"{shown(path / ARRAYS)} does not hold {name!r:.80} as it is declared")
        return arrays | {name: np.asarray(array.read().result()) for name, array in opened.items()}
    except Damage:
        raise
    except Exception as error:  # TensorStore raises errors of every kind for files that it did not write
        raise Damage(f"{shown(path / ARRAYS)} is not readable as arrays ({type(error).__name__})") from None


def _check_names(path: Path, database: dict[str, str], expected: set[str]) -> None:
    """Raise Damage unless the database has exactly the arrays that are declared."""
    # Imported here, because a program that loads nothing of an earlier release should not wait for it.
    import tensorstore

    keys = tensorstore.KvStore.open(database).result().list().result()
    there = {key.decode("utf-8", "replace").rpartition("/")[0] for key in keys}
    if differing := there ^ expected:
        raise Damage(f"{shown(path / ARRAYS)} does not hold {min(differing)!r:.80} as it is declared")


def _open(database: dict[str, str], name: str) -> Any:
    """Open an array. Nothing of it is read. Missing parts will be errors rather than zeros."""
    import tensorstore

    store = {**database, "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store, "fill_missing_data_reads": False}, open=True).result()
