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


def test_logits_of_a_binary_classifier(overconfident):
    """One logit f stands for the two logits 0 and f."""
    logits, labels = overconfident
    margin, labels = logits[:, 1] - logits[:, 0], labels % 2
    expected = fit_temperature(np.stack([np.zeros_like(margin), margin], axis=1), labels)
    for form in (margin, margin[:, None]):
        assert fit_temperature(form, labels) == expected
    with pytest.warns(UserWarning, match="between 0 and 1: if they are the probabilities .* before the sigmoid"):
        fit_temperature(1 / (1 + np.exp(-margin)), labels)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("logits", "bounds", "message"),
    [
        ([[np.inf, 0.0], [0.0, 1.0]], (0.1, 10.0), r"fit_temperature\(logits=\.\.\.\) must be .* 1 non-finite"),
        (np.zeros((2, 2, 1)), (0.1, 10.0), r"shape \(2, 2, 1\)"),
        ("ab", (0.1, 10.0), "array of real numbers"),
        ([[1.0, 0.0], [0.0, 1.0]], (0.1, 10.0), "outputs before the softmax; got rows of probabilities"),
        ([[0.25, 0.75], [0.6, 0.4]], (0.1, 10.0), "outputs before the softmax; got rows of probabilities"),
        ([[2.0, 0.0], [0.0, 1.0]], (2.0, 1.0), r"0 < low < high < inf; got \(2\.0, 1\.0\)"),
        ([[2.0, 0.0], [0.0, 1.0]], None, "0 < low < high < inf; got None"),
        ([[2.0, 0.0], [0.0, 1.0]], ("1", "2"), "0 < low < high < inf; got "),
        ([[2.0, 0.0], [0.0, 1.0]], (1, 2, 3), "0 < low < high < inf; got "),
    ],
)
def test_bad_arguments_are_refused(logits, bounds, message):
    with pytest.raises(ValueError, match=message):
        fit_temperature(np.array(logits), np.array([0, 1]), bounds)
