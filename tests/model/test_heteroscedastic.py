"""A mean and a log variance for each target: curvature, evidence and predictions of a linear network, in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from scipy import stats

import bnnlaplace

PRECISION, STRUCTURES = 0.8, ["full", "diag", "kron", "lanczos"]
OPTIONS = {"key": jax.random.key(0), "num_probes": 8, "max_vectors": 64, "microbatch": 5}
# The weights are random, so they are not at a mode.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("x64_module")]
RNG = np.random.default_rng(0)
INPUTS, TARGETS, WEIGHTS = RNG.normal(size=(12, 3)), RNG.normal(size=(12, 2)), 0.3 * RNG.normal(size=(3, 4))
OUTPUTS = INPUTS @ WEIGHTS
MEANS, LOG_VARIANCES = OUTPUTS[:, :2], OUTPUTS[:, 2:]
CURVATURES = np.concatenate([np.exp(-LOG_VARIANCES), np.full((12, 2), 0.5)], axis=1)  # the Fisher information
LOG_LIKELIHOOD = stats.norm.logpdf(TARGETS, MEANS, np.exp(LOG_VARIANCES / 2)).sum()


def laplace(structure, likelihood=None):
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, WEIGHTS)
    options = {"hessian_structure": structure, "prior_precision": PRECISION}
    return bnnlaplace.Laplace(network, likelihood or bnnlaplace.heteroscedastic(), **options)


def matrix(structure):
    """G, or what a structure keeps of it."""
    if structure == "kron":
        return np.kron(INPUTS.T @ INPUTS, np.diag(CURVATURES.sum(axis=0))) / 12
    exact = sum(np.kron(np.outer(x, x), np.diag(row)) for x, row in zip(INPUTS, CURVATURES, strict=True))
    return np.diag(np.diag(exact)) if structure == "diag" else exact


def moments(structure, x):
    """Mean, its variance and the expected variance of the noise."""
    jacobian = np.einsum("ni,cd->ncid", x, np.eye(4)).reshape(len(x), 4, 12)
    covariance = np.linalg.inv(matrix(structure) + PRECISION * np.eye(12))
    outputs, variances = x @ WEIGHTS, np.einsum("ncp,pq,ncq->nc", jacobian, covariance, jacobian)
    return outputs[:, :2], variances[:, :2], np.exp(outputs[:, 2:] + variances[:, 2:] / 2)


@pytest.fixture(scope="module", params=usual(["full", "kron"], STRUCTURES))
def fitted(request):
    return request.param, laplace(request.param).fit((INPUTS, TARGETS), **OPTIONS)


def test_log_probabilities_and_the_fisher_information():
    likelihood = bnnlaplace.heteroscedastic()
    assert likelihood.log_prob(OUTPUTS, TARGETS).sum() == pytest.approx(LOG_LIKELIHOOD, rel=1e-12)
    y = RNG.normal(size=(100_000, 2)) * np.exp(LOG_VARIANCES[0] / 2) + MEANS[0]
    hessians = jax.vmap(jax.hessian(lambda f, y: -likelihood.log_prob(f, y)), in_axes=(None, 0))(OUTPUTS[0], y)
    error = np.std(hessians, axis=0) / len(y) ** 0.5
    columns = jax.vmap(likelihood.hessian_mv, in_axes=(None, 0), out_axes=1)(OUTPUTS[0], jnp.eye(4))
    assert np.all(np.abs(np.mean(hessians, axis=0) - columns) <= 4 * error + 1e-12)
    factor = jax.vmap(likelihood.factor_mv, in_axes=(None, 0), out_axes=1)(OUTPUTS[0], jnp.eye(4))
    np.testing.assert_allclose(factor @ factor.T, columns, atol=1e-12)
    np.testing.assert_allclose(columns, np.diag(CURVATURES[0]), atol=1e-12)


def test_the_evidence(fitted):
    structure, la = fitted
    determinant = np.linalg.slogdet(np.eye(12) + matrix(structure) / PRECISION)[1]
    expected = LOG_LIKELIHOOD - 0.5 * PRECISION * np.sum(WEIGHTS**2) - 0.5 * determinant
    assert la.log_marginal_likelihood().mean == pytest.approx(expected, rel=1e-9)


def test_predictions(fitted):
    structure, la = fitted
    x = np.random.default_rng(2).normal(size=(5, 3))
    mean, variance, of_noise = moments(structure, x)
    for found, expected in zip(la.predictive(x), (mean, variance, of_noise), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-8)
    np.testing.assert_allclose(la.predictive(x, with_noise=True)[1], variance + of_noise, rtol=1e-8)


def test_predictions_by_samples_of_the_weights():
    la, x = laplace("full").fit((INPUTS, TARGETS)), INPUTS[:2]
    found = la.predictive(x, "nn", key=jax.random.key(1), num_samples=2000)
    for got, expected, tolerance in zip(found, moments("full", x), (0.05, 0.1, 0.1), strict=True):
        np.testing.assert_allclose(got, expected, rtol=tolerance, atol=tolerance / 2)


def test_saved_and_at_a_temperature(fitted, tmp_path):
    structure, la = fitted
    cold = laplace(structure, bnnlaplace.tempered(bnnlaplace.heteroscedastic(), 0.5)).fit((INPUTS, TARGETS), **OPTIONS)
    for number, posterior in enumerate((la, cold)):
        posterior.save(tmp_path / str(number))
        loaded = bnnlaplace.Laplace.load(tmp_path / str(number), la.network)
        evidences = loaded.log_marginal_likelihood().mean, posterior.log_marginal_likelihood().mean
        assert evidences[0] == pytest.approx(evidences[1], rel=1e-12)
        for got, expected in zip(loaded.predictive(INPUTS), posterior.predictive(INPUTS), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-8)
    assert np.all(cold.predictive(INPUTS)[1] < la.predictive(INPUTS)[1])


def test_the_validation_nll():
    la = laplace("full").fit((INPUTS, TARGETS))
    curve = la.validation_curve(INPUTS, TARGETS, [1e6], key=jax.random.key(0), num_samples=64)
    assert curve.negative_log_likelihood[0] == pytest.approx(-LOG_LIKELIHOOD / TARGETS.size, rel=1e-2)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("targets", "columns", "message"),
    [
        (TARGETS[:, :1], 4, r"must have the shape \(12, 2\)"),
        (np.concatenate([TARGETS, TARGETS], axis=1), 4, r"must have the shape \(12, 2\)"),
        (np.full((12, 2), np.nan), 4, "must be finite"),
        (TARGETS, 3, "an even number of outputs; got 3"),
    ],
)
def test_targets_that_do_not_fit(targets, columns, message):
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, WEIGHTS[:, :columns])
    with pytest.raises(ValueError, match=message):
        bnnlaplace.Laplace(network, "heteroscedastic", hessian_structure="diag").fit((INPUTS, targets))


def test_its_noise_is_not_a_number_that_can_be_set():
    la = laplace("diag").fit((INPUTS, TARGETS))
    with pytest.raises(ValueError, match="must be asked of a regression"):
        la.with_sigma_noise(0.5)
    with pytest.raises(ValueError, match="regression"):
        la.optimize_prior_precision(optimize_sigma_noise=True)
