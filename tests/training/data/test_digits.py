"""The embedded set: what it holds, that its splits never move, and that preparing it is atomic and quiet."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from sklearn.datasets import load_digits

from training.data import catalog
from training.data.digits import SPLIT_SIZES, Digits, split_indices, to_uint8
from training.data.reading import load_split


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A data directory in which the set is prepared."""
    directory = tmp_path_factory.mktemp("digits")
    load_split("digits", "test", directory)
    return directory


def test_splits_are_a_stratified_partition_of_pinned_indices():
    labels = load_digits().target
    indices = split_indices(labels)
    assert {split: len(chosen) for split, chosen in indices.items()} == {"train": 1257, "validation": 180, "test": 360}
    assert np.array_equal(np.sort(np.concatenate(list(indices.values()))), np.arange(1797))
    for chosen in indices.values():
        share = len(chosen) / 1797
        assert np.abs(np.bincount(labels[chosen]) - share * np.bincount(labels)).max() < 2
    digest = hashlib.sha256(np.concatenate(list(indices.values())).astype("<i4").tobytes()).hexdigest()
    assert digest == "bf5122d74a3dcde8cbb30ec82467b0c12c981ea82efb94c2fff6aa42290d233e"


@pytest.mark.parametrize("split", list(SPLIT_SIZES))
def test_images_come_back_in_order_and_exactly(prepared, split):
    digits = load_digits()
    chosen = split_indices(digits.target)[split]
    data, class_names = load_split("digits", split, prepared)
    assert class_names == tuple("0123456789")
    assert data.images.shape == (SPLIT_SIZES[split], 8, 8, 1)
    assert np.array_equal(data.labels, digits.target[chosen])
    counts = (data.images[..., 0].astype(int) * 16 + 127) // 255
    assert np.array_equal(counts, digits.images[chosen])


def test_ink_counts_fill_the_range_of_bytes():
    pixels = to_uint8(np.arange(17.0))
    assert (pixels[0], pixels[8], pixels[16]) == (0, 128, 255)
    assert np.array_equal((pixels.astype(int) * 16 + 127) // 255, np.arange(17))


def test_description_names_license_source_and_format(prepared):
    info = catalog.open_set("digits", prepared).info
    assert "CC BY 4.0" in info.redistribution_info.license
    assert "10.24432/C50P49" in info.citation
    assert info.file_format.value == "array_record"


def test_preparing_prints_nothing(tmp_path, capfd):
    catalog.prepare("digits", tmp_path)
    assert capfd.readouterr() == ("", "")


def test_a_process_that_finishes_second_uses_the_first_one_s_set(tmp_path, monkeypatch):
    generate = Digits._generate_examples
    overtaken = []

    def overtake(self, split):
        if not overtaken:
            overtaken.append(split)
            Digits(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        return generate(self, split)

    monkeypatch.setattr(Digits, "_generate_examples", overtake)
    data, _ = load_split("digits", "validation", tmp_path)
    assert overtaken and len(data.labels) == 180
    assert [path.name for path in (tmp_path / "digits").iterdir()] == ["1.0.0"]


def test_what_a_killed_preparation_leaves_is_not_taken_for_a_set(tmp_path):
    remains = tmp_path / "digits" / "incomplete.ABCDEF_1.0.0"
    remains.mkdir(parents=True)
    (remains / "dataset_info.json").touch()
    assert catalog.find("digits", tmp_path) is None
    assert len(load_split("digits", "test", tmp_path)[0].labels) == 360
    assert catalog.prepared_names(tmp_path) == ["digits"]
