"""Images that a network was not trained for: inverted images, noise, or the images of another data set."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from training.data import catalog
from training.data.reading import Split, load_split
from training.data.shuffle import permutation
from training.errors import NoDataSetError, UserError

# Streams of the run's seed. The epochs use the streams 0, 1, ...
_NOISE_STREAM, _FOREIGN_STREAM = 2**63 + 1, 2**63 + 2


def out_of_distribution(name: str, split: Split, data_dir: Path | None, seed: int) -> np.ndarray:
    """Return images that the model was not trained for, in the shape of those of `split`.

    Parameters
    ----------
    name : str
        `inverted`: the split's own images with intensities reversed (255 - x). `noise`: independent uniform pixels.
        Otherwise a prepared TFDS set, whose test images are converted to the split's channels (grey repeated, colour
        to ITU-R 601 luma) and resized bilinearly to its height and width.
    split : Split
        The in-distribution examples.
    data_dir : Path or None
        The data directory, as for `load_split`.
    seed : int
        Seed of the noise. If the foreign set has more images than `split`, it also chooses among them.

    Returns
    -------
    ndarray of uint8, shape (M, H, W, C)
        M is the number of images in `split`, or that of a foreign set if it has fewer.

    Raises
    ------
    UserError
        See `load_split`.
    """
    if name == "inverted":
        return 255 - split.images
    if name == "noise":
        rng = np.random.default_rng((seed % 2**64, _NOISE_STREAM))
        return rng.integers(256, size=split.images.shape, dtype=np.uint8)
    try:
        foreign, _ = load_split(name, "test", data_dir)
    except NoDataSetError:
        rule = "the foreign images must be inverted, noise, or those of a data set:"
        raise catalog.no_data_set(rule, name, catalog.data_directory(data_dir)) from None
    chosen = np.sort(permutation(seed, _FOREIGN_STREAM, len(foreign.images))[: len(split.images)])
    _, height, width, channels = split.images.shape
    return _resize(_to_channels(foreign.images[chosen], channels), height, width)


def foreign_sets(names: Sequence[str], split: Split, data_dir: Path | None, seed: int) -> dict[str, np.ndarray]:
    """Return several sets of foreign images, each as `out_of_distribution` returns it.

    Parameters
    ----------
    names : sequence of str
        What `out_of_distribution` takes as its name, each once.
    split, data_dir, seed
        As for `out_of_distribution`. A set is the same whatever others there are.

    Returns
    -------
    dict of str to ndarray of uint8, shape (M, H, W, C)
        By name, in the order of `names`. All are loaded before the first is used, because one may be missing.

    Raises
    ------
    UserError
        A name is there twice, or there is none, or see `out_of_distribution`.
    """
    if isinstance(names, str) or not names or len(set(names)) < len(names):
        raise UserError(
            f"the foreign images must be a list of different names; got {names!r}; try ('inverted', 'noise')"
        )
    return {name: out_of_distribution(name, split, data_dir, seed) for name in names}


def _to_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Repeat grey as colours, or reduce colours to their luma."""
    if images.shape[-1] == channels:
        return images
    if channels == 3:
        return np.repeat(images, 3, axis=-1)
    luma = images.astype(np.uint32) @ np.array([299, 587, 114], dtype=np.uint32)
    return ((luma + 500) // 1000).astype(np.uint8)[..., None]


def _resize(images: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize all images bilinearly."""
    if images.shape[1:3] == (height, width):
        return images
    size, channels = (width, height), images.shape[-1]
    resized = [
        np.asarray(Image.fromarray(image[..., 0] if channels == 1 else image).resize(size, Image.Resampling.BILINEAR))
        for image in images
    ]
    return np.stack(resized).reshape(-1, height, width, channels)
