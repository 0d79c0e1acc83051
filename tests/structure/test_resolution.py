"""Curvature of known rank: the rounding of its null space is not counted, at any prior precision."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace import krylov, prior

DISTINCT, FEATURES, CLASSES, COPIES = 8, 30, 3, 100
RANK = DISTINCT * (CLASSES - 1)
PRECISIONS = (1.0, 1e-2, 1e-4)


class Deficient:
    """A linear classifier of a few distinct inputs, each of which comes many times."""

    def __init__(self, copies):
        rng = np.random.default_rng(3)
        inputs = rng.normal(size=(DISTINCT, FEATURES)).astype(np.float32)
        labels = rng.integers(0, CLASSES, DISTINCT)
        weights = (0.1 * rng.normal(size=(FEATURES, CLASSES))).astype(np.float32)
        self.x, self.y = np.tile(inputs, (copies, 1)), np.tile(labels, copies)
        self.network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.asarray(weights))
        logits = inputs.astype(np.float64) @ weights
        self.log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        probs = np.exp(self.log_probs)
        roots = [np.kron(a[:, None], np.diag(p**0.5) - np.outer(p, p**0.5)) for a, p in zip(inputs, probs, strict=True)]
        left, singular, _ = np.linalg.svd(copies**0.5 * np.concatenate(roots, axis=1))
        self.values, self.vectors = singular[:RANK] ** 2, left[:, :RANK]
        self.log_likelihood = copies * self.log_probs[np.arange(DISTINCT), labels].sum()
        self.squared_norm = float((weights.astype(np.float64) ** 2).sum())

    def evidence(self, delta):
        return self.log_likelihood - 0.5 * delta * self.squared_norm - 0.5 * np.log1p(self.values / delta).sum()

    def variance(self, delta, x):
        """Variances of the outputs, of which the prior alone knows all but RANK directions."""
        covariance = np.eye(FEATURES * CLASSES) / delta
        covariance += (self.vectors * (1 / (self.values + delta) - 1 / delta)) @ self.vectors.T
        jacobian = np.kron(x[:, None, :], np.eye(CLASSES)).reshape(len(x), FEATURES * CLASSES, CLASSES, order="C")
        jacobian = np.einsum("nf,cd->nfcd", x, np.eye(CLASSES)).reshape(len(x), -1, CLASSES)
        return np.einsum("npc,pq,nqc->nc", jacobian, covariance, jacobian)

    def fit(self, structure, **options):
        la = bnnlaplace.Laplace(self.network, hessian_structure=structure)
        return la.fit((self.x, self.y), key=jax.random.key(0), num_probes=24, **options)


@pytest.fixture(scope="module")
def deficient():
    return Deficient(COPIES)


@pytest.fixture(scope="module")
def fitted(deficient):
    """Both sides of 'lanczos': products for many outputs, the rows of B' J for few."""
    few = Deficient(2)
    posteriors = {name: (deficient, deficient.fit(name)) for name in ("lanczos", "full")}
    posteriors["lanczos, dual"] = few, few.fit("lanczos")
    assert type(posteriors["lanczos"][1].structure).__name__ == "KrylovStructure"
    assert type(posteriors["lanczos, dual"][1].structure).__name__ == "SpectralStructure"
    return posteriors


@pytest.mark.parametrize("name", ["lanczos", "lanczos, dual", "full"])
def test_evidence_of_known_rank(fitted, name):
    problem, la = fitted[name]
    for delta in PRECISIONS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            found = la.log_marginal_likelihood(delta)
        assert abs(found.mean - problem.evidence(delta)) < 4 * found.sem + 5e-3
        effective = (problem.values / (problem.values + delta)).sum()
        assert la.with_prior_precision(delta).effective_parameters() == pytest.approx(effective, rel=1e-3)


def test_variances_of_known_rank(fitted):
    problem, la = fitted["full"]
    x = np.random.default_rng(5).normal(size=(4, FEATURES))
    for delta in PRECISIONS:
        found = np.diagonal(la.with_prior_precision(delta).functional_variance(x.astype(np.float32)), axis1=1, axis2=2)
        np.testing.assert_allclose(found, problem.variance(delta, x), rtol=1e-4)


def test_a_kronecker_factor_of_known_rank():
    """The inputs of the layer span a few directions, so the block has that rank, too."""
    problem = Deficient(COPIES)
    la = problem.fit("kron")
    x, probs = problem.x.astype(np.float64), np.tile(np.exp(problem.log_probs), (COPIES, 1))
    inputs = x.T @ x / len(x)
    outputs = np.diag(probs.sum(axis=0)) - probs.T @ probs
    values = np.kron(np.linalg.svd(inputs)[1][:DISTINCT], np.linalg.svd(outputs)[1][: CLASSES - 1])
    for delta in PRECISIONS:
        found = la.structure.log_determinant(delta)[0]
        assert found == pytest.approx(np.log1p(values / delta).sum(), abs=5e-3)


def test_the_reported_error_holds_what_rounding_hides(fitted):
    """What was set to zero is reported, and it does not keep the recurrence from converging."""
    _, la = fitted["lanczos"]
    errors = [la.with_prior_precision(delta).krylov_error() for delta in PRECISIONS]
    for error in errors:
        assert error.log_determinant == error.truncation + error.rounding
        assert la.structure.has_converged(error)
    assert errors[0].rounding < 1 < errors[-1].rounding


@pytest.mark.parametrize("name", ["lanczos", "full"])
def test_a_precision_below_the_rounding_says_so(fitted, name):
    la = fitted[name][1]
    below, above = 0.5 * la.structure.resolution(), 2 * la.structure.resolution()
    assert below > 0
    for ask in (
        lambda la: la.log_marginal_likelihood(),
        lambda la: la.sample(jax.random.key(0), 2),
        lambda la: la.functional_variance(jnp.ones((1, FEATURES))),
        lambda la: la.evidence_curve([float(la.prior_precision), 10.0]),
    ):
        with pytest.warns(UserWarning, match="the rounding of the curvature"):
            ask(la.with_prior_precision(below))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la.with_prior_precision(above).log_marginal_likelihood()


# At a thousand times the weights of the fit the posterior predicts anything but the data, which is not the matter here.
@pytest.mark.filterwarnings("ignore::bnnlaplace.SaturatedPosteriorWarning")
def test_searches_end_at_the_rounding(fitted):
    """The weights are made small, so that the best precision is as large as a search allows, and then as small."""
    la = fitted["lanczos"][1]
    resolution = la.structure.resolution()
    assert prior.range_above(resolution)[0] == resolution > prior.SEARCH_RANGE[0]
    assert prior.range_above(0.0) == prior.SEARCH_RANGE
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        assert la.evidence_curve().prior_precision.min() >= resolution
    large = la.fitted._replace(network=la.network.with_params(jax.tree.map(lambda w: 1e3 * w, la.network.params)))
    with pytest.warns(UserWarning, match="rounding hides the curvature"):
        chosen = bnnlaplace.Laplace._of(large, la.settings).optimize_prior_precision()
    assert float(chosen.prior_precision) == pytest.approx(resolution, rel=1e-2)


def test_ritz_values_of_a_matrix_of_known_rank():
    """Products in float32 with a matrix of rank 5 give Ritz values of rounding, of both signs."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(5, 60))
    matrix = jnp.asarray(1e4 * root.T @ root, jnp.float32)
    probes = krylov.normal_probes(jax.random.key(0), jnp.ones(60), 10)
    *_, decomposition = krylov.block_lanczos(lambda v: v @ matrix, probes, max_vectors=60)
    found, raw = krylov.ritz(decomposition), krylov.ritz(decomposition, positive=False)
    assert np.count_nonzero(found.values) == 5
    assert np.count_nonzero(raw.values) > 5
    np.testing.assert_array_equal(found.hidden > 0, (found.values == 0) & (raw.values != 0))


def test_variances_where_the_data_determine_almost_everything():
    """Few outputs: what rounding leaves of the prior's part along the eigenvectors has the prior's large variance."""
    rng = np.random.default_rng(4)
    x, sigma, delta = rng.normal(size=(20, 40)).astype(np.float32), 1e-3, 1e-3
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((40, 1)))
    la = bnnlaplace.Laplace(network, "regression", sigma_noise=sigma, prior_precision=delta)
    la = la.fit((x, np.zeros((20, 1), np.float32)), key=jax.random.key(0))
    assert la.structure.resolution() < delta
    exact = x.astype(np.float64)
    covariance = np.linalg.inv(exact.T @ exact / sigma**2 + delta * np.eye(40))
    expected = np.einsum("np,pq,nq->n", exact, covariance, exact)
    np.testing.assert_allclose(la.functional_variance(x)[:, 0, 0], expected, rtol=0.01)
    samples = np.asarray(la.sample(jax.random.key(1), 2000))[..., 0] @ exact.T
    np.testing.assert_allclose(samples.var(axis=0).mean(), expected.mean(), rtol=0.05)


@pytest.mark.parametrize("structure", usual(["lanczos"], ["kron", "lanczos"]))
def test_a_regression_that_hides_nothing_gets_no_warning(structure):
    """All eigenvalues are far above the rounding, which is above the prior precision."""
    rng = np.random.default_rng(6)
    x = rng.normal(size=(2000, 3)).astype(np.float32)
    y = (x @ np.ones((3, 1)) + 0.01 * rng.normal(size=(2000, 1))).astype(np.float32)
    weights = jnp.asarray(np.linalg.lstsq(x, y, rcond=None)[0], jnp.float32)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, weights)
    la = bnnlaplace.Laplace(network, "regression", hessian_structure=structure, sigma_noise=0.001)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", bnnlaplace.NotAModeWarning)
        la = la.fit((x, y), key=jax.random.key(0))
        la.log_marginal_likelihood()
        la.predictive(x[:5])
