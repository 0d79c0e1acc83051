"""The embedded data set: a TFDS builder over the 1,797 handwritten digits that scikit-learn ships."""

import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image
from sklearn.datasets import load_digits

from training.data.shuffle import stratified_indices

SPLIT_SIZES = {"train": 1257, "validation": 180, "test": 360}
"""Examples per split. Every class keeps its share in each split, to within one or two examples."""

_TEST_SEED, _VALIDATION_SEED = 1797, 1798

_CITATION = """\
@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  year = {1998},
  howpublished = {UCI Machine Learning Repository},
  doi = {10.24432/C50P49},
}"""


class Digits(tfds.core.GeneratorBasedBuilder):
    """Handwritten digits, 8x8 grey pixels, ten classes, in fixed stratified splits of 1,257, 180 and 360.

    It needs neither a network nor TensorFlow: the images come with scikit-learn and are stored as PNG files, which TFDS
    writes as they are.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The splits are fixed by the seeds in this file."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(
                "The test part of the UCI set 'Optical Recognition of Handwritten Digits', as shipped with "
                "scikit-learn: each pixel counts the ink in a 4x4 block (0 to 16), here scaled to 0 to 255."
            ),
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(8, 8, 1), encoding_format="png"),
                    "label": tfds.features.ClassLabel(names=[str(digit) for digit in range(10)]),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://archive.ics.uci.edu/dataset/80",
            citation=_CITATION,
            license="Creative Commons Attribution 4.0 International (CC BY 4.0)",
            # Records stay in the order of their keys, so the set is the same under every TFDS release.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager  # Nothing to download.
        return {split: self._generate_examples(split) for split in SPLIT_SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        digits = load_digits()
        for index in split_indices(digits.target)[split]:
            png = io.BytesIO()
            Image.fromarray(to_uint8(digits.images[index])).save(png, format="PNG")
            yield int(index), {"image": png.getvalue(), "label": int(digits.target[index])}


def split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    """Return the indices of each split, increasing: a fixed stratified partition of all examples."""
    test = stratified_indices(labels, SPLIT_SIZES["test"], _TEST_SEED)
    rest = np.setdiff1d(np.arange(labels.size), test)
    validation = rest[stratified_indices(labels[rest], SPLIT_SIZES["validation"], _VALIDATION_SEED)]
    return {"train": np.setdiff1d(rest, validation), "validation": validation, "test": test}


def to_uint8(counts: np.ndarray) -> np.ndarray:
    """Map ink counts 0..16 to 0..255, rounded. `(pixels * 16 + 127) // 255` maps them back exactly."""
    return ((counts.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)
