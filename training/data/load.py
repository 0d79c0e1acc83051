"""The image data of a run: its splits in memory, the statistics of its pixels, and the order of its epochs."""

import dataclasses
from typing import NamedTuple

import numpy as np

from training.config import Data
from training.data import catalog
from training.data.reading import Split, load_split
from training.data.shuffle import permutation, stratified_indices
from training.errors import UserError

# All runs share these seeds, and so their splits. They are large, so that no run's own seed draws the same numbers.
_HOLD_OUT_SEED, _SUBSET_SEED, _WRONG_SEED = 2**63 + 1, 2**63 + 2, 2**63 + 3


class ImageData(NamedTuple):
    """All the data of a run."""

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split


def load(config: Data) -> ImageData:
    """Load the training, validation and test examples that a configuration describes.

    If the set has a validation split, it is used. Otherwise a stratified part of the training split is held out, the
    same part in every run. `train_examples` then chooses among the rest, so it never changes the validation examples.
    `wrong_labels` comes last: validation and test labels are always those of the set.

    Parameters
    ----------
    config : training.config.Data
        The data section of a run's configuration.

    Returns
    -------
    ImageData

    Raises
    ------
    UserError
        See `load_split`. Also if an option does not fit the set.
    """
    directory = catalog.data_directory(config.dir)
    splits = catalog.open_set(config.name, directory).info.splits
    if not {"train", "test"} <= set(splits):
        raise UserError(
            f"the data set must have the splits train and test; {config.name!r} in {directory} has: "
            f"{', '.join(splits)}; train on another set"
        )
    if "validation" in splits and config.validation_examples is not None:
        raise UserError(
            f"`data.validation_examples` must be unset where the set has a validation split of its own; got "
            f"{config.validation_examples} for {config.name!r}; remove the option"
        )
    train, class_names = load_split(config.name, "train", directory)
    test, _ = load_split(config.name, "test", directory)
    if "validation" in splits:
        validation, _ = load_split(config.name, "validation", directory)
    else:
        train, validation = _hold_out(train, config.validation_examples)
    if config.train_examples is not None:
        _check_count("data.train_examples", config.train_examples, len(train.labels))
        train = train.stratified(config.train_examples, _SUBSET_SEED)
    _check_shapes(config, train, validation, test)
    if config.wrong_labels:
        train = Split(train.images, with_wrong_labels(train.labels, config.wrong_labels, len(class_names)))
    return ImageData(config.name, class_names, train, validation, test)


def with_wrong_labels(labels: np.ndarray, fraction: float, num_classes: int) -> np.ndarray:
    """Replace a fraction of the labels by other classes, the same ones in every run.

    Parameters
    ----------
    labels : ndarray of int32, shape (N,)
        Classes from 0 to `num_classes` - 1.
    fraction : float
        In [0, 1): rounded to a number of examples. They are chosen uniformly, whatever their class. A larger fraction
        replaces the same labels as a smaller one, by the same classes, and some more.
    num_classes : int
        A new label is any of the other classes with equal probability.

    Returns
    -------
    ndarray of int32, shape (N,)
        `labels` is left as it is.

    Raises
    ------
    UserError
        The fraction is less than half an example, or there is one class alone.
    """
    count = round(fraction * labels.size)
    if fraction and (not count or num_classes < 2):
        raise UserError(
            f"`data.wrong_labels` must be 0, or replace at least one label by another of two or more classes; got "
            f"{fraction} for {labels.size} training images of {num_classes} classes; use a larger fraction, or 0"
        )
    chosen = permutation(_WRONG_SEED, 0, labels.size)[:count]
    # The raw stream is fixed for ever; a word modulo the number of classes is uniform to 1 in 2**60.
    words = np.random.Philox(key=np.array([_WRONG_SEED, 1], dtype=np.uint64)).random_raw(labels.size)[chosen]
    steps = 1 + (words % np.uint64(max(num_classes - 1, 1))).astype(np.int64)
    replaced = labels.copy()
    replaced[chosen] = (labels[chosen] + steps) % num_classes
    return replaced


def with_statistics(config: Data, images: np.ndarray) -> Data:
    """Complete a configuration by the mean and standard deviation of the pixels, with which the network normalises.

    Parameters
    ----------
    config : training.config.Data
        Statistics that are None are measured.
    images : ndarray of uint8, shape (N, H, W, C)
        The training images.

    Raises
    ------
    UserError
        The configuration has another number of channels than the images, or a channel of the images does not vary.
    """
    channels = images.shape[-1]
    for option, values in (("mean", config.mean), ("std", config.std)):
        if values is not None and len(values) != channels:
            raise UserError(
                f"`data.{option}` must have one number per channel; got {len(values)} for the {channels} of "
                f"{config.name!r}; give {channels}, or none to have them measured"
            )
    mean, std = config.mean, config.std
    if mean is None or std is None:
        measured_mean, measured_std = _measure(images)
        mean, std = mean or measured_mean, std or measured_std
    if not all(value > 0 for value in std):
        raise UserError(
            f"`data.std` must be positive in every channel; got {std} measured for {config.name!r}; set it, or use "
            "images that vary"
        )
    return dataclasses.replace(config, mean=mean, std=std)


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Return the order in which an epoch visits the training examples.

    It is a pure function of its arguments, so a resumed run sees the same batches as an uninterrupted one.

    Parameters
    ----------
    seed, epoch : int
        The seed of the run and the number of the epoch, from 0.
    num_examples : int
        Number of training examples.

    Returns
    -------
    ndarray of int64, shape (num_examples,)
        A permutation of `range(num_examples)`.
    """
    return permutation(seed, epoch, num_examples)


def _hold_out(train: Split, count: int | None) -> tuple[Split, Split]:
    """Divide the training split into training and validation examples, stratified, in their original order."""
    total = len(train.labels)
    if count is None:
        count = max(total // 10, 1)
    _check_count("data.validation_examples", count, total - 1)
    held_out = stratified_indices(train.labels, count, _HOLD_OUT_SEED)
    return train.take(np.setdiff1d(np.arange(total), held_out)), train.take(held_out)


def _check_count(option: str, count: int, available: int) -> None:
    if not 1 <= count <= available:
        raise UserError(
            f"`{option}` must lie in 1 to {available}, as there are no more training images; got {count}; use fewer"
        )


def _check_shapes(config: Data, *splits: Split) -> None:
    shapes = [split.images.shape[1:] for split in splits]
    if len(set(shapes)) > 1:
        raise UserError(
            f"train, validation and test images must have one shape; {config.name!r} has "
            f"{', '.join('x'.join(map(str, shape)) for shape in shapes)}; use another set"
        )
    if config.augment and shapes[0][-1] != 3:
        raise UserError(
            f"`data.augment` must be off for grey images, whose class a flip or crop may change; got it on for "
            f"{config.name!r}; remove the option"
        )


def _measure(images: np.ndarray) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Measure mean and standard deviation of the scaled pixels from exact integer sums, the same on every machine."""
    count = images[..., 0].size
    total, squares = np.zeros((2, images.shape[-1]), dtype=np.int64)
    for start in range(0, len(images), 1024):  # Bounds the memory of the squares.
        chunk = images[start : start + 1024].astype(np.int32)
        total += chunk.sum(axis=(0, 1, 2))
        squares += (chunk * chunk).sum(axis=(0, 1, 2))
    mean = [int(t) / (255 * count) for t in total]
    std = [(count * int(s) - int(t) ** 2) ** 0.5 / (255 * count) for t, s in zip(total, squares, strict=True)]
    return tuple(mean), tuple(std)
