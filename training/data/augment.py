"""Random crops and flips of image batches: training on natural images only."""

import numpy as np

MAX_SHIFT = 4
"""Pixels by which a crop may be off centre, in each direction: the customary value for 32x32 images."""


def augment(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shift each image by up to four pixels and mirror half of them.

    Equivalent to reflecting the border outwards by four pixels, cropping a window of the original size at a uniformly
    random place, and flipping it left to right with probability 1/2, independently for every image.

    Parameters
    ----------
    images : ndarray of uint8, shape (B, H, W, C)
        A batch; left unchanged.
    rng : numpy.random.Generator
        Source of the randomness. Seed it from the run's seed and the step, `numpy.random.default_rng((seed, step))`,
        and a resumed run repeats the batches of an uninterrupted one.

    Returns
    -------
    ndarray of uint8, shape (B, H, W, C)

    Notes
    -----
    One gather over the batch; padding, crop and flip only choose its indices. Crop and flip as in He et al. (2016),
    "Deep residual learning for image recognition", section 4.2, which pads with zeros; reflection makes no edges.
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
