"""The probabilities that a posterior is measured by, and the choice of its prior precision."""

from types import SimpleNamespace

import numpy as np

from bnnlaplace.predictive.validation import ValidationCurve
from training.config import Config
from training.study.config import Measures
from training.study.fits import VALIDATION, _by_validation, _is_of_no_normalisation, recorded


def test_scales_and_biases_of_normalisation_layers_are_told_from_others():
    normalisation = ("norm1/scale", "block1_0/norm2/bias", "patch_embed1/norm/scale")
    others = ("patch_embed1/kernel", "block1_0/attn/conv0/bias", "block1_0/layer_scale_1", "head/bias")
    assert not any(map(_is_of_no_normalisation, normalisation))
    assert all(map(_is_of_no_normalisation, others))


def test_a_validation_choice_at_an_end_of_the_grid_is_recorded():
    grid = np.array([1.0, 10.0, 100.0])
    for nll, count in (([0.3, 0.2, 0.1], 1), ([0.3, 0.1, 0.2], 0)):
        curve = ValidationCurve(grid, np.array(nll), np.zeros(3), np.ones(3, bool))
        la = SimpleNamespace(validation_curve=lambda *rest, curve=curve, **options: curve)
        of = SimpleNamespace(data=SimpleNamespace(validation=()))
        with recorded() as said:
            chosen = _by_validation(la, Config(), of, Measures(), said)
        assert chosen == {VALIDATION: grid[np.argmin(nll)]}
        assert [text.startswith("the validation NLL is lowest at an end of the grid") for text in said] == [
            True
        ] * count
