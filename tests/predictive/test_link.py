"""E[y] of Gaussian outputs, and the predictions that use it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from scipy import special

import bnnlaplace
from bnnlaplace.core.tree import ravel
from bnnlaplace.predictive import link

RNG = np.random.default_rng(0)
MEAN = RNG.normal(size=(5, 4))
FACTOR = RNG.normal(size=(5, 4, 4)) / 2
COVARIANCE = FACTOR @ FACTOR.transpose(0, 2, 1)


# Several of these tests are about the formula, wherever it is good.
OUTSIDE = "ignore:the Laplace bridge is outside of its domain:UserWarning"


@pytest.mark.filterwarnings(OUTSIDE)
def test_bridge_is_the_formula_for_each_example(x64):
    for mean, covariance, found in zip(MEAN, COVARIANCE, link.bridge(MEAN, COVARIANCE), strict=True):
        projector = np.eye(4) - 1 / 4
        m, variance = projector @ mean, np.diagonal(projector @ covariance @ projector)
        alpha = (1 - 2 / 4 + np.exp(m) * np.exp(-m).sum() / 16) / variance
        np.testing.assert_allclose(found, alpha / alpha.sum(), rtol=1e-12)


@pytest.mark.filterwarnings(OUTSIDE)
@pytest.mark.parametrize("shift", [-3.0, 20.0])
def test_bridge_does_not_see_what_softmax_does_not_see(x64, shift):
    np.testing.assert_allclose(link.bridge(MEAN + shift, COVARIANCE), link.bridge(MEAN, COVARIANCE), rtol=1e-10)


def test_probit_is_the_formula(x64):
    """The comparison with samples below would not see a factor of two in the variance."""
    variance = np.diagonal(COVARIANCE, axis1=1, axis2=2)
    exponentials = np.exp(MEAN / np.sqrt(1 + np.pi / 8 * variance))
    expected = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(link.probit(bnnlaplace.categorical(), MEAN, variance), expected, rtol=1e-12)


@pytest.mark.filterwarnings(OUTSIDE)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_probit_is_nearer_to_samples_than_the_bridge(x64, seed):
    likelihood = bnnlaplace.categorical()
    noise = np.einsum("bcd,sbd->sbc", FACTOR, np.random.default_rng(seed).normal(size=(4000, 5, 4)))
    expected = link.monte_carlo(likelihood, MEAN, noise)
    variance = np.diagonal(COVARIANCE, axis1=1, axis2=2)
    error = {
        "probit": jnp.abs(link.probit(likelihood, MEAN, variance) - expected).sum(axis=1).mean() / 2,
        "bridge": jnp.abs(link.bridge(MEAN, COVARIANCE) - expected).sum(axis=1).mean() / 2,
    }
    assert error["probit"] < 0.1 and error["probit"] < error["bridge"] < 0.4


@pytest.mark.filterwarnings(OUTSIDE)
def test_bridge_of_two_classes_and_of_certainty():
    probs = link.bridge(jnp.array([[2.0, -2.0], [300.0, -300.0]]), jnp.tile(jnp.eye(2), (2, 1, 1)))
    np.testing.assert_allclose(probs[0], jax.nn.softmax(jnp.array([4.0, -4.0]) / 2), rtol=1e-5)
    np.testing.assert_allclose(probs[1], [1, 0], atol=1e-6)
    assert np.isfinite(link.bridge(jnp.zeros((1, 3)), jnp.zeros((1, 3, 3)))).all()


def gaussians(rng, count):
    """Random means and covariances of logits: correlated or not, of equal or unequal variance, small and large."""
    for _ in range(count):
        size = int(rng.choice([2, 3, 5, 10, 30]))
        mean = 10 ** rng.uniform(-1, 0.9) * rng.normal(size=size)
        rank = int(rng.choice([3, size]))
        factor = rng.normal(size=(size, rank)) / np.sqrt(rank)
        shapes = np.eye(size), np.diag(np.exp(0.7 * rng.normal(size=size))), factor @ factor.T + 0.05 * np.eye(size)
        yield mean, 10 ** rng.uniform(-2, 1.3) * shapes[rng.integers(3)]


@pytest.mark.parametrize("seed", usual([1], [1, 2, 3]))
def test_bridge_warns_where_it_is_off_and_nowhere_else(x64, seed):
    """The mean of softmax(f) by 4,000 antithetic draws, whose error is below 0.01 in total variation."""
    rng = np.random.default_rng(seed)
    normal = rng.normal(size=(2000, 30))
    warned_errors, silent_errors = [], []
    for mean, covariance in gaussians(rng, 120):
        draws = normal[:, : len(mean)] @ np.linalg.cholesky(covariance).T
        expected = np.mean([special.softmax(mean + sign * draws, axis=1).mean(axis=0) for sign in (1, -1)], axis=0)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = link.bridge(mean[None], covariance[None])[0]
        (warned_errors if caught else silent_errors).append(np.abs(found - expected).sum() / 2)
    assert max(silent_errors) < 0.13 and min(warned_errors) > 0.02
    assert len(silent_errors) > 20 and len(warned_errors) > 20


def test_the_warning_of_the_bridge_counts_and_advises(x64):
    alpha = np.array([10.0, 5.0, 5.0, 5.0])  # logits of this Dirichlet distribution have means log alpha
    mean = np.stack([[4.0, 0.0, 0.0, 0.0], np.log(alpha)])
    covariance = np.stack([np.diag([0.5, 16.0, 16.0, 16.0]), np.diag(1 / alpha)])
    with pytest.warns(
        UserWarning, match=r"outside of its domain for 1 of 2 predictions: .* off by about 0\.[3-9].*'mc'"
    ):
        probs = link.bridge(mean, covariance)
    np.testing.assert_allclose(link.bridge(mean[1:], covariance[1:])[0], alpha / alpha.sum(), rtol=1e-2)
    np.testing.assert_allclose(jax.jit(link.bridge)(mean, covariance), probs, rtol=1e-12)  # traced: no warning


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_monte_carlo_is_the_mean_over_samples(x64, seed):
    likelihood = bnnlaplace.bernoulli()
    noise = np.random.default_rng(seed).normal(size=(4000, 5, 4)) * 0.3
    # The logistic function is close to linear for small variances: its mean is that of a second-order expansion.
    p = 1 / (1 + np.exp(-MEAN))
    curvature = p * (1 - p) * (1 - 2 * p)
    found = link.monte_carlo(likelihood, MEAN, noise)
    samples = 1 / (1 + np.exp(-(MEAN + noise)))
    sem = samples.std(axis=0, ddof=1) / np.sqrt(len(noise))
    assert (np.abs(found - (p + curvature * 0.3**2 / 2)) <= 4 * sem + 0.3**4 / 8).all()


def test_an_average_in_double_precision_keeps_what_single_precision_would_lose():
    """Probabilities of zero, whose labels have an infinite NLL."""
    mean = np.float32([[0.0, 200.0], [0.0, 0.0]])
    deviations = np.float32([[[0.0, 0.0], [1.0, 0.0]], [[0.0, 10.0], [-1.0, 0.0]]])
    probs = link.monte_carlo_double(bnnlaplace.categorical(), mean, deviations)
    np.testing.assert_array_equal(link.monte_carlo(bnnlaplace.categorical(), mean, deviations)[0], [0, 1])
    np.testing.assert_allclose(np.log(probs[0, 0]), np.logaddexp(-200, -210) - np.log(2), rtol=1e-12)
    np.testing.assert_allclose(probs[1], [0.5, 0.5], rtol=1e-12)


@pytest.mark.parametrize("link_approx", ["probit", "mc"])
@pytest.mark.parametrize("likelihood", ["classification", "binary"])
def test_the_validation_nll_of_a_label_that_is_far_off_is_finite(likelihood, link_approx):
    """With logits of some hundreds its probability is zero in single precision."""
    outputs = 2 if likelihood == "classification" else 1
    weights = np.float32([[1.0, -0.5], [0.5, 1.0]])[:, :outputs]
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, weights)
    x = np.float32(RNG.choice([-1, 1], size=(20, 2)))
    y = RNG.integers(0, 2, size=20) if outputs == 2 else RNG.integers(0, 2, size=(20, 1))
    la = bnnlaplace.Laplace(network, likelihood, hessian_structure="full", prior_precision=1e4).fit((x, y))
    options = {"link_approx": link_approx, "key": jax.random.key(0)}
    curve = la.validation_curve(200 * x, y, [1e4, 1e5], **options)
    nll = curve.negative_log_likelihood
    assert np.isfinite(nll).all() and (nll > 30).all()


@pytest.fixture
def classifier(x64):
    x, y = RNG.normal(size=(30, 2)), RNG.integers(0, 3, size=30)
    network = bnnlaplace.Network.from_function(lambda w, x: jnp.tanh(x) @ w, RNG.normal(size=(2, 3)))
    return bnnlaplace.Laplace(network, hessian_structure="full").fit((x, y)), x


@pytest.mark.filterwarnings(OUTSIDE)
def test_bridge_is_that_of_the_functional_variance(classifier):
    la, x = classifier
    expected = link.bridge(la.network(la.network.params, x), la.functional_variance(x))
    np.testing.assert_allclose(la.predictive(x, link_approx="bridge"), expected, rtol=1e-12)


def test_weight_samples_are_averaged_as_probabilities(classifier):
    la, x = classifier
    key = jax.random.key(3)
    found = la.predictive(x, "nn", key=key, num_samples=7, microbatch=8)
    expected = np.mean([jax.nn.softmax(la.network(w, x)) for w in la.sample(key, 7)], axis=0)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.parametrize("seed", usual([1], [1, 2, 3]))
def test_regression_variance_by_samples_and_with_noise(x64, seed):
    x, y = RNG.normal(size=(30, 2)), RNG.normal(size=(30, 2))
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, RNG.normal(size=(2, 2)))
    sigma = np.array([0.5, 2.0])
    la = bnnlaplace.Laplace(network, "regression", hessian_structure="full", sigma_noise=sigma).fit((x, y))
    mean, variance = la.predictive(x)
    noisy = la.predictive(x, with_noise=True)
    np.testing.assert_allclose(noisy[1], variance + sigma**2, rtol=1e-12)
    # Linear in the weights, so that the network is its own linearisation.
    count = 500
    by_samples = la.predictive(x, "nn", key=jax.random.key(seed), num_samples=count)
    samples = np.asarray(x @ la.sample(jax.random.key(seed), count))
    np.testing.assert_allclose(by_samples[0], samples.mean(axis=0), rtol=1e-9)
    np.testing.assert_allclose(by_samples[1], samples.var(axis=0, ddof=1), rtol=1e-9)
    assert (np.abs(by_samples[0] - mean) <= 5 * np.sqrt(variance / count)).all()
    assert (np.abs(by_samples[1] / variance - 1) <= 5 * np.sqrt(2 / count)).all()
    assert ravel(la.network.params).shape == (4,)


def test_bridge_is_for_classes(x64):
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, np.ones((2, 1)))
    la = bnnlaplace.Laplace(network, "binary", hessian_structure="full").fit((np.eye(2), np.ones((2, 1))))
    with pytest.raises(ValueError, match="link_approx='bridge'.* asked of 'classification'; got 'binary'"):
        la.predictive(np.eye(2), link_approx="bridge")
