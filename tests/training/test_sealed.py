"""Documents that carry their own digest: no changed bit goes unnoticed, and nothing odd is waited for or followed."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from training import sealed
from training.errors import UserError

DOCUMENT = {"seed": 3, "data": {"mean": [0.30000000000000004, 1e-300], "name": "größe", "dir": None}, "on": True}


def test_a_document_comes_back_with_its_digest_verified(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(sealed.dump(DOCUMENT, indent=2))
    assert sealed.load(tmp_path / "file") == (DOCUMENT, True)
    assert json.loads((tmp_path / "file").read_text())["sha256"] == sealed.digest(DOCUMENT)


def test_order_and_spaces_do_not_matter(tmp_path: Path) -> None:
    signed = json.loads(sealed.dump(DOCUMENT, indent=2))
    (tmp_path / "file").write_text(json.dumps(dict(reversed(signed.items()))))
    assert sealed.load(tmp_path / "file") == (DOCUMENT, True)


def test_a_document_without_a_digest_is_read_as_unverified(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(json.dumps(DOCUMENT))
    assert sealed.load(tmp_path / "file") == (DOCUMENT, False)


def test_every_flipped_bit_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """If it takes the digest's own name away, the document is unverified, and has an entry that nobody knows."""
    content = sealed.dump(DOCUMENT, indent=2).encode()
    for position in range(len(content)):
        bit = np.random.default_rng(position).integers(8)
        (tmp_path / "file").write_bytes(
            content[:position] + bytes([content[position] ^ 1 << bit]) + content[position + 1 :]
        )
        try:
            document, verified = sealed.load(tmp_path / "file")
        except UserError as error:
            assert "\n" not in str(error)
            continue
        assert document == DOCUMENT if verified else document.keys() - DOCUMENT.keys()


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Path.mkdir, "must be a file"),
        (make_pipe, "must be a file"),
        (lambda path: path.write_text("[" * 100_000), "must be JSON; got recursion limit"),
        (lambda path: path.write_text("[1]"), r"must be an object; got \[1\]"),
        (lambda path: path.write_bytes(b"\xff"), "must be JSON"),
        (lambda path: path.write_text(""), "must be JSON"),
        (lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 2**40), "at most"),
    ],
)
def test_what_is_not_a_document_is_one_line(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "file")
    with pytest.raises(UserError, match=message) as caught:
        sealed.load(tmp_path / "file")
    assert "\n" not in str(caught.value)


def test_a_missing_document_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        sealed.load(tmp_path / "file")
