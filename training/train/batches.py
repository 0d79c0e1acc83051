"""The images that each step sees, as a pure function of the seed and the number of the step.

The permutations of the epochs follow each other without a gap, and the steps cut this stream into batches of one size.
Nothing is dropped or padded. If the batch size does not divide the number of images, the last batch of an epoch ends
with the first images of the next.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from training.data.load import Split, epoch_order


class Plan(NamedTuple):
    """The steps of a run: `epochs` passes of training, then `polish_epochs` passes of polishing."""

    num_examples: int
    batch_size: int
    epochs: int
    polish_epochs: int

    @property
    def train_steps(self) -> int:
        """Steps of the training phase."""
        return self._steps(self.epochs)

    @property
    def total_steps(self) -> int:
        """Steps of both phases."""
        return self.train_steps + self._steps(self.polish_epochs)

    @property
    def total_epochs(self) -> int:
        """Epochs of both phases."""
        return self.epochs + self.polish_epochs

    def end_of_epoch(self, epoch: int) -> int:
        """Number of steps after the given number of epochs."""
        if epoch <= self.epochs:
            return self._steps(epoch)
        return self.train_steps + self._steps(epoch - self.epochs)

    def indices(self, seed: int, step: int) -> np.ndarray:
        """The training images of a step, shape (batch_size,)."""
        # The last training batch may reach into permutation `epochs`, so polishing starts with the one after it.
        polishing = step >= self.train_steps
        first = (step - self.train_steps if polishing else step) * self.batch_size
        position = np.arange(first, first + self.batch_size)
        epoch, within = np.divmod(position, self.num_examples)
        epoch += self.epochs + 1 if polishing else 0
        return np.concatenate([_order(seed, int(e), self.num_examples)[within[epoch == e]] for e in np.unique(epoch)])

    def _steps(self, epochs: int) -> int:
        return -(-epochs * self.num_examples // self.batch_size)


_order = lru_cache(maxsize=2)(epoch_order)


def fixed_order(split: Split, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield images, labels and mask of a split in its own order. Masked zeros fill the last batch to full size."""
    for start in range(0, len(split.labels), batch_size):
        images, labels = split.images[start : start + batch_size], split.labels[start : start + batch_size]
        mask = np.arange(batch_size) < len(labels)
        missing = batch_size - len(labels)
        if missing:
            images = np.concatenate([images, np.zeros((missing, *images.shape[1:]), images.dtype)])
            labels = np.concatenate([labels, np.zeros(missing, labels.dtype)])
        yield images, labels, mask


def weighted_batches(images: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, float]]:
    """Yield batches of full size with weights, such that the weighted sums over batches are the sums over the images.

    They are for sums in which the images cannot be told apart any more, so that a mask is of no use. Copies of its
    first image fill the last batch, and one more batch of these copies alone, with negative weight, takes their share
    away.
    """
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size]
        missing = batch_size - len(batch)
        yield np.concatenate([batch, np.repeat(batch[:1], missing, axis=0)]), 1.0
        if missing:
            yield np.repeat(batch[:1], batch_size, axis=0), -missing / batch_size
