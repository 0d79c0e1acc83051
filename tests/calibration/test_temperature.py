"""Temperature scaling: the minimum of the NLL, and its bounds."""

import numpy as np
import pytest
from scipy.special import softmax

from bnnlaplace import calibration
from bnnlaplace.calibration.temperature import fit_temperature


@pytest.fixture(scope="module")
def overconfident():
    """Labels drawn from softmax(logits / 2)."""
    rng = np.random.default_rng(1)
    logits = 3 * rng.normal(size=(200, 5))
    return logits, (softmax(logits / 2, axis=1).cumsum(axis=1) < rng.random((200, 1))).sum(axis=1)


def test_temperature_recovers_the_scale_and_minimises(overconfident):
    logits, labels = overconfident
    fit = fit_temperature(logits, labels)
    assert not fit.at_bound and 1.2 < fit.temperature < 3

    def nll(temperature):
        return calibration.negative_log_likelihood(softmax(logits / temperature, axis=1), labels)

    assert fit.nll == pytest.approx(nll(fit.temperature), rel=1e-12)
    step = 1e-4  # a central difference of the NLL vanishes at its minimum, up to O(step^2)
    assert abs(nll(fit.temperature * (1 + step)) - nll(fit.temperature * (1 - step))) < 10 * step**3
    scaled = fit_temperature(3 * logits + 7, labels)
    assert scaled.temperature == pytest.approx(3 * fit.temperature, rel=1e-9)


def test_temperature_at_its_bounds():
    logits = np.array([[5.0, 0.0], [0.0, 5.0]])
    separable = fit_temperature(logits, np.array([0, 1]))
    assert separable.at_bound and separable.temperature == 0.1
    assert np.isfinite(separable.nll) and separable.nll < 1e-20
    hopeless = fit_temperature(logits, np.array([1, 0]), bounds=(0.5, 20.0))
    assert hopeless.at_bound and hopeless.temperature == 20.0


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("logits", "bounds", "message"),
    [
        ([[np.inf, 0.0], [0.0, 1.0]], (0.1, 10.0), r"fit_temperature\(logits=\.\.\.\) must be .* 1 non-finite"),
        ([0.0, 1.0], (0.1, 10.0), r"shape \(2,\)"),
        ([[1.0, 0.0], [0.0, 1.0]], (2.0, 1.0), r"0 < low < high < inf; got \(2\.0, 1\.0\)"),
    ],
)
def test_bad_arguments_are_refused(logits, bounds, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(np.array(logits), np.array([0, 1]), bounds)
