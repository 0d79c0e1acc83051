"""Checkpoints: exact round trips, nothing half-written, and every damaged byte found."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from bnnlaplace.checkpoint import pytree
from bnnlaplace.checkpoint.pytree import CheckpointError, load_pytree, save_pytree


class Moments(NamedTuple):
    mean: Any
    empty: Any
    parts: Any


@jax.tree_util.register_dataclass
@dataclass
class Record:
    weight: Any
    extra: Any


def example_tree() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    record = Record(jnp.ones(2), {"a.b c": np.ones(1)})
    return {
        "float64": rng.normal(size=(3, 2)),
        "float32": jnp.asarray(rng.normal(size=(2, 5)), jnp.float32),
        "bfloat16": rng.normal(size=4).astype(ml_dtypes.bfloat16),
        "int64": np.asarray(2**40 + 1),
        "flags": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
        "scalar": np.float16(0.5),
        "key": jax.random.split(jax.random.key(3), 2),
        "moments": Moments(jnp.arange(3), (), [np.arange(2, dtype=np.uint8), record]),
    }


def assert_same(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if jnp.issubdtype(one.dtype, jax.dtypes.prng_key):
            one, other = jax.random.key_data(one), jax.random.key_data(other)
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoints") / "one"
    save_pytree(path, example_tree(), {"step": 7, "history": [{"loss": 0.1}], "nothing": None})
    return path


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_round_trip_keeps_structure_dtypes_and_bits(saved: Path) -> None:
    tree, metadata = load_pytree(saved, like=example_tree())
    assert_same(tree, example_tree())
    assert metadata == {"step": 7, "history": [{"loss": 0.1}], "nothing": None}
    assert isinstance(tree["float64"], np.ndarray) and isinstance(tree["float32"], jax.Array)


def test_without_like_come_dictionaries_and_lists_of_numpy_arrays(saved: Path) -> None:
    tree, _ = load_pytree(saved)
    expected = example_tree()
    assert list(tree["moments"]) == ["mean", "parts"]
    assert tree["moments"]["parts"][1]["extra"]["a.b c"] == 1.0
    assert tree["float64"].dtype == np.float64 and tree["int64"].dtype == np.int64
    assert tree["bfloat16"].dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(tree["float64"], expected["float64"])
    assert tree["none"].shape == (0, 3)
    assert jax.random.uniform(tree["key"][1]) == jax.random.uniform(expected["key"][1])


@pytest.mark.parametrize("tree", [np.arange(3), {}, [np.ones(2), {"a": np.zeros(1)}]], ids=["leaf", "empty", "list"])
def test_unusual_roots(tree: Any, tmp_path: Path) -> None:
    save_pytree(tmp_path / "x", tree, {})
    assert_same(load_pytree(tmp_path / "x")[0], tree)


def test_abstract_like_gives_jax_arrays(tmp_path: Path) -> None:
    tree = {"w": jnp.ones((2, 2))}
    save_pytree(tmp_path / "x", tree, {})
    loaded, _ = load_pytree(tmp_path / "x", like=jax.eval_shape(lambda: tree))
    assert isinstance(loaded["w"], jax.Array)
    assert_same(loaded, tree)


def data_file(path: Path) -> Path:
    """Return the file of the largest array."""
    return max((path / "arrays").rglob("*"), key=lambda file: file.stat().st_size * file.is_file())


def flip_bit(file: Path, offset: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2 if offset is None else offset] ^= 1
    file.write_bytes(bytes(content))


def test_a_flipped_bit_in_any_file_is_found(copy: Path) -> None:
    files = [file for file in copy.rglob("*") if file.is_file()]
    assert len(files) > 4
    for file in files:
        original = file.read_bytes()
        flip_bit(file, offset=0)
        with pytest.raises(CheckpointError, match="must be as it was saved"):
            load_pytree(copy)
        file.write_bytes(original)
    load_pytree(copy)


def truncate(path: Path) -> Path:
    file = data_file(path)
    file.write_bytes(file.read_bytes()[:-1])
    return file


def flip(path: Path) -> Path:
    flip_bit(data_file(path))
    return data_file(path)


def remove(path: Path) -> Path:
    file = data_file(path)
    file.unlink()
    return file


def add(path: Path) -> Path:
    file = path / "arrays" / "stranger"
    file.write_bytes(b"")
    return file


def remove_manifest(path: Path) -> Path:
    (path / "manifest.json").unlink()
    return path / "manifest.json"


def garble_manifest(path: Path) -> Path:
    (path / "manifest.json").write_text('{"files": [1]}')
    return path / "manifest.json"


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (truncate, "bytes instead of"),
        (flip, "SHA-256 differs"),
        (remove, "is missing"),
        (add, "not in the manifest"),
        (remove_manifest, "is missing"),
        (garble_manifest, "not readable as a manifest"),
    ],
)
def test_damage_is_named_in_one_line(copy: Path, damage: Any, fault: str) -> None:
    file = damage(copy)
    with pytest.raises(CheckpointError, match=fault) as caught:
        load_pytree(copy)
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is none at"):
        load_pytree(tmp_path / "nowhere")


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pytree, "FORMAT_VERSION", 99)
    save_pytree(tmp_path / "x", {}, {})
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="format version 1 or 2; got 99"):
        load_pytree(tmp_path / "x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"float32": jnp.ones((2, 6))}, r"float32\[2, 5\] at 'float32' where float32\[2, 6\] is expected"),
        ({"flags": np.array([1, 0])}, r"bool\[2\] at 'flags' where int64\[2\] is expected"),
        ({"more": np.ones(1)}, r"nothing at 'more' where float64\[1\] is expected"),
        ({"scalar": 0.5}, r"float16\[\] at 'scalar' where float\[\] is expected"),
    ],
)
def test_another_structure_names_the_leaf_and_both_sides(saved: Path, change: dict, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_pytree(saved, like=example_tree() | change)


def test_a_leaf_not_asked_for_is_an_error(saved: Path) -> None:
    like = example_tree()
    del like["bfloat16"], like["int64"]
    with pytest.raises(CheckpointError, match=r"holds .* at '(bfloat16|int64)' where nothing is expected \(1 more"):
        load_pytree(saved, like=like)


@pytest.mark.parametrize(
    ("tree", "metadata", "error", "message"),
    [
        ({"a": [1.0]}, {}, TypeError, "got float at 'a/0'"),
        ({"a": np.array(["x"])}, {}, TypeError, "must be numeric"),
        ({"a/b": np.ones(1), "a": {"b": np.ones(1)}}, {}, ValueError, "got 'a/b' twice"),
        ({}, {"path": Path("x")}, TypeError, "JSON values only"),
    ],
)
def test_what_cannot_be_saved_leaves_nothing(tree, metadata, error, message, tmp_path: Path) -> None:
    with pytest.raises(error, match=message):
        save_pytree(tmp_path / "x", tree, metadata)
    assert list(tmp_path.iterdir()) == []


def test_replacing_keeps_the_last_and_leaves_no_temporary(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        save_pytree(tmp_path / "x", {"w": np.full(2, value)}, {"value": value})
    tree, metadata = load_pytree(tmp_path / "x")
    assert tree["w"][0] == metadata["value"] == 2.0
    assert [entry.name for entry in tmp_path.iterdir()] == ["x"]


KILLED = """
import os, shutil, sys
from pathlib import Path
import numpy as np
from bnnlaplace.checkpoint.pytree import save_pytree

def die_at(rename, path):
    save_pytree(path, {"w": np.ones(2)}, {})
    count, replace, remove = 0, os.replace, shutil.rmtree
    def dying(source, target):
        nonlocal count
        if count == rename:
            os._exit(9)
        count += 1
        replace(source, target)
    os.replace = dying
    # After both renames the old directory is left to be removed.
    shutil.rmtree = lambda *a, **k: os._exit(9) if count == 2 else remove(*a, **k)
    save_pytree(path, {"w": np.full(2, 2.0)}, {})

for rename in range(3):
    process = os.fork()  # what was imported serves all three
    if process == 0:
        die_at(rename, Path(sys.argv[1]) / str(rename) / "x")
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
"""


def test_killed_while_replacing_leaves_a_good_checkpoint(tmp_path: Path) -> None:
    """The process dies (no cleanup runs) before the first rename, between the two, and after both."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, timeout=120)
    for rename in range(3):
        path = tmp_path / str(rename) / "x"
        assert ".x.writing" in os.listdir(path.parent), "the kill must come while the hidden directory exists"
        assert load_pytree(path)[0]["w"][0] == (2.0 if rename == 2 else 1.0)
        assert os.listdir(path.parent) == ["x"]
        save_pytree(path, {"w": np.full(2, 3.0)}, {})
        assert load_pytree(path)[0]["w"][0] == 3.0
        assert os.listdir(path.parent) == ["x"]


def test_metadata_file_is_plain_json(saved: Path) -> None:
    document = json.loads((saved / "metadata.json").read_text())
    assert document["format_version"] == 2
    digest = hashlib.sha256(np.arange(3, dtype=np.int32).tobytes()).hexdigest()
    keys = [["key", "moments"], ["key", "mean"]]
    record = {"path": "moments/mean", "keys": keys, "shape": [3], "dtype": "int32", "sha256": digest}
    number = document["leaves"].index(record)
    assert np.fromfile(saved / f"arrays/{number:05d}.bin", np.int32).tolist() == [0, 1, 2]


def test_saving_and_loading_print_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    save_pytree(tmp_path / "x", {"w": jnp.ones(2)}, {})
    load_pytree(tmp_path / "x")
    assert capfd.readouterr() == ("", "")
