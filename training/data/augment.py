"""Random crops and flips of image batches: training on natural images only."""

import numpy as np

MAX_SHIFT = 4
"""Pixels by which a crop may be off centre, in each direction: the customary value for 32x32 images."""


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift each image by up to four pixels and mirror half of them.

    For every image, independently: reflect the border outwards by four pixels, crop a window of the original size at a
    uniformly random place, and flip it left to right with probability 1/2.

    Parameters
    ----------
    images : ndarray of uint8, shape (B, H, W, C)
        A batch. It is left unchanged.
    rng : numpy.random.Generator
        Source of the randomness. If it is seeded from the run's seed and the step,
        `numpy.random.default_rng((seed, step))`, a resumed run repeats the batches of an uninterrupted one.

    Returns
    -------
    ndarray of uint8, shape (B, H, W, C)

    Notes
    -----
    It is one gather over the batch: padding, crop and flip only choose its indices. Crop and flip follow He et al.
    (2016), "Deep residual learning for image recognition", section 4.2. They pad with zeros; reflection makes no edges.
    """
    batch, height, width, _ = images.shape
    shifts = rng.integers(-MAX_SHIFT, MAX_SHIFT, size=(2, batch, 1), endpoint=True)
    rows = _reflect(np.arange(height) + shifts[0], height)
    columns = _reflect(np.arange(width) + shifts[1], width)
    flipped = rng.integers(2, size=(batch, 1), dtype=np.uint8).astype(bool)
    columns = np.where(flipped, columns[:, ::-1], columns)
    return images[np.arange(batch)[:, None, None], rows[:, :, None], columns[:, None, :]]


def _reflect(positions: np.ndarray, size: int) -> np.ndarray:
    """Fold positions outside `0..size-1` back inside, mirroring about the end pixels without repeating them."""
    period = max(2 * (size - 1), 1)
    folded = np.abs(positions) % period
    return np.minimum(folded, period - folded) if size > 1 else np.zeros_like(positions)
