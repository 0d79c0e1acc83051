"""Every likelihood has a variational posterior: its bound against the average of log p under q by plain sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from scipy.special import gammaln, log_expit, log_softmax

import bnnlaplace
from bnnlaplace import Laplace, Likelihood, Variational

KEY, PRECISION = jax.random.key(2), 2.0
CHOSEN = Variational(num_samples=256, tolerance=0.01, max_iterations=40)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3))


def poisson():
    """Counts with the rate exp(f)."""

    def log_prob(f, y):
        return jnp.sum(y * f - jnp.exp(f) - jax.scipy.special.gammaln(y + 1), axis=-1)

    return Likelihood(
        "poisson", "array", log_prob, factor_mv=lambda f, u: jnp.exp(f / 2) * u, mean=lambda f: jnp.exp(f)
    )


def of_labels(f, y, weights=1.0):
    return (weights * np.take_along_axis(log_softmax(f, axis=-1), y[..., None], axis=-1)[..., 0]).reshape(len(f), -1)


def two_moments(f, y):
    mean, log_variance = f[..., 0], f[..., 1]
    return -0.5 * (log_variance + (y[..., 0] - mean) ** 2 * np.exp(-log_variance) + np.log(2 * np.pi))


LABELS, POSITIONS = RNG.integers(0, 3, size=12), RNG.integers(0, 3, size=(12, 2))
SOFT, COUNTS = RNG.dirichlet(np.ones(3), size=12), RNG.poisson(2.0, size=(12, 2))
IGNORED, CLASS_WEIGHTS = np.where(np.arange(12) % 3 == 0, -1, LABELS), np.array([1.0, 2.0, 0.5])

# Likelihood, shape of the outputs of an example, targets, and log p of targets in NumPy for outputs (N, ...).
CASES = {
    "soft labels": (bnnlaplace.categorical(), (3,), SOFT, lambda f: (SOFT * log_softmax(f, axis=-1)).sum(-1)),
    "positions": (bnnlaplace.categorical(), (2, 3), POSITIONS, lambda f: of_labels(f, POSITIONS).sum(-1)),
    "binary": (
        bnnlaplace.bernoulli(),
        (1,),
        LABELS[:, None] % 2,
        lambda f: log_expit((2 * (LABELS % 2) - 1) * f[:, 0]),
    ),
    "heteroscedastic": (
        bnnlaplace.heteroscedastic(),
        (2,),
        X[:, :1],
        lambda f: two_moments(f, X[:, :1]),
    ),
    "poisson": (
        poisson(),
        (2,),
        COUNTS.astype(float),
        lambda f: (COUNTS * f - np.exp(f) - gammaln(COUNTS + 1)).sum(-1),
    ),
    "ignored": (
        bnnlaplace.categorical(ignore_index=-1),
        (3,),
        IGNORED,
        lambda f: np.where(IGNORED < 0, 0, of_labels(f, np.maximum(IGNORED, 0))[:, 0]),
    ),
    "class weights": (
        bnnlaplace.categorical(class_weights=CLASS_WEIGHTS),
        (3,),
        LABELS,
        lambda f: of_labels(f, LABELS, CLASS_WEIGHTS[LABELS])[:, 0],
    ),
    "tempered": (
        bnnlaplace.tempered(bnnlaplace.categorical(), 0.5),
        (3,),
        LABELS,
        lambda f: 2 * of_labels(f, LABELS)[:, 0],
    ),
}


# A likelihood with closed forms at several positions, and one without them.
@pytest.fixture(scope="module", params=usual(["positions", "poisson"], CASES))
def case(request, x64_module):
    """A linear model, whose q is known to be that of its outputs, with the posterior that was fitted to it."""
    likelihood, shape, targets, log_prob = CASES[request.param]
    width = int(np.prod(shape))

    def outputs(w, x):
        return (x @ w).reshape(-1, *shape)

    network = bnnlaplace.Network.from_function(outputs, jnp.asarray(0.1 * RNG.normal(size=(3, width))))
    la = Laplace(network, likelihood, hessian_structure="full", prior_precision=PRECISION)
    return la.fit((X, targets), key=KEY, approximation=CHOSEN), targets, log_prob, shape


def bound_by_sampling(mean, covariance, log_prob, shape, count=4000):
    """E_q log p - KL(q || prior) by antithetic samples of the weights, and its standard error."""
    noise = np.random.default_rng(1).multivariate_normal(np.zeros(len(mean)), covariance, size=count)
    pairs = [
        np.mean([log_prob((X @ w.reshape(3, -1)).reshape(-1, *shape)).sum() for w in (mean + e, mean - e)])
        for e in noise
    ]
    trace = PRECISION * (np.trace(covariance) + mean @ mean) - len(mean)
    divergence = 0.5 * (trace - np.linalg.slogdet(covariance)[1] - len(mean) * np.log(PRECISION))
    return np.mean(pairs) - divergence, np.std(pairs) / np.sqrt(count)


def test_the_bound_is_that_of_the_posterior_by_sampling_and_no_other_gaussian_has_a_larger_one(case):
    la, _, log_prob, shape = case
    mean = np.asarray(la.network.params).ravel()
    covariance = np.linalg.inv(la.structure.matrix + PRECISION * np.eye(len(mean)))
    exact, sem = bound_by_sampling(mean, covariance, log_prob, shape)
    bound = la.log_marginal_likelihood()
    assert abs(bound.mean - exact) < 4 * np.hypot(sem, bound.sem)
    # The Fisher information is not the Hessian: its average is not the precision with the largest bound.
    factors = () if la.likelihood.name == "heteroscedastic" else (0.7, 1.4)
    for factor in factors:  # the same noise, so that the difference is almost free of it
        assert bound_by_sampling(mean, factor * covariance, log_prob, shape)[0] < exact
    for shift in (0.3, -0.3):
        assert bound_by_sampling(mean + shift * np.sqrt(np.diag(covariance)), covariance, log_prob, shape)[0] < exact


def test_the_predictive_and_the_number_of_targets_are_those_of_a_laplace_approximation(case):
    la, targets, _, shape = case
    laplace = Laplace(la.network.unlinearised(), la.likelihood, hessian_structure="full").fit((X, targets))
    np.testing.assert_allclose(la.fitted.log_likelihood.num_targets, laplace.fitted.log_likelihood.num_targets)
    if la.likelihood.name in ("classification", "binary"):
        assert la.predictive(X[:2]).shape == (2, *shape)


@pytest.mark.parametrize("structure", usual(["kron", "lanczos"], ["full", "diag", "kron", "lanczos"]))
def test_a_regression_is_fitted_exactly(x64_module, structure):
    """Its posterior is Gaussian: the variational one is Laplace's at the mode of the linearised network."""
    network = bnnlaplace.Network.from_function(lambda w, x: jnp.tanh(x @ w), jnp.asarray(RNG.normal(size=(3, 1))))
    la = Laplace(network, "regression", hessian_structure=structure, sigma_noise=0.5)
    exact = la.fit((X, X[:, :1]), mean="linear")
    found = la.fit((X, X[:, :1]), approximation="variational")
    np.testing.assert_allclose(found.network.params, exact.network.params, atol=1e-10)
    np.testing.assert_allclose(found.log_marginal_likelihood(), exact.log_marginal_likelihood(), atol=1e-10)
    np.testing.assert_allclose(found.functional_variance(X), exact.functional_variance(X), atol=1e-10)
