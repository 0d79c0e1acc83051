"""Shifts of images: identity, order of severities, exact values of each shift, and dependence on the seed alone."""

import numpy as np
import pytest
import scipy.ndimage
from sklearn.datasets import load_digits

from training.data import shifts
from training.data.digits import to_uint8
from training.data.shifts import SEVERITIES, STRENGTHS, shifted
from training.errors import UserError


def characters() -> np.ndarray:
    return to_uint8(load_digits().images[:60])[..., None]


def photographs(side: int = 32) -> np.ndarray:
    """Smooth colour images with detail, as photographs have."""
    noise = np.random.default_rng(0).normal(size=(12, side, side, 3))
    smooth = sum(scipy.ndimage.gaussian_filter(noise, (0, s, s, 0.5), mode="wrap") * s for s in (0.5, 1, 4))
    return np.clip(127 + 60 * smooth / smooth.std(), 0, 255).astype(np.uint8)


IMAGES = {
    "8x8": characters(),
    "28x28": np.stack([np.kron(image[1:, 1:, 0], np.ones((4, 4), np.uint8)) for image in characters()])[..., None],
    "32x32x3": photographs(),
    "24x40x3": np.concatenate([photographs(40)[:, :24]] * 2),
}


@pytest.mark.parametrize("name", STRENGTHS)
@pytest.mark.parametrize("kind", IMAGES)
def test_severity_0_is_the_identity_and_each_further_one_is_further_away(name, kind):
    images = IMAGES[kind]
    before = images.copy()
    results = [shifted(name, images, severity, seed=1) for severity in (0, *SEVERITIES)]
    assert np.array_equal(results[0], images) and not np.shares_memory(results[0], images)
    assert all((result.shape, result.dtype) == (images.shape, np.uint8) for result in results)
    distances = [np.abs(result.astype(float) - images).mean() for result in results]
    assert (np.diff(distances) > 0.25).all(), distances
    assert np.array_equal(images, before)


def test_images_are_shifted_alike_in_parts_and_whatever_follows(monkeypatch):
    images = IMAGES["8x8"]
    for name in STRENGTHS:
        whole = shifted(name, images, 3, seed=5)
        assert np.array_equal(shifted(name, images[:7], 3, seed=5), whole[:7])
        with monkeypatch.context() as patch:
            patch.setattr(shifts, "_CHUNK_NUMBERS", 9 * 64)
            assert np.array_equal(shifted(name, images, 3, seed=5), whole)
        is_random = name in ("rotation", "noise")
        assert np.array_equal(shifted(name, images, 3, seed=6), whole) != is_random


def test_noise_is_normal_independent_and_of_the_stated_deviation():
    grey = np.full((2000, 8, 8, 1), 128, np.uint8)
    noise = shifted("noise", grey, 1, seed=0).astype(float) - 128
    deviation = 255 * STRENGTHS["noise"]["grey"][0]  # rounding adds a variance of 1/12
    assert noise.std() == pytest.approx(deviation, rel=4 / np.sqrt(2 * noise.size))
    assert abs(noise.mean()) < 4 * deviation / np.sqrt(noise.size)
    assert abs(np.mean(noise**4) / noise.var() ** 2 - 3) < 4 * np.sqrt(24 / noise.size)
    pairs = np.corrcoef(noise.reshape(2000, 64).T)[np.triu_indices(64, 1)]
    assert np.sqrt(np.mean(pairs**2)) == pytest.approx(1 / np.sqrt(2000), rel=0.1)


def test_contrast_and_brightness_are_their_formulas():
    images = IMAGES["32x32x3"].astype(float)
    kept, added = (STRENGTHS[name]["colour"][3] for name in ("contrast", "brightness"))
    mean = np.array([[[[image.mean()]]] for image in images]).reshape(-1, 1, 1, 1)
    assert np.array_equal(shifted("contrast", IMAGES["32x32x3"], 4, 0), np.rint(mean + kept * (images - mean)))
    assert np.array_equal(
        shifted("brightness", IMAGES["32x32x3"], 4, 0), np.minimum(np.rint(images + 255 * added), 255)
    )


def test_blur_is_a_gaussian_in_proportion_to_the_size_and_stays_in_its_channel():
    for side in (32, 64):
        point = np.zeros((1, side, side, 3), np.uint8)
        point[0, side // 2, side // 2, 1] = 255
        spread = shifted("blur", np.repeat(point, 2, axis=0), 5, 0)[1].astype(float)
        assert not spread[..., [0, 2]].any()
        offsets = np.arange(side) - side // 2
        sigma = STRENGTHS["blur"]["colour"][4] * side
        profile = np.exp(-(offsets**2) / (2 * sigma**2))
        expected = 255 * np.outer(profile, profile) / profile.sum() ** 2
        np.testing.assert_allclose(spread[..., 1], expected, atol=0.52)


def test_a_quarter_turn_turns_every_pixel_to_either_side(monkeypatch):
    """The only angles at which interpolation leaves a pixel as it is; the sides are even."""
    monkeypatch.setitem(shifts.STRENGTHS, "rotation", {"grey": (90,) * 5, "colour": (90,) * 5})
    for images in (np.concatenate([IMAGES["8x8"]] * 4), IMAGES["32x32x3"]):
        turned = shifted("rotation", images, 1, seed=2)
        to_the_right = [np.array_equal(a, np.rot90(b, -1)) for a, b in zip(turned, images, strict=True)]
        to_the_left = [np.array_equal(a, np.rot90(b)) for a, b in zip(turned, images, strict=True)]
        assert np.array_equal(np.logical_xor(to_the_right, to_the_left), np.ones(len(images), bool))
        assert abs(np.mean(to_the_right) - 0.5) < 4 * 0.5 / np.sqrt(len(images))


def test_an_image_turns_to_the_same_side_at_all_severities():
    bar = np.zeros((40, 9, 9, 1), np.uint8)
    bar[:, 4] = 255  # a horizontal bar: after a small turn its right end is above or below the middle
    sides = []
    for severity in SEVERITIES:
        ends = shifted("rotation", bar, severity, seed=3)[:, :, 7:, 0].astype(int)
        sides.append(np.sign(ends[:, :4].sum(axis=(1, 2)) - ends[:, 5:].sum(axis=(1, 2))))
    assert np.array_equal(np.unique(sides), [-1, 1])
    assert (np.array(sides) == sides[0]).all()


def test_outside_is_black_for_characters_and_mirrored_for_photographs():
    grey = shifted("rotation", np.full((3, 8, 8, 1), 200, np.uint8), 5, 0)
    colour = shifted("rotation", np.full((3, 8, 8, 3), 200, np.uint8), 5, 0)
    assert grey[:, 0, 0].max() < 100 and (colour == 200).all()
    assert shifted("blur", np.full((1, 8, 8, 1), 200, np.uint8), 5, 0)[0, 0, 0] < 150
    assert (shifted("blur", np.full((1, 8, 8, 3), 200, np.uint8), 5, 0) == 200).all()


@pytest.mark.parametrize(
    ("name", "images", "severity", "error", "message"),
    [
        ("fog", IMAGES["8x8"], 1, UserError, "must be one of: rotation, noise, blur, contrast, brightness; got 'fog'"),
        ("blur", IMAGES["8x8"], 6, UserError, "must be a whole number from 0 to 5; got 6"),
        ("blur", IMAGES["8x8"], True, UserError, "must be a whole number from 0 to 5; got True"),
        ("blur", IMAGES["8x8"] / 255.0, 1, ValueError, "must be uint8 .*; got float64 of shape"),
        ("blur", IMAGES["8x8"][..., 0], 1, ValueError, r"must be uint8 of shape \(N, H, W, C\).*\(60, 8, 8\)"),
    ],
)
def test_what_cannot_be_shifted_is_refused(name, images, severity, error, message):
    with pytest.raises(error, match=message):
        shifted(name, images, severity, seed=0)
