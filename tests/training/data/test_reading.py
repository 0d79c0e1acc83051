"""Reading a split: exact pixels and labels, which features are taken, and an error for each fault."""

import os
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from training.data import reading
from training.data.reading import load_split
from training.errors import UserError


@pytest.mark.parametrize("shape", [(4, 5, 1), (4, 5, 3)])
def test_pixels_and_labels_come_back_exactly(write_set, examples, monkeypatch, shape):
    monkeypatch.setattr(reading, "_BATCH", 3)
    written = examples(7, shape)
    data, class_names = load_split("tiny", "train", write_set("tiny", {"train": written, "test": examples(2, shape)}))
    assert class_names == ("cat", "dog", "owl")
    assert (data.images.dtype, data.labels.dtype) == (np.uint8, np.int32)
    assert np.array_equal(data.images, [image for image, _ in written])
    assert data.labels.tolist() == [0, 1, 2, 0, 1, 2, 0]


def test_features_are_found_by_kind(write_set, examples):
    features = {"scan": tfds.features.Image(shape=(4, 4, 3)), "kind": tfds.features.ClassLabel(num_classes=3)}
    data, class_names = load_split("tiny", "train", write_set("tiny", {"train": examples(3)}, features))
    assert data.labels.tolist() == [0, 1, 2]
    assert class_names == ("0", "1", "2")


def test_label_is_preferred_among_several_class_labels(write_set, examples):
    features = {
        "image": tfds.features.Image(shape=(4, 4, 3)),
        "label": tfds.features.ClassLabel(num_classes=3),
        "coarse_label": tfds.features.ClassLabel(num_classes=2),
    }
    data, class_names = load_split("tiny", "train", write_set("tiny", {"train": examples(3)}, features))
    assert data.labels.tolist() == [0, 1, 2]
    assert len(class_names) == 3


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"image": tfds.features.Image(shape=(4, 4, 3)), "score": tfds.features.Scalar(np.int64)},
            "must have one ClassLabel feature, or one called 'label'; it has none among: image, score",
        ),
        (
            {
                "image": tfds.features.Image(shape=(4, 4, 3)),
                "shape": tfds.features.ClassLabel(num_classes=3),
                "colour": tfds.features.ClassLabel(num_classes=3),
            },
            "it has colour, shape among: colour, image, shape",
        ),
        (
            {
                "image": tfds.features.Image(shape=(4, 4, 4)),
                "label": tfds.features.ClassLabel(num_classes=3),
            },
            "must be uint8 with 1 or 3 channels; got uint8 with 4",
        ),
    ],
)
def test_sets_of_another_kind_are_refused(write_set, examples, features, message):
    directory = write_set("tiny", {"train": examples(3)}, features)
    with pytest.raises(UserError, match=message):
        load_split("tiny", "train", directory)


def test_unknown_split_lists_the_splits(write_set, examples):
    directory = write_set("tiny", {"train": examples(3), "test": examples(2)})
    with pytest.raises(UserError, match="must be one of: train, test; got 'valid'"):
        load_split("tiny", "valid", directory)


def test_empty_split_is_refused(write_set, examples):
    directory = write_set("tiny", {"train": examples(3)})
    edit_description(directory, '"3"', '"0"')
    with pytest.raises(UserError, match="must hold images; 'train' of 'tiny' is empty"):
        load_split("tiny", "train", directory)


def test_images_of_several_sizes_are_refused(write_set, examples):
    directory = write_set("tiny", {"train": examples(2) + examples(1, (6, 4, 3))})
    with pytest.raises(UserError, match="must all have one size; the first is 4x4, number 2 is 6x4"):
        load_split("tiny", "train", directory)


def test_labels_outside_the_classes_are_refused(write_set, examples):
    written = examples(4)
    written[2] = (written[2][0], -1)
    directory = write_set("tiny", {"train": written})
    with pytest.raises(UserError, match="in 0 to 2; 1 of 4 in split 'train' do not, the first is -1 at index 2"):
        load_split("tiny", "train", directory)


def test_labels_beyond_the_last_class_are_refused(write_set, examples):
    directory = write_set("tiny", {"train": examples(4)})
    (directory / "tiny/1.0.0/label.labels.txt").write_text("cat\ndog\n")
    with pytest.raises(UserError, match="in 0 to 1; 1 of 4 in split 'train' do not, the first is 2 at index 2"):
        load_split("tiny", "train", directory)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:70_000])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"PNG") + 40] ^= 8
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, os.remove])
def test_damaged_files_are_refused(write_set, examples, damage):
    directory = write_set("tiny", {"train": examples(3)})
    damage(directory / "tiny/1.0.0/tiny-train.array_record-00000-of-00001")
    with pytest.raises(UserError, match=rf"{directory}/tiny/1.0.0 are damaged .*; remove that folder") as caught:
        load_split("tiny", "train", directory)
    assert "\n" not in str(caught.value)


def test_missing_records_are_refused(write_set, examples):
    directory = write_set("tiny", {"train": examples(3)})
    edit_description(directory, '"3"', '"4"')
    with pytest.raises(UserError, match="are damaged"):
        load_split("tiny", "train", directory)


def edit_description(directory: Path, old: str, new: str) -> None:
    description = directory / "tiny/1.0.0/dataset_info.json"
    text = description.read_text()
    assert text.count(old) == 1
    description.write_text(text.replace(old, new))


real_sets = os.environ.get("BNNLAPLACE_TEST_DATA")


@pytest.mark.skipif(not real_sets, reason="BNNLAPLACE_TEST_DATA names no directory of prepared sets")
@pytest.mark.parametrize(
    ("name", "shape", "num_classes"),
    [("cifar10", (32, 32, 3), 10), ("cifar100", (32, 32, 3), 100), ("notmnist", (28, 28, 1), 10)],
)
def test_real_sets_open(name, shape, num_classes):
    data, class_names = load_split(name, "test", Path(real_sets))
    assert data.images.shape[1:] == shape
    assert len(class_names) == num_classes
    assert np.array_equal(np.unique(data.labels), np.arange(num_classes))
