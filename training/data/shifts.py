"""Shifts of images at severities 1 to 5: what a network meets that was trained on clean images.

Every shift is a pure function of the images, the severity and a seed, and takes grey and colour images of any size.
Grey images are taken for bright characters on black, colour images for photographs. The two have strengths of their
own, because noise and blur hide the details of a photograph long before they hide the shape of a character. `STRENGTHS`
holds all of them:

| shift | its strength | pixels outside the image |
|---|---|---|
| rotation | degrees about the centre, each image clockwise or not at random; bilinear | black, or mirrored in colour |
| noise | standard deviation of normal noise, / 255, independent in pixels and channels | - |
| blur | standard deviation of a Gaussian kernel, / the shorter side of the image | black, or mirrored in colour |
| contrast | the part that is kept of a pixel's deviation from the mean of its image | - |
| brightness | what is added to all pixels, / 255 | - |

Blur and rotation move a pixel in proportion to the size of the image, so 8 x 8 and 28 x 28 characters lose as much.
"""

from collections.abc import Callable

import numpy as np
import scipy  # its parts are imported at their first use

from training.errors import UserError

SEVERITIES = (1, 2, 3, 4, 5)

STRENGTHS: dict[str, dict[str, tuple[float, ...]]] = {
    "rotation": {"grey": (5, 10, 15, 22, 30), "colour": (5, 10, 16, 24, 35)},
    "noise": {"grey": (0.08, 0.16, 0.24, 0.34, 0.45), "colour": (0.02, 0.035, 0.055, 0.08, 0.12)},
    "blur": {"grey": (0.05, 0.07, 0.09, 0.11, 0.14), "colour": (0.013, 0.018, 0.025, 0.035, 0.05)},
    "contrast": {"grey": (0.8, 0.6, 0.45, 0.32, 0.2), "colour": (0.8, 0.6, 0.45, 0.32, 0.2)},
    "brightness": {"grey": (0.1, 0.2, 0.3, 0.4, 0.5), "colour": (0.08, 0.16, 0.25, 0.35, 0.45)},
}
"""By shift and kind of image, the strengths at severities 1 to 5."""

# The stream of the run's seed. The epochs use the streams 0, 1, ..., and foreign images 2**63 + 1 and 2**63 + 2.
_STREAM = 2**63 + 3

_CHUNK_NUMBERS = 2**21  # Numbers in memory at a time: 16 MiB an array in float64.


def shifted(name: str, images: np.ndarray, severity: int, seed: int) -> np.ndarray:
    """Return shifted images. A larger severity moves them further from the clean ones.

    Parameters
    ----------
    name : str
        rotation, noise, blur, contrast or brightness; see the table above.
    images : ndarray of uint8, shape (N, H, W, C)
        C = 1 or 3.
    severity : int
        1 to 5, or 0 for the images as they are.
    seed : int
        Seed of the noise and of the directions of rotation. An image keeps both at all severities, and they depend
        only on the seed, its shape and its place, so the first images are shifted alike whatever follows them.

    Returns
    -------
    ndarray of uint8, shape (N, H, W, C)
        A new array, rounded and cut to 0 to 255.

    Raises
    ------
    UserError
        `name` or `severity` is not one of those above.
    ValueError
        The images have another type or shape.

    Notes
    -----
    2,000 colour images of 32 x 32 pixels take at most .7 s on one core.
    """
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"`shifted(images=...)` must be uint8 of shape (N, H, W, C), C = 1 or 3; got {images.dtype} of shape "
            f"{images.shape}; pass the images of a `Split`"
        )
    if name not in STRENGTHS:
        raise UserError(f"the shift must be one of: {', '.join(STRENGTHS)}; got {name!r}; choose one of these")
    if isinstance(severity, bool) or severity not in (0, *SEVERITIES):
        raise UserError(f"the severity of a shift must be a whole number from 0 to 5; got {severity!r}; try 3")
    if severity == 0 or not images.size:
        return images.copy()
    strength = STRENGTHS[name]["grey" if images.shape[-1] == 1 else "colour"][int(severity) - 1]
    bits = np.random.Philox(key=np.array([seed % 2**64, _STREAM], dtype=np.uint64))
    result = np.empty_like(images)
    rows = max(1, _CHUNK_NUMBERS // images[0].size)
    for start in range(0, len(images), rows):
        moved = _SHIFTS[name](images[start : start + rows].astype(np.float64), strength, bits)
        result[start : start + rows] = np.clip(np.rint(moved), 0, 255)
    return result


def _rotation(images: np.ndarray, degrees: float, bits: np.random.Philox) -> np.ndarray:
    """Rotate each image about its centre, to a random side."""
    is_clockwise = bits.random_raw(len(images)) >> np.uint64(63) == 1
    rotated = np.empty_like(images)
    for chosen, angle in ((is_clockwise, -degrees), (~is_clockwise, degrees)):
        rotated[chosen] = scipy.ndimage.rotate(
            images[chosen], angle, axes=(1, 2), reshape=False, order=1, mode=_outside(images)
        )
    return rotated


def _noise(images: np.ndarray, deviation: float, bits: np.random.Philox) -> np.ndarray:
    """Add normal noise, the normal quantiles of the raw stream, which NumPy keeps fixed for ever."""
    uniform = ((bits.random_raw(images.size) >> np.uint64(11)) + 0.5) * 2.0**-53
    return images + 255 * deviation * scipy.special.ndtri(uniform).reshape(images.shape)


def _blur(images: np.ndarray, deviation: float, bits: np.random.Philox) -> np.ndarray:
    """Convolve with a Gaussian kernel."""
    pixels = deviation * min(images.shape[1:3])
    return scipy.ndimage.gaussian_filter(images, (0, pixels, pixels, 0), mode=_outside(images))


def _contrast(images: np.ndarray, kept: float, bits: np.random.Philox) -> np.ndarray:
    """Move all pixels towards the mean of their image."""
    mean = images.mean(axis=(1, 2, 3), keepdims=True)
    return mean + kept * (images - mean)


def _brightness(images: np.ndarray, added: float, bits: np.random.Philox) -> np.ndarray:
    """Add one number to all pixels."""
    return images + 255 * added


def _outside(images: np.ndarray) -> str:
    """What lies outside an image, as SciPy names it: black for characters, the mirrored image for photographs."""
    return "constant" if images.shape[-1] == 1 else "reflect"


_SHIFTS: dict[str, Callable[[np.ndarray, float, np.random.Philox], np.ndarray]] = {
    "rotation": _rotation,
    "noise": _noise,
    "blur": _blur,
    "contrast": _contrast,
    "brightness": _brightness,
}
