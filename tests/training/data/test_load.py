"""The images of a run: splits, hold-out, statistics of the pixels, order of the epochs, foreign images."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from training.config import Data
from training.data.foreign import foreign_sets, out_of_distribution
from training.data.load import epoch_order, load, with_statistics, with_wrong_labels
from training.data.reading import Split, load_split
from training.errors import UserError


@pytest.fixture
def colour_set(write_set, examples) -> Path:
    """A set of colour images without a validation split."""
    return write_set("tiny", {"train": examples(60), "test": examples(9, seed=1)})


def statistics_of(config: Data) -> Data:
    """The configuration with the statistics that a run records."""
    return with_statistics(config, load(config).train.images)


def row_set(split: Split) -> set[bytes]:
    return {image.tobytes() for image in split.images}


def test_digits_load_with_their_own_validation_split(tmp_path):
    data = load(Data(dir=tmp_path))
    assert (data.name, data.class_names) == ("digits", tuple("0123456789"))
    assert [len(split.labels) for split in (data.train, data.validation, data.test)] == [1257, 180, 360]
    own, _ = load_split("digits", "validation", tmp_path)
    assert np.array_equal(data.validation.images, own.images)
    pixels = data.train.images / 255.0
    measured = statistics_of(Data(dir=tmp_path))
    np.testing.assert_allclose((measured.mean, measured.std), ([pixels.mean()], [pixels.std()]), rtol=1e-13)


def test_the_environment_names_the_data_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    load(Data())
    assert (tmp_path / "digits").is_dir()


@pytest.mark.parametrize(("wanted", "held_out"), [(None, 6), (12, 12)])
def test_hold_out_is_stratified_and_a_partition(colour_set, wanted, held_out):
    data = load(Data(name="tiny", dir=colour_set, validation_examples=wanted))
    assert np.bincount(data.validation.labels).tolist() == [held_out // 3] * 3
    assert np.bincount(data.train.labels).tolist() == [20 - held_out // 3] * 3
    whole, _ = load_split("tiny", "train", colour_set)
    assert row_set(data.train) | row_set(data.validation) == row_set(whole)
    assert not row_set(data.train) & row_set(data.validation)


def test_labels_stay_with_their_images(colour_set):
    whole, _ = load_split("tiny", "train", colour_set)
    label_of = {image.tobytes(): label for image, label in zip(*whole, strict=True)}
    data = load(Data(name="tiny", dir=colour_set, train_examples=30))
    for split in (data.train, data.validation):
        assert [label_of[image.tobytes()] for image in split.images] == split.labels.tolist()


def test_train_examples_are_stratified_and_leave_validation_alone(colour_set):
    full = load(Data(name="tiny", dir=colour_set))
    part = load(Data(name="tiny", dir=colour_set, train_examples=9))
    assert np.bincount(part.train.labels).tolist() == [3, 3, 3]
    assert row_set(part.train) < row_set(full.train)
    assert np.array_equal(part.validation.images, full.validation.images)
    assert np.array_equal(part.test.images, full.test.images)
    measured = statistics_of(Data(name="tiny", dir=colour_set, train_examples=9))
    np.testing.assert_allclose(measured.mean, part.train.images.mean(axis=(0, 1, 2)) / 255, rtol=1e-13)


def test_wrong_labels_come_after_the_subset_and_leave_everything_else_alone(colour_set):
    clean = load(Data(name="tiny", dir=colour_set, train_examples=30))
    noisy = load(Data(name="tiny", dir=colour_set, train_examples=30, wrong_labels=0.2))
    assert np.array_equal(noisy.train.images, clean.train.images)
    assert np.sum(noisy.train.labels != clean.train.labels) == 6
    assert noisy.train.labels.dtype == np.int32
    for before, after in ((clean.validation, noisy.validation), (clean.test, noisy.test)):
        assert np.array_equal(before.images, after.images) and np.array_equal(before.labels, after.labels)
    again = load(Data(name="tiny", dir=colour_set, train_examples=30, wrong_labels=0.2))
    assert np.array_equal(again.train.labels, noisy.train.labels)


def test_wrong_labels_are_uniform_over_the_other_classes_and_nested():
    labels = (np.arange(20_000) % 5).astype(np.int32)
    before = labels.copy()
    few, many = (with_wrong_labels(labels, fraction, 5) for fraction in (0.2, 0.4))
    assert np.array_equal(labels, before)
    assert (np.sum(few != labels), np.sum(many != labels)) == (4000, 8000)
    assert np.array_equal(few[few != labels], many[few != labels])
    table = np.zeros((5, 5), int)
    np.add.at(table, (labels, many), 1)
    others = table[~np.eye(5, dtype=bool)]  # 20 cells, of which each expects 400
    assert others.sum() == 8000
    assert np.abs(others - 400).max() < 4 * 20
    assert np.array_equal(with_wrong_labels(labels, 0.0, 5), labels)
    assert np.array_equal(
        with_wrong_labels(labels % 2, 0.5, 2) != labels % 2, with_wrong_labels(labels, 0.5, 5) != labels
    )


@pytest.mark.parametrize(("fraction", "classes"), [(0.01, 3), (0.5, 1)])
def test_wrong_labels_that_there_cannot_be(fraction, classes):
    with pytest.raises(
        UserError, match=f"`data.wrong_labels` must be 0, .*; got {fraction} for 9 .* of {classes} clas"
    ):
        with_wrong_labels(np.zeros(9, np.int32), fraction, classes)


def test_statistics_are_those_of_the_config_where_it_has_them(colour_set):
    measured = statistics_of(Data(name="tiny", dir=colour_set))
    assert statistics_of(Data(name="tiny", dir=colour_set, mean=(0.0, 0.5, 1.0))).mean == (0.0, 0.5, 1.0)
    assert statistics_of(Data(name="tiny", dir=colour_set, mean=(0.0, 0.5, 1.0))).std == measured.std
    assert statistics_of(Data(name="tiny", dir=colour_set, std=(1.0, 2.0, 3.0))).std == (1.0, 2.0, 3.0)
    assert statistics_of(measured) == measured
    pixels = load(Data(name="tiny", dir=colour_set)).train.images / 255.0
    np.testing.assert_allclose(measured.std, pixels.std(axis=(0, 1, 2)), rtol=1e-13)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_examples": 55}, "`data.train_examples` must lie in 1 to 54, .*; got 55"),
        ({"validation_examples": 60}, "`data.validation_examples` must lie in 1 to 59, .*; got 60"),
        ({"mean": (0.5,)}, "`data.mean` must have one number per channel; got 1 for the 3 of 'tiny'"),
        ({"std": (1.0, 1.0)}, "`data.std` must have one number per channel; got 2 for the 3 of 'tiny'"),
    ],
)
def test_options_that_do_not_fit_the_set(colour_set, options, message):
    with pytest.raises(UserError, match=message):
        statistics_of(Data(name="tiny", dir=colour_set, **options))


def test_validation_examples_of_a_set_with_its_own_split(tmp_path):
    with pytest.raises(UserError, match="`data.validation_examples` must be unset .*; got 20 for 'digits'"):
        load(Data(dir=tmp_path, validation_examples=20))


def test_augmentation_is_for_colour_images(tmp_path, colour_set):
    assert load(Data(name="tiny", dir=colour_set, augment=True)).class_names == ("cat", "dog", "owl")
    with pytest.raises(UserError, match="`data.augment` must be off for grey images"):
        load(Data(dir=tmp_path, augment=True))


def test_a_set_without_train_or_test_split(write_set, examples):
    directory = write_set("only_test", {"test": examples(3)})
    with pytest.raises(UserError, match="must have the splits train and test; 'only_test' in .* has: test"):
        load(Data(name="only_test", dir=directory))


def test_splits_of_different_sizes(write_set, examples):
    directory = write_set("tiny", {"train": examples(9), "test": examples(3, (5, 4, 3))})
    with pytest.raises(UserError, match="must have one shape; 'tiny' has 4x4x3, 4x4x3, 5x4x3"):
        load(Data(name="tiny", dir=directory))


def test_images_without_variation(write_set):
    blank = [(np.full((2, 2, 1), 7, np.uint8), index % 3) for index in range(6)]
    with pytest.raises(UserError, match=r"`data.std` must be positive in every channel; got \(0.0,\)"):
        statistics_of(Data(name="tiny", dir=write_set("tiny", {"train": blank, "test": blank})))


def test_epoch_orders_are_permutations_that_depend_on_seed_and_epoch():
    orders = [epoch_order(seed, epoch, 40) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(40))
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(orders[3], epoch_order(1, 1, 40))


def test_inverted_and_noise_have_the_shape_of_the_split(examples):
    images = np.stack([image for image, _ in examples(50)])
    split = Split(images, np.zeros(50, np.int32))
    assert np.array_equal(out_of_distribution("inverted", split, None, seed=0).astype(int) + images, 255 + 0 * images)
    noise = out_of_distribution("noise", split, None, seed=3)
    assert (noise.shape, noise.dtype) == (images.shape, np.uint8)
    # 2,400 uniform values: standard deviation of their mean 73.9 / sqrt(2400).
    assert abs(noise.mean() - 127.5) < 4 * 73.9 / 2400**0.5
    assert noise.min() < 5 and noise.max() > 250
    assert np.array_equal(noise, out_of_distribution("noise", split, None, seed=3))
    assert not np.array_equal(noise, out_of_distribution("noise", split, None, seed=4))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("foreign_channels", [1, 3])
@pytest.mark.parametrize("size", [(4, 4), (6, 5)])
def test_foreign_images_take_the_model_s_shape(write_set, examples, channels, foreign_channels, size):
    written = examples(5, (4, 4, foreign_channels))
    directory = write_set("foreign", {"test": written})
    split = Split(np.zeros((9, *size, channels), np.uint8), np.zeros(9, np.int32))
    images = out_of_distribution("foreign", split, directory, seed=0)
    assert (images.shape, images.dtype) == ((5, *size, channels), np.uint8)
    for (image, _), result in zip(written, images, strict=True):
        source = Image.fromarray(image[..., 0] if foreign_channels == 1 else image)
        expected = source.convert("L" if channels == 1 else "RGB").resize(size[::-1], Image.Resampling.BILINEAR)
        # Pillow's luma works with rounded weights and may differ by one.
        np.testing.assert_allclose(result.reshape(*size, -1).squeeze(), np.asarray(expected, int), atol=1)


def test_no_more_foreign_images_than_the_split_has(write_set, examples):
    written = examples(30)
    directory = write_set("foreign", {"test": written})
    split = Split(np.zeros((12, 4, 4, 3), np.uint8), np.zeros(12, np.int32))
    chosen = {seed: out_of_distribution("foreign", split, directory, seed) for seed in (0, 1)}
    for images in chosen.values():
        assert len({image.tobytes() for image in images} & {image.tobytes() for image, _ in written}) == 12
    assert not np.array_equal(chosen[0], chosen[1])


def test_several_foreign_sets_are_each_what_it_is_alone(write_set, examples):
    directory = write_set("foreign", {"test": examples(30, (12, 12, 3))})
    images = np.stack([image for image, _ in examples(9, (8, 8, 1))])
    split = Split(images, np.zeros(9, np.int32))
    sets = foreign_sets(("foreign", "noise", "inverted"), split, directory, seed=2)
    assert list(sets) == ["foreign", "noise", "inverted"]
    for name, result in sets.items():
        assert (result.shape, result.dtype) == ((9, 8, 8, 1), np.uint8)
        assert np.array_equal(result, out_of_distribution(name, split, directory, seed=2))


@pytest.mark.parametrize("names", ["noise", (), ("noise", "inverted", "noise")])
def test_foreign_sets_are_different_names(names):
    with pytest.raises(UserError, match="must be a list of different names"):
        foreign_sets(names, Split(np.zeros((1, 2, 2, 1), np.uint8), np.zeros(1, np.int32)), None, seed=0)


real_sets = os.environ.get("BNNLAPLACE_TEST_DATA")


@pytest.mark.skipif(not real_sets, reason="BNNLAPLACE_TEST_DATA names no directory of prepared sets")
@pytest.mark.parametrize("shape", [(8, 8, 1), (28, 28, 1), (32, 32, 3)])
def test_real_foreign_sets_take_the_shape_of_the_images(shape):
    split = Split(np.zeros((50, *shape), np.uint8), np.zeros(50, np.int32))
    for images in foreign_sets(("cifar100", "notmnist"), split, Path(real_sets), seed=0).values():
        assert images.shape == (50, *shape)
        assert len({image.tobytes() for image in images}) > 45


def test_unknown_foreign_set(tmp_path):
    split = Split(np.zeros((1, 8, 8, 1), np.uint8), np.zeros(1, np.int32))
    message = r"must be inverted, noise, or those of a data set: digits, one .* \(there: nothing\), .* got 'inverse'"
    with pytest.raises(UserError, match=message):
        out_of_distribution("inverse", split, tmp_path, seed=0)
