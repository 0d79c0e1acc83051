"""Augmentation against the plain recipe: pad, crop and flip one image at a time."""

import numpy as np

from training.data.augment import MAX_SHIFT, augment


def all_variants(image: np.ndarray) -> dict[bytes, tuple[int, int, bool]]:
    """Return every image that padding by reflection, cropping and flipping can make."""
    height, width, _ = image.shape
    padded = np.pad(image, ((MAX_SHIFT, MAX_SHIFT), (MAX_SHIFT, MAX_SHIFT), (0, 0)), mode="reflect")
    variants = {}
    for top in range(2 * MAX_SHIFT + 1):
        for left in range(2 * MAX_SHIFT + 1):
            crop = padded[top : top + height, left : left + width]
            variants[crop.tobytes()] = (top, left, False)
            variants[crop[:, ::-1].tobytes()] = (top, left, True)
    return variants


def test_every_result_is_a_padded_crop_and_each_occurs_equally_often():
    image = np.random.default_rng(0).integers(256, size=(12, 11, 3), dtype=np.uint8)
    variants = all_variants(image)
    assert len(variants) == 162
    batch = np.repeat(image[None], 16200, axis=0)
    seen = [variants[result.tobytes()] for result in augment(batch, np.random.default_rng(1))]
    _, counts = np.unique(seen, axis=0, return_counts=True)
    assert len(counts) == 162
    # Pearson's statistic has 161 degrees of freedom: mean 161, standard deviation 18.
    assert abs(np.sum((counts - 100.0) ** 2 / 100.0) - 161) < 4 * 18


def test_input_is_left_unchanged_and_the_generator_decides():
    images = np.random.default_rng(0).integers(256, size=(5, 8, 8, 3), dtype=np.uint8)
    before = images.copy()
    first = augment(images, np.random.default_rng((3, 7)))
    assert first.dtype == np.uint8
    assert np.array_equal(images, before)
    assert np.array_equal(first, augment(images, np.random.default_rng((3, 7))))
    assert not np.array_equal(first, augment(images, np.random.default_rng((3, 8))))


def test_images_smaller_than_the_shift_reflect_as_numpy_pads():
    for size in (1, 2, 3):
        image = np.arange(size * size * 3, dtype=np.uint8).reshape(size, size, 3)
        variants = all_variants(image)
        for result in augment(np.repeat(image[None], 50, axis=0), np.random.default_rng(0)):
            assert result.tobytes() in variants
