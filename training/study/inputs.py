"""The images that all methods of a regime are measured on, as one array, so that one pass of a posterior serves all.

They do not depend on the seed of a cell: intervals over seeds need the same images in all of them.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from training.data.foreign import foreign_sets
from training.data.load import ImageData
from training.data.shifts import SEVERITIES, shifted
from training.data.shuffle import stratified_indices
from training.study.config import Measures

_IMAGE_SEED, _TEST_SEED, _SHIFT_SEED = 0, 2**63 + 5, 2**63 + 6


class HeldOut(NamedTuple):
    """Test images, shifted ones, and foreign ones."""

    images: np.ndarray
    """(M, H, W, C): the test images, those of each shift and severity in turn, and each foreign set in turn."""
    labels: np.ndarray
    """Labels of the test images."""
    shift_labels: np.ndarray
    """Labels of the images of one shift and severity."""
    shifted_from: np.ndarray
    """Their places among the test images."""
    shifts: tuple[str, ...]
    foreign: dict[str, slice]
    """Where the images of each foreign set are."""

    @property
    def num_test(self) -> int:
        """How many test images there are."""
        return len(self.labels)

    def of_shifts(self, rows: np.ndarray) -> np.ndarray:
        """Arrange what belongs to `images` by shift and severity: (shifts, severities, images, ...)."""
        count = len(self.shifts) * len(SEVERITIES) * len(self.shift_labels)
        part = rows[self.num_test : self.num_test + count]
        return part.reshape(len(self.shifts), len(SEVERITIES), len(self.shift_labels), *rows.shape[1:])


def held_out_images(data: ImageData, measures: Measures, data_dir: Path | None) -> HeldOut:
    """Load, choose and shift the images of a regime.

    Raises
    ------
    UserError
        A foreign set is not prepared.
    """
    test = data.test.stratified(measures.test_examples, _TEST_SEED)
    moved = stratified_indices(test.labels, min(measures.shift_examples, len(test.labels)), _SHIFT_SEED)
    arrays = [test.images]
    arrays += [
        shifted(name, test.images[moved], severity, _IMAGE_SEED) for name in measures.shifts for severity in SEVERITIES
    ]
    start, places = sum(map(len, arrays)), {}
    if measures.foreign:
        for name, images in foreign_sets(measures.foreign, test, data_dir, _IMAGE_SEED).items():
            arrays.append(images)
            places[name] = slice(start, start + len(images))
            start += len(images)
    return HeldOut(np.concatenate(arrays), test.labels, test.labels[moved], moved, measures.shifts, places)
