"""The bound against the evidence by importance sampling, and its gradients by autodiff of the same average."""

import fixed_point
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import problems
import pytest
from cases import exhaustive, usual
from scipy.special import expit, log_softmax, logsumexp

import bnnlaplace
from bnnlaplace import Laplace, Variational
from bnnlaplace.variational import prior_step

KEY = jax.random.key(1)


# --- models of two and three weights --------------------------------------------------------------------------------


def two_weights(w, x):
    return x @ w[:, None]


def three_weights(w, x):
    """Logits of two classes, and zero for the third one."""
    return jnp.stack([x @ w[:2], x @ w[1:], jnp.zeros(len(x))], axis=-1)


def log_likelihoods(name, w, x, y):
    """log p of each example (S, N) at rows of weights (S, 2) or (S, 3)."""
    if name == "binary":
        return np.log(expit((2 * y - 1) * (w @ x.T)))
    logits = np.stack([w[:, :2] @ x.T, w[:, 1:] @ x.T, np.zeros((len(w), len(x)))], axis=-1)
    return np.take_along_axis(log_softmax(logits, axis=-1), y[None, :, None], axis=-1)[..., 0]


def log_evidence(name, mean, covariance, x, y, precision, seed, count=40_000):
    """By importance sampling from t-distributions of five degrees of freedom around q, with its standard error."""
    rng, width = np.random.default_rng(seed), len(mean)
    root = np.linalg.cholesky(1.5 * covariance)
    noise = rng.normal(size=(count, width)) / np.sqrt(rng.chisquare(5, size=(count, 1)) / 5)
    from scipy.stats import multivariate_normal, multivariate_t

    w = mean + noise @ root.T
    log_joint = log_likelihoods(name, w, x, y).sum(axis=1)
    log_joint += multivariate_normal(np.zeros(width), np.eye(width) / precision).logpdf(w)
    log_ratios = log_joint - multivariate_t(mean, 1.5 * covariance, df=5).logpdf(w)
    value = logsumexp(log_ratios) - np.log(count)
    return value, np.exp(log_ratios - value).std() / np.sqrt(count)


CASES = {  # likelihood, examples, prior precision, and whether the posterior is nearly Gaussian
    "binary, many": ("binary", 60, 1.0, True),
    "binary, few": ("binary", 3, 0.02, False),
    "three classes": ("classification", 60, 1.0, True),
    "three classes, few": ("classification", 4, 0.02, False),
}


@pytest.fixture(scope="module", params=usual(["binary, many", "three classes, few"], CASES))
def tiny(request, x64_module):
    """A posterior with full covariance, its data, and what the table says."""
    name, count, precision, is_gaussian = CASES[request.param]
    rng = np.random.default_rng(2)
    x, truth = rng.normal(size=(count, 2)), rng.normal(size=2 if name == "binary" else 3)
    network = bnnlaplace.Network.from_function(two_weights if name == "binary" else three_weights, jnp.asarray(truth))
    logits = np.asarray(network(network.params, x))
    if name == "binary":
        y = (rng.random(count) < expit(logits[:, 0])).astype(int)
        targets = y[:, None]
    else:
        targets = y = (np.exp(log_softmax(logits, axis=-1)).cumsum(axis=1) < rng.random((count, 1))).sum(axis=1)
    la = Laplace(network, name, hessian_structure="full", prior_precision=precision)
    la = la.fit((x, targets), key=KEY, approximation=Variational(num_samples=1024, tolerance=1e-4, max_iterations=60))
    covariance = np.linalg.inv(la.structure.matrix + precision * np.eye(len(truth)))
    return la, covariance, x, y, precision, name, is_gaussian


@pytest.mark.parametrize("seed", usual([1], [1, 2, 3]))
def test_the_bound_is_below_the_evidence_and_close_to_it_for_a_gaussian(tiny, seed):
    la, covariance, x, y, precision, name, is_gaussian = tiny
    mean, bound = np.asarray(la.network.params), la.log_marginal_likelihood()
    exact, sem = log_evidence(name, mean, covariance, x, y, precision, seed)
    assert sem < 0.02
    assert bound.mean < exact + 4 * np.hypot(sem, bound.sem)
    gap = exact - bound.mean
    if is_gaussian:
        assert gap < 0.1
    else:  # what the bound loses to a skewed posterior is more than the errors: the comparison can tell
        assert gap > 4 * np.hypot(sem, bound.sem)


def test_training_nll_never_exceeds_the_bound_of_an_example(tiny):
    la, covariance, x, y, _, name, _ = tiny
    samples = np.random.default_rng(4).multivariate_normal(np.asarray(la.network.params), covariance, size=20_000)
    nll = -(logsumexp(log_likelihoods(name, samples, x, y), axis=0) - np.log(len(samples))).mean()
    assert nll < -la.log_marginal_likelihood().mean / len(y)


# --- the bound by autodiff ------------------------------------------------------------------------------------------

EXACTLY = Variational(num_samples=64, tolerance=1e-8, max_iterations=80, max_newton_steps=30)


@pytest.fixture(scope="module")
def drawn(x64_module):
    return problems.drawn_labels(60)


def gradients(la, drawn):
    """The gradient of the bound in the mean, and in log delta of biases and of kernels, at the covariance of q."""
    precision = np.broadcast_to(np.asarray(la.prior.precision * la.prior.relative, float), (43,))
    covariance = covariance_of(la.structure, precision)
    jacobians = oracles.jacobian(drawn.network, drawn.network.params, drawn.inputs)
    offsets = np.asarray(drawn.network(drawn.network.params, drawn.inputs))
    offsets = offsets - jacobians @ problems.flat(drawn.network.params)
    roots = fixed_point.symmetric_roots(np.einsum("ncp,pq,ndq->ncd", jacobians, covariance, jacobians))
    # The fit averages over the first noise, and its bound over the second one.
    of_fit, of_bound = (
        np.einsum("ncd,snd->snc", roots, fixed_point.standard_noise(key, len(drawn.labels), 3, EXACTLY.num_samples))
        for key in jax.random.split(KEY)
    )
    groups = np.concatenate([np.full(leaf.size, leaf.ndim - 1) for leaf in jax.tree.leaves(drawn.network.params)])

    def bound(mean, log_factors, deviations=of_fit):
        log_probs = jax.nn.log_softmax(offsets + jacobians @ mean + deviations)
        of_labels = log_probs[:, np.arange(len(drawn.labels)), drawn.labels]
        delta = precision * jnp.exp(log_factors)[groups]
        second_moment = jnp.sum(delta * (mean**2 + np.diag(covariance)))
        divergence = 0.5 * (second_moment - 43 - jnp.log(delta).sum() - np.linalg.slogdet(covariance)[1])
        return of_labels.mean(axis=0).sum() - divergence

    at = problems.flat(la.network.params), np.zeros(2)
    np.testing.assert_allclose(la.log_marginal_likelihood().mean, bound(*at, of_bound), rtol=1e-8)
    return jax.grad(bound, argnums=(0, 1))(*at)


def covariance_of(structure, precision):
    """(sqrt(D) G sqrt(D) + P0)^-1 from products with the structure, which is in the weights times sqrt(D)."""
    overall = np.exp(np.log(precision).mean())
    root = np.sqrt(precision / overall)
    inner = np.array([structure.inverse_product(row, overall) for row in np.eye(len(precision))])
    return inner / root / root[:, None]


@pytest.mark.parametrize(
    ("structure", "groups"), [("diag", "scalar"), exhaustive("full", "layerwise"), exhaustive("full", "scalar")]
)
def test_the_gradient_is_zero_in_the_mean_and_at_the_best_prior_in_its_precisions(
    drawn, structure, groups, monkeypatch
):
    def fit(la):
        return la.fit(drawn.data, key=KEY, approximation=EXACTLY)

    precision = {"w": 0.3, "b": 0.3} if groups == "layerwise" else 0.3
    options = {"prior_precision": precision, "prior_groups": lambda path: path[0]}
    la = fit(Laplace(drawn.network, hessian_structure=structure, **options))
    in_mean, before = gradients(la, drawn)
    np.testing.assert_allclose(in_mean, 0, atol=1e-5)
    # By default it ends where further steps promise to gain less than a tenth of a nat.
    monkeypatch.setattr(prior_step, "SHARE_OF_TOLERANCE", 2e-4)
    la = la.optimize_prior_precision(prior_structure=groups, refit=fit, max_refits=40)
    in_mean, after = gradients(la, drawn)
    np.testing.assert_allclose(in_mean, 0, atol=1e-5)
    if groups == "scalar":
        before, after = before.sum(keepdims=True), after.sum(keepdims=True)
    assert np.abs(after).max() < 0.02 * np.abs(before).max()


@pytest.mark.parametrize("by_refits", [False, exhaustive(True)])
def test_the_best_prior_is_found_from_far_above_it_and_from_far_below(drawn, by_refits):
    """Far above, the bound is flat: a step there promises next to nothing."""
    options = {"num_samples": 64} if by_refits else {"num_samples": 64, "prior_structure": "scalar", "tolerance": 0.05}

    def fit(la):
        return la.fit(drawn.data, key=KEY, approximation=Variational(**options))

    found = [fit(Laplace(drawn.network, hessian_structure="diag", prior_precision=start)) for start in (1e-2, 1e4)]
    if by_refits:
        found = [la.optimize_prior_precision(refit=fit, max_refits=20) for la in found]
    low, high = (la.log_marginal_likelihood().mean for la in found)
    assert abs(low - high) < 0.2
    assert abs(np.log(found[0].prior_precision / found[1].prior_precision)) < (1 if by_refits else 0.2)
