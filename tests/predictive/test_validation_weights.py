"""Validation data whose examples count more or less than once, and unknown targets among them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from jax.tree_util import Partial

import bnnlaplace

RNG = np.random.default_rng(7)
X, W = RNG.normal(size=(12, 2, 4)), RNG.normal(size=(4, 3))
LABELS, NUMBERS = RNG.integers(0, 3, size=(12, 2)), RNG.normal(size=(12, 2, 3))
GRID, PARTS = [0.1, 3.0], (slice(5), slice(5, 12))
# Fractions, numbers above one, and examples that do not count.
WEIGHTS = np.array([2.0, 0, 0.5, 1, 3, 0.25, 0, 1, 1, 4, 0.1, 2])


@pytest.fixture(autouse=True)
def double(x64):
    """Differences between sums of other orders are rounding."""


def fitted(likelihood, targets):
    """A linear model of two positions, each with three outputs."""
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, W)
    return bnnlaplace.Laplace(network, likelihood, hessian_structure="diag").fit((X, targets))


def curves(la, labels, weights, **options):
    """The curve of all data, and of two batches. Examples of weight zero hold NaN and a label that is not a class."""
    counts = (weights > 0)[:, None]
    spoilt, labels = np.where(counts[..., None], X, np.nan), np.where(counts, labels, 99)
    for data in ((spoilt, labels, weights), [(spoilt[part], labels[part], weights[part]) for part in PARTS]):
        with pytest.warns(UserWarning, match="lowest at an end"):  # of the two prior precisions
            la.optimize_prior_precision("gridsearch", validation=data, precisions=GRID, **options)
        if isinstance(data, tuple):
            yield la.validation_curve(*data[:2], GRID, weights=data[2], **options)
        else:
            yield bnnlaplace.predictive.validation.validation_curve(la.fitted, data, GRID, **options)


def ece(confidence, is_right, weights):
    """The weighted calibration error of 15 bins, by its definition."""
    total = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        total += abs(np.sum(weights[inside] * (confidence[inside] - is_right[inside])))
    return total / weights.sum()


@pytest.mark.parametrize(
    ("link", "ignore_index"), usual([("probit", -100), ("mc", None)], ("probit", "mc"), (None, -100))
)
def test_labels_count_as_often_as_their_examples(link, ignore_index):
    """None noticed that weights were refused, or an unknown label that entered one of the means."""
    options = {"link_approx": "mc", "key": jax.random.key(0), "num_samples": 8} if link == "mc" else {}
    labels = LABELS.copy()
    if ignore_index is not None:
        labels[:6, 0], labels[4] = ignore_index, ignore_index
    la = fitted(bnnlaplace.categorical(ignore_index=ignore_index), labels)
    one, other = curves(la, labels, WEIGHTS, **options)
    if not options:  # samples differ between slices, so that those of `predictive` are not those of the second batch
        np.testing.assert_allclose(other.negative_log_likelihood, one.negative_log_likelihood, rtol=1e-12)
        np.testing.assert_allclose(other.expected_calibration_error, one.expected_calibration_error, rtol=1e-12)
    for delta, nll, error in zip(GRID, one.negative_log_likelihood, one.expected_calibration_error, strict=True):
        present = np.concatenate([np.flatnonzero(WEIGHTS), np.full(2, 11)])  # noise belongs to places in the batch
        probs = np.asarray(la.with_prior_precision(delta).predictive(X[present], **options))
        known = (labels[present] != ignore_index) & (np.arange(12) < 10)[:, None]
        weights = np.broadcast_to(WEIGHTS[present][:, None], known.shape)[known]
        probs, of_known = probs[known], labels[present][known]
        at_label = probs[np.arange(len(probs)), of_known]
        np.testing.assert_allclose(nll, np.average(-np.log(at_label), weights=weights), rtol=1e-10)
        expected = ece(probs.max(axis=1), probs.argmax(axis=1) == of_known, weights)
        np.testing.assert_allclose(error, expected, rtol=1e-10)


def masked(likelihood):
    """Numbers of which NaN stands for a missing one, with a factor of two for all others."""

    def weights_of(y):
        return jnp.where(jnp.isnan(y).any(axis=-1), 0.0, 2.0)

    def log_prob(f, y):
        return weights_of(y) * likelihood.log_prob(f, jnp.nan_to_num(y))

    return bnnlaplace.Likelihood(
        "masked", "array", Partial(log_prob), likelihood.factor_mv, likelihood.mean, target_weights=Partial(weights_of)
    )


@pytest.mark.parametrize("kind", usual(["masked", "binary"], ["regression", "masked", "soft", "binary"]))
def test_numbers_count_as_often_as_their_examples(kind):
    """An example of weight k is k copies of it, and a missing number is none at all."""
    gaussian, draw = bnnlaplace.gaussian(0.7), partial(np.random.default_rng(1).dirichlet, np.ones(3))
    likelihood, targets = {
        "regression": (gaussian, NUMBERS),
        "masked": (masked(gaussian), NUMBERS),
        "soft": (bnnlaplace.categorical(), draw((12, 2))),
        "binary": (bnnlaplace.bernoulli(), (NUMBERS > 0).astype(float)),
    }[kind]
    la = fitted(likelihood, targets)
    # All samples are zero for "masked", whose noise would depend on the number of inputs.
    options = {"key": jax.random.key(0), "num_samples": 2} if kind == "masked" else {}
    if kind == "masked":
        la = la.with_prior_precision(1e30)
        targets = targets.copy()
        targets[3, 1], targets[4] = np.nan, np.nan
    counts = np.array([2, 0, 1, 1, 3, 1, 0, 1, 1, 4, 1, 2])
    copies = np.repeat(np.arange(12), counts)
    grid = [1e30] if kind == "masked" else GRID
    validate = partial(bnnlaplace.predictive.validation.validation_curve, la.fitted, precisions=grid, **options)
    found, expected = validate((X, targets, counts)), validate((X[copies], targets[copies]))
    np.testing.assert_allclose(found.negative_log_likelihood, expected.negative_log_likelihood, rtol=1e-12)
    np.testing.assert_allclose(found.expected_calibration_error, expected.expected_calibration_error, rtol=1e-12)
    if kind == "masked":  # the score is that of p(y | f), without the factor of two and without what is missing
        known = ~np.isnan(targets).any(axis=-1)
        log_prob = -0.5 * ((targets - X @ W)[known] / 0.7) ** 2 - np.log(0.7 * np.sqrt(2 * np.pi))
        weights = np.broadcast_to(counts[:, None], known.shape)[known]
        nll = np.average(-log_prob.mean(axis=-1), weights=weights)
        np.testing.assert_allclose(found.negative_log_likelihood, nll, rtol=1e-10)


def test_data_without_a_known_target_are_refused():
    la = fitted(bnnlaplace.categorical(ignore_index=9), LABELS)
    unknown = np.where((WEIGHTS > 0)[:, None], 9, LABELS)
    with pytest.raises(ValueError, match="at least one known target; got ignore_index, or a weight of 0, everywhere"):
        la.optimize_prior_precision("gridsearch", validation=(X, unknown, WEIGHTS))
