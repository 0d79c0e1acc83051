"""Ways to damage or forge a checkpoint, by name. Each takes its folder and a generator of random numbers.

`KINDS` holds them all. A kind that needs what a checkpoint has not, such as two arrays of the same size, raises
`NotPossible`. Most forgeries are signed: the manifest fits the files again, so only what they declare is wrong.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Damage = Callable[[Path, np.random.Generator], None]

KINDS: dict[str, Damage] = {}
UNCHANGED: set[str] = set()
"""Kinds that leave everything to be read: a load must give the right numbers."""


class NotPossible(Exception):
    """A checkpoint has nothing to damage in this way."""


def kind(function: Damage) -> Damage:
    """Enter a way under its name."""
    KINDS[function.__name__.replace("_", " ")] = function
    return function


def each(prefix: str, values: dict[str, Any], apply: Callable[[Path, np.random.Generator, Any], None]) -> None:
    """Enter one way for each of many wrong values."""
    for name, value in values.items():
        KINDS[f"{prefix}: {name}"] = lambda path, rng, value=value: apply(path, rng, value)


# --- parts of a checkpoint ------------------------------------------------------------------------------------------


def files(path: Path) -> list[Path]:
    """All files, in a fixed order."""
    return sorted(file for file in path.rglob("*") if file.is_file() and not file.is_symlink())


def arrays(path: Path) -> list[Path]:
    """The files of arrays."""
    return [file for file in files(path) if "arrays" in file.parts[len(path.parts) :]]


def one_of(choices: list[Any], rng: np.random.Generator) -> Any:
    """One of several, at random."""
    if not choices:
        raise NotPossible
    return choices[rng.integers(len(choices))]


def document_of(path: Path) -> dict[str, Any]:
    """The content of metadata.json."""
    return json.loads((path / "metadata.json").read_text())


def write_document(path: Path, document: Any) -> None:
    """Replace metadata.json, and sign it."""
    (path / "metadata.json").write_text(document if isinstance(document, str) else json.dumps(document))
    sign(path)


def sign(path: Path) -> None:
    """Write a manifest that fits the files as they are."""
    listed = {
        file.relative_to(path).as_posix(): {
            "size": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file in files(path)
        if file.name != "manifest.json"
    }
    (path / "manifest.json").write_text(json.dumps({"files": listed}))


def manifest_of(path: Path) -> dict[str, Any]:
    """The content of manifest.json."""
    return json.loads((path / "manifest.json").read_text())


def forge(path: Path, leaf: str | int, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the numbers of a leaf, and sign its digest, the metadata and the manifest, so that all of them agree."""
    document = document_of(path)
    names = [record["path"] for record in document["leaves"]]
    if isinstance(leaf, str) and leaf not in names:
        raise NotPossible
    number = names.index(leaf) if isinstance(leaf, str) else leaf
    record, file = document["leaves"][number], path / f"arrays/{number:05d}.bin"
    if not record["dtype"].startswith("float") or not file.exists():
        raise NotPossible
    array = np.fromfile(file, record["dtype"]).reshape(record["shape"])
    file.write_bytes(np.ascontiguousarray(change(array), record["dtype"]).tobytes())
    record["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    write_document(path, document)


def leaves_under(path: Path, prefix: str) -> list[int]:
    """The numbers of the leaves of floating-point numbers below a path in the tree."""
    records = document_of(path)["leaves"]
    return [
        number
        for number, record in enumerate(records)
        if record["path"].startswith(prefix) and record["dtype"].startswith("float") and 0 not in record["shape"]
    ]


# --- files that are damaged -----------------------------------------------------------------------------------------


def flip(file: Path, rng: np.random.Generator, count: int = 1) -> None:
    """Flip bits of a file."""
    content = bytearray(file.read_bytes())
    for _ in range(count):
        content[rng.integers(len(content))] ^= 1 << int(rng.integers(8))
    file.write_bytes(bytes(content))


@kind
def one_bit_of_any_file(path: Path, rng: np.random.Generator) -> None:
    flip(one_of(files(path), rng), rng)


@kind
def one_bit_of_an_array(path: Path, rng: np.random.Generator) -> None:
    flip(one_of(arrays(path), rng), rng)


@kind
def one_bit_of_the_metadata(path: Path, rng: np.random.Generator) -> None:
    flip(path / "metadata.json", rng)


@kind
def one_bit_of_the_manifest(path: Path, rng: np.random.Generator) -> None:
    before = manifest_of(path)
    flip(path / "manifest.json", rng)
    try:
        if manifest_of(path) == before:  # the bit was in the space between two words
            flip(path / "manifest.json", rng, 40)
    except ValueError:
        pass


@kind
def many_bits_of_all_files(path: Path, rng: np.random.Generator) -> None:
    for file in files(path):
        flip(file, rng, 20)


@kind
def a_file_cut_short(path: Path, rng: np.random.Generator) -> None:
    file = one_of(files(path), rng)
    os.truncate(file, rng.integers(file.stat().st_size))


@kind
def an_array_cut_short(path: Path, rng: np.random.Generator) -> None:
    file = one_of(arrays(path), rng)
    os.truncate(file, file.stat().st_size - 1)


@kind
def an_empty_file(path: Path, rng: np.random.Generator) -> None:
    os.truncate(one_of(files(path), rng), 0)


@kind
def a_file_with_more_at_its_end(path: Path, rng: np.random.Generator) -> None:
    with one_of(files(path), rng).open("ab") as stream:
        stream.write(rng.bytes(int(rng.integers(1, 100))))


@kind
def a_file_of_zeros(path: Path, rng: np.random.Generator) -> None:
    file = one_of([file for file in files(path) if file.read_bytes().strip(b"\0")], rng)
    file.write_bytes(bytes(file.stat().st_size))


@kind
def a_file_of_noise(path: Path, rng: np.random.Generator) -> None:
    file = one_of(files(path), rng)
    file.write_bytes(rng.bytes(file.stat().st_size))


@kind
def a_missing_file(path: Path, rng: np.random.Generator) -> None:
    one_of(files(path), rng).unlink()


@kind
def a_missing_array(path: Path, rng: np.random.Generator) -> None:
    one_of(arrays(path), rng).unlink()


@kind
def missing_arrays(path: Path, rng: np.random.Generator) -> None:
    shutil.rmtree(path / "arrays")


@kind
def missing_metadata(path: Path, rng: np.random.Generator) -> None:
    (path / "metadata.json").unlink()


@kind
def missing_manifest(path: Path, rng: np.random.Generator) -> None:
    (path / "manifest.json").unlink()


def pair_to_swap(path: Path, rng: np.random.Generator) -> tuple[Path, Path]:
    """Two arrays of the same size and other contents."""
    by_size: dict[int, list[Path]] = {}
    for file in arrays(path):
        by_size.setdefault(file.stat().st_size, []).append(file)
    pairs = [
        (one, other)
        for group in by_size.values()
        for position, one in enumerate(group)
        for other in group[position + 1 :]
        if one.read_bytes() != other.read_bytes()
    ]
    return one_of(pairs, rng)


def swap(one: Path, other: Path) -> None:
    """Let two files change places."""
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
    other.write_bytes(first)


@kind
def two_arrays_swapped(path: Path, rng: np.random.Generator) -> None:
    swap(*pair_to_swap(path, rng))


@kind
def an_array_and_the_metadata_swapped(path: Path, rng: np.random.Generator) -> None:
    swap(path / "metadata.json", one_of(arrays(path), rng))


@kind
def a_file_of_somebody_else(path: Path, rng: np.random.Generator) -> None:
    directory = path if rng.integers(2) else path / "arrays"
    (directory / "thesis.tex").write_text("thesis")


@kind
def a_folder_of_somebody_else(path: Path, rng: np.random.Generator) -> None:
    directory = path if rng.integers(2) else path / "arrays"
    (directory / "thesis").mkdir()


# --- things that are not files --------------------------------------------------------------------------------------


def in_place_of_a_file(file: Path, rng: np.random.Generator, what: str) -> None:
    """Put something else where a file is."""
    content = file.read_bytes()
    if what == "mode 000":
        file.chmod(0)
        return
    file.unlink()
    aside = file.parent.parent / f"aside-{file.name}"
    match what:
        case "a directory":
            file.mkdir()
        case "a full directory":
            file.mkdir()
            (file / "thesis.tex").write_text("thesis")
        case "a pipe":
            os.mkfifo(file)
        case "a link to a copy":
            aside.write_bytes(content)
            file.symlink_to(aside)
        case "a link to nowhere":
            file.symlink_to(aside)
        case "a link to itself":
            file.symlink_to(file)
        case "a link to zeros without end":
            file.symlink_to("/dev/zero")


_NOT_FILES = {
    name: name
    for name in (
        *("a directory", "a full directory", "a pipe", "mode 000", "a link to a copy", "a link to nowhere"),
        *("a link to itself", "a link to zeros without end"),
    )
}
each("manifest", _NOT_FILES, lambda path, rng, what: in_place_of_a_file(path / "manifest.json", rng, what))
each("metadata", _NOT_FILES, lambda path, rng, what: in_place_of_a_file(path / "metadata.json", rng, what))
each("array", _NOT_FILES, lambda path, rng, what: in_place_of_a_file(one_of(arrays(path), rng), rng, what))
UNCHANGED |= {f"{part}: mode 000" for part in ("manifest", "metadata", "array")} if os.geteuid() == 0 else set()


@kind
def arrays_linked_from_elsewhere(path: Path, rng: np.random.Generator) -> None:
    elsewhere = path.parent / "elsewhere"
    (path / "arrays").rename(elsewhere)
    (path / "arrays").symlink_to(elsewhere)


@kind
def changed_arrays_linked_from_elsewhere(path: Path, rng: np.random.Generator) -> None:
    """The manifest says nothing of what is behind the link."""
    flip(one_of(arrays(path), rng), rng)
    arrays_linked_from_elsewhere(path, rng)
    listed = {name: entry for name, entry in manifest_of(path)["files"].items() if not name.startswith("arrays/")}
    (path / "manifest.json").write_text(json.dumps({"files": listed}))


@kind
def arrays_in_a_file(path: Path, rng: np.random.Generator) -> None:
    shutil.rmtree(path / "arrays")
    (path / "arrays").write_bytes(rng.bytes(1000))
    sign(path)


@kind
def a_file_in_place_of_the_checkpoint(path: Path, rng: np.random.Generator) -> None:
    shutil.rmtree(path)
    path.write_bytes(rng.bytes(100))


@kind
def a_pipe_in_place_of_the_checkpoint(path: Path, rng: np.random.Generator) -> None:
    shutil.rmtree(path)
    os.mkfifo(path)


@kind
def an_empty_directory(path: Path, rng: np.random.Generator) -> None:
    shutil.rmtree(path)
    path.mkdir()


@kind
def a_link_to_nowhere_in_place_of_the_checkpoint(path: Path, rng: np.random.Generator) -> None:
    shutil.rmtree(path)
    path.symlink_to(path.parent / "nowhere")


@kind
def a_link_to_itself_in_place_of_the_checkpoint(path: Path, rng: np.random.Generator) -> None:
    shutil.rmtree(path)
    path.symlink_to(path)


@kind
def a_link_to_the_checkpoint(path: Path, rng: np.random.Generator) -> None:
    path.rename(path.parent / "moved")
    path.symlink_to("moved")


@kind
def a_killed_save_beside_it(path: Path, rng: np.random.Generator) -> None:
    workspace = path.parent / f".{path.name}.writing"
    shutil.copytree(path, workspace / "new")
    one_of(files(workspace / "new"), rng).unlink()


@kind
def a_save_killed_between_its_renames(path: Path, rng: np.random.Generator) -> None:
    workspace = path.parent / f".{path.name}.writing"
    shutil.copytree(path, workspace / "new")
    one_of(arrays(workspace / "new"), rng).unlink()
    path.rename(workspace / "replaced")


UNCHANGED |= {
    *("a link to the checkpoint", "a killed save beside it", "a save killed between its renames"),
}


# --- manifests ------------------------------------------------------------------------------------------------------

_DEEP = "[" * 100_000 + "]" * 100_000
_JSON = {
    "nested 100,000 deep": _DEEP,
    "nested 100,000 deep and not closed": '{"files":' * 100_000,
    "20 MB": json.dumps({"files": {f"{number:0100d}": {} for number in range(200_000)}}),
    "12 MB of empty lists": "[" + "[]," * 4_000_000 + "[]]",
    "a list": "[]",
    "null": "null",
    "a number of 10,000 digits": "9" * 10_000,
    "a string": '"files"',
    "not UTF-8": "\udcff\udcfe",
    "not JSON": "{'files': {}}",
    "an empty object": "{}",
    "NaN": "NaN",
}


def write_text(file: Path, text: str) -> None:
    """Write a text that may hold bytes that are not UTF-8."""
    file.write_bytes(text.encode("utf-8", "surrogateescape"))


def write_metadata(path: Path, text: str) -> None:
    """Replace metadata.json by any text, and sign it."""
    write_text(path / "metadata.json", text)
    sign(path)


each("manifest", _JSON, lambda path, rng, text: write_text(path / "manifest.json", text))
each("signed metadata", _JSON, lambda path, rng, text: write_metadata(path, text))
each(
    "manifest with files",
    {"null": None, "a list": [], "nothing": {}, "names only": {"metadata.json": None}},
    lambda path, rng, value: write_text(path / "manifest.json", json.dumps({"files": value})),
)


def change_entry(path: Path, rng: np.random.Generator, change: dict[str, Any]) -> None:
    """Change one entry of the manifest."""
    manifest = manifest_of(path)
    entry = manifest["files"][one_of(sorted(manifest["files"]), rng)]
    entry.update(change)
    (path / "manifest.json").write_text(json.dumps(manifest))


each(
    "manifest entry",
    {
        "petabytes": {"size": 10**15},
        "a size of 4,000 digits": {"size": 10**4000},
        "a negative size": {"size": -1},
        "a fractional size": {"size": 3.5},
        "a size of NaN": {"size": float("nan")},
        "a bool for a size": {"size": True},
        "a string for a size": {"size": "100"},
        "a list for a size": {"size": [100]},
        "no digest": {"sha256": None},
        "a short digest": {"sha256": "00"},
        "a number for a digest": {"sha256": 7},
        "another digest": {"sha256": "0" * 64},
        "an object for a digest": {"sha256": {}},
    },
    change_entry,
)


@kind
def manifest_that_lists_a_file_outside(path: Path, rng: np.random.Generator) -> None:
    array = one_of(arrays(path), rng)
    outside = path.parent / "outside.bin"
    array.rename(outside)
    manifest = manifest_of(path)
    entry = manifest["files"].pop(array.relative_to(path).as_posix())
    manifest["files"][("../outside.bin", str(outside))[rng.integers(2)]] = entry
    (path / "manifest.json").write_text(json.dumps(manifest))


@kind
def manifest_that_lists_names_with_line_breaks(path: Path, rng: np.random.Generator) -> None:
    manifest = manifest_of(path)
    manifest["files"]["two\nlines\x1b[31m"] = {"size": 1, "sha256": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(manifest))


@kind
def manifest_that_lists_a_name_of_a_megabyte(path: Path, rng: np.random.Generator) -> None:
    manifest = manifest_of(path)
    manifest["files"]["x" * 1_000_000] = {"size": 1, "sha256": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(manifest))


@kind
def a_signed_file_with_line_breaks_in_its_name(path: Path, rng: np.random.Generator) -> None:
    (path / "arrays" / "two\nlines").write_text("x")
    sign(path)


# --- forgeries that are signed --------------------------------------------------------------------------------------


@kind
def signed_missing_arrays(path: Path, rng: np.random.Generator) -> None:
    shutil.rmtree(path / "arrays")
    sign(path)


@kind
def signed_missing_array(path: Path, rng: np.random.Generator) -> None:
    one_of(arrays(path), rng).unlink()
    sign(path)


@kind
def signed_bit_of_an_array(path: Path, rng: np.random.Generator) -> None:
    flip(one_of(arrays(path), rng), rng)
    sign(path)


@kind
def signed_swapped_arrays(path: Path, rng: np.random.Generator) -> None:
    swap(*pair_to_swap(path, rng))
    sign(path)


@kind
def signed_short_array(path: Path, rng: np.random.Generator) -> None:
    file = one_of(arrays(path), rng)
    os.truncate(file, rng.integers(file.stat().st_size))
    sign(path)


@kind
def signed_stranger(path: Path, rng: np.random.Generator) -> None:
    (path / "arrays" / "99999.bin").write_bytes(rng.bytes(8))
    sign(path)


@kind
def signed_sparse_file_of_terabytes(path: Path, rng: np.random.Generator) -> None:
    """A file may claim terabytes and take no space."""
    number = one_of(leaves_under(path, ""), rng)
    document, name = document_of(path), f"arrays/{number:05d}.bin"
    try:
        os.truncate(path / name, 2**43)
    except OSError:
        raise NotPossible from None
    record = document["leaves"][number]
    record |= {"shape": [2**43 // np.dtype(record["dtype"]).itemsize], "sha256": "0" * 64}
    text = json.dumps(document)
    (path / "metadata.json").write_text(text)
    manifest = manifest_of(path)
    manifest["files"][name] = {"size": 2**43, "sha256": "0" * 64}
    manifest["files"]["metadata.json"] = {"size": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def change_document(path: Path, rng: np.random.Generator, change: dict[str, Any]) -> None:
    """Change fields of metadata.json, or remove those that are `...`, and sign it."""
    document = document_of(path) | change
    write_document(path, {name: value for name, value in document.items() if value is not ...})


each(
    "signed document",
    {
        "version 1": {"format_version": 1},
        "version 99": {"format_version": 99},
        "version of 4,000 digits": {"format_version": 10**4000},
        "version as a string": {"format_version": "2"},
        "version as a bool": {"format_version": True},
        "version null": {"format_version": None},
        "no version": {"format_version": ...},
        "no metadata": {"metadata": ...},
        "metadata a list": {"metadata": []},
        "metadata empty": {"metadata": {}},
        "no leaves": {"leaves": ...},
        "leaves an object": {"leaves": {}},
        "leaves empty": {"leaves": []},
        "leaves of numbers": {"leaves": [1, 2]},
        "leaves of empty objects": {"leaves": [{}]},
    },
    change_document,
)


def change_leaf(path: Path, rng: np.random.Generator, change: dict[str, Any]) -> None:
    """Change fields of the record of one leaf, or remove those that are `...`, and sign it."""
    document = document_of(path)
    number = one_of(leaves_under(path, ""), rng)
    changed = document["leaves"][number] | change
    document["leaves"][number] = {name: value for name, value in changed.items() if value is not ...}
    write_document(path, document)


_DEEP_KEYS = [["key", "a"]] * 50_000
each(
    "signed leaf",
    {
        "of petabytes": {"shape": [10**15]},
        "of more than all numbers": {"shape": [10**30, 10**30]},
        "of no numbers along petabytes": {"shape": [0, 2**62, 2**62]},
        "of negative length": {"shape": [-1]},
        "of fractional length": {"shape": [2.0]},
        "with a bool for a length": {"shape": [True]},
        "with a string for a length": {"shape": ["3"]},
        "of 1,000 axes": {"shape": [1] * 1000},
        "with a number for its shape": {"shape": 3},
        "without a shape": {"shape": ...},
        "of no numbers": {"shape": [0]},
        "of objects": {"dtype": "object"},
        "of records": {"dtype": "i4,i4"},
        "of arrays": {"dtype": "(1000000000,)f4"},
        "of strings": {"dtype": "S1000000"},
        "of dates": {"dtype": "datetime64[s]"},
        "of another type": {"dtype": "int32"},
        "of no type": {"dtype": "float31"},
        "of a type without a name": {"dtype": ""},
        "with a number for its type": {"dtype": 4},
        "without a type": {"dtype": ...},
        "of random keys": {"prng": "threefry2x32", "dtype": "key<fry>"},
        "of keys that there are not": {"prng": "mersenne", "dtype": "key<mt>"},
        "with a list for a generator": {"prng": []},
        "at another path": {"path": "elsewhere", "keys": [["key", "elsewhere"]]},
        "at another path than its keys": {"path": "elsewhere"},
        "with a number for its path": {"path": 3},
        "without keys": {"keys": ...},
        "with wrong keys": {"keys": [["index", -1]]},
        "with keys of one part": {"keys": [["key"]]},
        "with a number for its keys": {"keys": 3},
        "50,000 levels deep": {"path": "/".join(["a"] * 50_000), "keys": _DEEP_KEYS},
        "with another digest": {"sha256": "0" * 64},
        "with a number for a digest": {"sha256": 3},
        "without a digest": {"sha256": ...},
        "with a field more": {"order": "F"},
    },
    change_leaf,
)


@kind
def signed_shape_turned(path: Path, rng: np.random.Generator) -> None:
    document = document_of(path)
    turned = [record for record in document["leaves"] if len(set(record["shape"])) > 1]
    record = one_of(turned, rng)
    record["shape"] = record["shape"][::-1]
    write_document(path, document)


@kind
def signed_leaf_twice(path: Path, rng: np.random.Generator) -> None:
    document = document_of(path)
    document["leaves"].append(one_of(document["leaves"], rng))
    write_document(path, document)


@kind
def signed_leaf_dropped(path: Path, rng: np.random.Generator) -> None:
    document = document_of(path)
    document["leaves"].pop(rng.integers(len(document["leaves"])))
    write_document(path, document)


@kind
def signed_last_leaf_and_its_file_dropped(path: Path, rng: np.random.Generator) -> None:
    document = document_of(path)
    document["leaves"].pop()
    arrays(path)[-1].unlink()
    write_document(path, document)


@kind
def signed_leaf_inside_another(path: Path, rng: np.random.Generator) -> None:
    document = document_of(path)
    one, other = rng.choice(len(document["leaves"]), 2, replace=False)
    outer = document["leaves"][one]
    document["leaves"][other] |= {"path": outer["path"] + "/0", "keys": [*outer["keys"], ["index", 0]]}
    write_document(path, document)


@kind
def signed_names_of_two_leaves_swapped(path: Path, rng: np.random.Generator) -> None:
    """The numbers of one leaf are declared as those of another; shapes and types stay with the files."""
    document = document_of(path)
    pairs = [
        (one, other)
        for one in document["leaves"]
        for other in document["leaves"]
        if one["path"] < other["path"] and one["shape"] != other["shape"]
    ]
    one, other = one_of(pairs, rng)
    for name in ("path", "keys"):
        one[name], other[name] = other[name], one[name]
    write_document(path, document)


# --- posteriors whose files all agree, and whose numbers cannot be ----------------------------------------------------


def spoiled(value: float) -> Callable[[Path, np.random.Generator], None]:
    """Put a number into one place of one array that has to be finite."""

    def spoil(path: Path, rng: np.random.Generator) -> None:
        number = one_of([*leaves_under(path, "structure/"), *leaves_under(path, "network/params/")], rng)
        if document_of(path)["leaves"][number]["path"] == "structure/tolerance":
            raise NotPossible  # it may be infinite

        def change(array: np.ndarray) -> np.ndarray:
            array.reshape(-1)[rng.integers(array.size)] = value
            return array

        forge(path, number, change)

    return spoil


KINDS["forged NaN"] = spoiled(float("nan"))
KINDS["forged infinity"] = spoiled(float("inf"))


def replaced(path: Path, rng: np.random.Generator, change: tuple[str, float]) -> None:
    """Replace all numbers of a leaf."""
    leaf, value = change
    forge(path, leaf, lambda array: np.full_like(array, value))


_NUMBERS = {"NaN": float("nan"), "infinity": float("inf"), "a negative number": -1.0, "zero": 0.0}
for _name, _value in _NUMBERS.items():
    each(
        f"forged {_name}",
        {leaf: (leaf, _value) for leaf in ("prior_precision", "relative_precision", "likelihood/0")},
        replaced,
    )
for _name in ("NaN", "infinity"):
    each(
        f"forged {_name}",
        {
            leaf: (leaf, _NUMBERS[_name])
            for leaf in ("prior_mean", "fitted/log_likelihood", "fitted/log_likelihood_gradient")
        },
        replaced,
    )
each(
    "forged a negative number",
    {leaf: (leaf, -1.0) for leaf in ("fitted/squared_residuals", "fitted/num_outputs", "structure/tolerance")},
    replaced,
)


@kind
def forged_negative_curvature(path: Path, rng: np.random.Generator) -> None:
    names = {record["path"] for record in document_of(path)["leaves"]}
    one = [name for name in names if name.rpartition("/")[2] in ("diagonal", "matrix", "eigenvalues", "values")]
    one += [name for name in names if name.endswith("row_values")]
    forge(path, one_of(sorted(one), rng), lambda array: -array)


@kind
def forged_long_eigenvectors(path: Path, rng: np.random.Generator) -> None:
    names = {record["path"] for record in document_of(path)["leaves"]}
    forge(path, one_of(sorted(name for name in names if name.endswith("vectors")), rng), lambda array: 10 * array)


def change_metadata(path: Path, rng: np.random.Generator, change: dict[str, Any]) -> None:
    """Change what a posterior says of itself, or remove what is `...`, and sign it."""
    document = document_of(path)
    metadata = document["metadata"] | change
    document["metadata"] = {name: value for name, value in metadata.items() if value is not ...}
    write_document(path, document)


each(
    "signed posterior",
    {
        "of an unknown structure": {"hessian_structure": "diagonal"},
        "of a structure of another kind": {"structure": "Ellipsoid"},
        "of a list for a structure": {"hessian_structure": ["diag"]},
        "of a structure that is null": {"hessian_structure": None},
        "without a structure": {"hessian_structure": ...},
        "of an unknown likelihood": {"likelihood": "poisson"},
        "of another likelihood": {"likelihood": "tempered"},
        "of a number for a likelihood": {"likelihood": 3},
        "without a likelihood": {"likelihood": ...},
        "with a string for a bool": {"likelihood_is_ours": "yes"},
        "of a likelihood of somebody else": {"likelihood_is_ours": False},
        "of unnamed weights": {"weights": [1, 2]},
        "of one weight": {"weights": ["w1"]},
        "of an unknown weight": {"weights": ["w1", "w2", "b2", "w9"]},
        "of other weights": {"weights": ["a", "b"]},
        "of no weights": {"weights": []},
        "of weights that are null": {"weights": None},
        "of a network that was linearised": {"linearised": True},
        "with a number for a bool": {"linearised": 1},
        "of groups without names": {"groups": {"w1": None}},
        "of groups of other weights": {"groups": {"other": "g"}},
        "of no groups": {"groups": {}},
        "of a list of groups": {"groups": []},
        "with precisions of no group": {"prior_precision": {}},
        "with a precision of another group": {"prior_precision": {"other": 1.0}},
        "with a negative precision": {"prior_precision": {"w1": -1.0, "w2": 1.0, "b2": 1.0}},
        "with a precision of NaN": {"prior_precision": {"w1": float("nan"), "w2": 1.0, "b2": 1.0}},
        "with a precision in words": {"prior_precision": {"w1": "one", "w2": 1.0, "b2": 1.0}},
        "with other precisions": {"prior_precision": {"w1": 7.0, "w2": 70.0, "b2": 700.0}},
        "with a list of precisions": {"prior_precision": [1.0, 2.0]},
        "with a field more": {"temperature": 2.0},
    },
    change_metadata,
)
