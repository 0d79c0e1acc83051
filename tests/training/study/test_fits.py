"""The probabilities that a posterior is measured by."""

import numpy as np

from training.study.fits import _is_of_no_normalisation, _monte_carlo


def test_an_average_over_samples_keeps_probabilities_that_single_precision_would_lose():
    mean = np.float32([[0.0, 200.0], [0.0, 0.0]])
    deviations = np.float32([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 10.0], [-1.0, 0.0]]])
    probs = _monte_carlo(mean, deviations)
    assert probs[0, 0] > 0
    np.testing.assert_allclose(np.log(probs[0, 0]), np.logaddexp(-200, -210) - np.log(2), rtol=1e-12)
    np.testing.assert_allclose(probs[1], [0.5, 0.5], rtol=1e-12)


def test_scales_and_biases_of_normalisation_layers_are_told_from_others():
    normalisation = ("norm1/scale", "block1_0/norm2/bias", "patch_embed1/norm/scale")
    others = ("patch_embed1/kernel", "block1_0/attn/conv0/bias", "block1_0/layer_scale_1", "head/bias")
    assert not any(map(_is_of_no_normalisation, normalisation))
    assert all(map(_is_of_no_normalisation, others))
