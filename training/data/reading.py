"""Reading one split of a prepared TFDS set: every image is decoded, in the order of the files, into one array.

A set that fits in memory is decoded once. A streaming loader would decode it at every pass. Every pass over the array
sees the same order.
"""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from training.data import catalog
from training.data.shuffle import stratified_indices
from training.errors import UserError

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_BATCH = 1000  # Records fetched at a time. It bounds the encoded bytes in memory.
_MODES = {1: "L", 3: "RGB"}  # Pillow's names for grey and colour images of 8 bits.


class Split(NamedTuple):
    """The examples of one split, in a fixed order."""

    images: np.ndarray
    """uint8, shape (N, H, W, C), C = 1 or 3."""
    labels: np.ndarray
    """int32, shape (N,), from 0 to the number of classes - 1."""

    def take(self, indices: np.ndarray) -> "Split":
        """Return the examples with these numbers, in their order."""
        return Split(self.images[indices], self.labels[indices])

    def stratified(self, count: int | None, seed: int) -> "Split":
        """Choose `count` examples at random, of which each class keeps its share. None or too many: all examples."""
        if count is None or count >= len(self.labels):
            return self
        return self.take(stratified_indices(self.labels, count, seed))


def load_split(name: str, split: str, data_dir: Path | None) -> tuple[Split, tuple[str, ...]]:
    """Decode one split of a prepared TFDS set into memory.

    Parameters
    ----------
    name : str
        The set, `name` or `name/config`. `digits` is prepared if it is not there.
    split : str
        The name of the split.
    data_dir : Path or None
        The data directory; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets.

    Returns
    -------
    Split
        The examples in the order of the files.
    tuple of str
        The names of the classes.

    Raises
    ------
    UserError
        The set is unknown, not prepared, in another format, or damaged. It is not a classification of grey or colour
        images, uint8 and of one size. The split is unknown or empty. A label lies outside the classes.

    Notes
    -----
    It decodes on one core, image by image, and takes N H W C bytes of memory.
    """
    builder = catalog.open_set(name, catalog.data_directory(data_dir))
    splits = builder.info.splits
    if split not in splits:
        raise UserError(f"the split of {name!r} must be one of: {', '.join(splits)}; got {split!r}; choose another")
    if not splits[split].num_examples:
        raise UserError(f"the split must hold images; {split!r} of {name!r} is empty; the set has: {', '.join(splits)}")
    image_key, label_key = _feature_keys(name, builder.info.features)
    shape = builder.info.features[image_key].shape
    try:
        examples = _raw_examples(builder, split, image_key, label_key)
        data = _decode_all(name, examples, splits[split].num_examples, shape[-1])
    except (UserError, MemoryError):
        raise
    except Exception as error:  # Readers and decoders of several libraries run here, each with its own exceptions.
        raise catalog.damaged(name, Path(builder.data_dir), error) from error
    class_names = tuple(builder.info.features[label_key].names)
    _check_labels(name, split, data.labels, len(class_names))
    return data, class_names


def _feature_keys(name: str, features: "tfds.features.FeaturesDict") -> tuple[str, str]:
    """Find the keys of image and label: the only features of their kind, or those called `image` and `label`."""
    import tensorflow_datasets as tfds

    keys = []
    for kind, usual in ((tfds.features.Image, "image"), (tfds.features.ClassLabel, "label")):
        candidates = sorted(key for key, feature in features.items() if isinstance(feature, kind))
        if len(candidates) != 1 and usual not in candidates:
            raise UserError(
                f"data set {name!r} must have one {kind.__name__} feature, or one called {usual!r}; it has "
                f"{', '.join(candidates) or 'none'} among: {', '.join(sorted(features))}; use a set that has"
            )
        keys.append(usual if usual in candidates else candidates[0])
    image = features[keys[0]]
    if image.shape[-1] not in _MODES or image.np_dtype != np.uint8:
        raise UserError(
            f"images of {name!r} must be uint8 with 1 or 3 channels; got {np.dtype(image.np_dtype)} with "
            f"{image.shape[-1]}; use another set"
        )
    return keys[0], keys[1]


def _raw_examples(
    builder: "tfds.core.DatasetBuilder", split: str, image_key: str, label_key: str
) -> Iterator[tuple[bytes, int]]:
    """Yield the encoded image and the label of each record."""
    import tensorflow_datasets as tfds

    # If TFDS decoded the images, the pixels would depend on whether OpenCV is installed.
    source = builder.as_data_source(split=split, decoders={image_key: tfds.decode.SkipDecoding()})
    for start in range(0, len(source), _BATCH):
        for example in source.__getitems__(range(start, min(start + _BATCH, len(source)))):
            yield example[image_key], example[label_key]


def _decode_all(name: str, examples: Iterator[tuple[bytes, int]], count: int, channels: int) -> Split:
    """Decode `count` examples into one array. The first image sets the size."""
    images = np.empty((count, 0, 0, channels), dtype=np.uint8)
    labels = np.empty(count, dtype=np.int32)
    for index, (encoded, label) in enumerate(examples):
        image = _decode(encoded, channels)
        if index == 0:
            images = np.empty((count, *image.shape), dtype=np.uint8)
        if image.shape != images.shape[1:]:
            raise UserError(
                f"images of {name!r} must all have one size; the first is {_size(images[0])}, number {index} is "
                f"{_size(image)}; use a set of one size, or resize it while preparing a set of your own"
            )
        images[index], labels[index] = image, label
    return Split(images, labels)


def _decode(encoded: bytes, channels: int) -> np.ndarray:
    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError(f"image must have 8 bits per channel; got Pillow mode {image.mode}")
        converted = image if image.mode == _MODES[channels] else image.convert(_MODES[channels])
        return np.asarray(converted).reshape(image.height, image.width, channels)


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


def _check_labels(name: str, split: str, labels: np.ndarray, num_classes: int) -> None:
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        raise UserError(
            f"labels of {name!r} must lie in 0 to {num_classes - 1}; {outside.size} of {labels.size} in split "
            f"{split!r} do not, the first is {labels[outside[0]]} at index {outside[0]}; use another split or set"
        )
