"""More classes than samples: sites are kept as samples of the outputs, and no matrix over classes is formed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from scipy.special import log_softmax, softmax

import bnnlaplace
from bnnlaplace import Laplace, Variational
from bnnlaplace.model.likelihoods import closed_forms, sites
from bnnlaplace.variational import draws
from bnnlaplace.variational import sites as kept

CLASSES, EXAMPLES, SAMPLES = 80, 30, 32


def outputs(params, x):
    return jnp.tanh(x @ params["w"]) @ params["head"]


@pytest.fixture(scope="module")
def problem(x64_module):
    rng = np.random.default_rng(3)
    params = {"w": jnp.asarray(rng.normal(size=(3, 3))), "head": jnp.asarray(rng.normal(size=(3, CLASSES)))}
    x = rng.normal(size=(EXAMPLES, 3))
    probs = softmax(np.asarray(outputs(params, x)), axis=-1)
    labels = (probs.cumsum(axis=1) < rng.random((EXAMPLES, 1))).sum(axis=1)
    return bnnlaplace.Network.from_function(outputs, params), (x, labels)


MODELS = {
    "diag": {},
    "kron": {},
    "lanczos": {},
    "last layer": {"hessian_structure": "kron", "subset_of_weights": "last_layer"},
}


# The others read the same samples through other products and closed forms.
@pytest.mark.parametrize("model", usual(["diag"], MODELS))
def test_the_bound_is_that_of_dense_sites_and_no_matrix_over_classes_is_formed(problem, model, monkeypatch):
    network, data = problem
    la = Laplace(network, **{"hessian_structure": model, **MODELS[model]})

    def fitted(seed, num_samples, **options):
        chosen = Variational(num_samples=num_samples, tolerance=0.3, max_iterations=40)
        return la.fit(data, key=jax.random.key(seed), approximation=chosen, max_vectors=150, **options)

    with monkeypatch.context() as patched:
        patched.setattr(draws, "MOST_OUTPUTS", CLASSES)
        exact = fitted(0, 512, num_probes=64).log_marginal_likelihood()
    forbidden = lambda *arguments, **options: pytest.fail("a matrix over classes")  # noqa: E731
    monkeypatch.setattr(draws, "functional_variances", forbidden)
    monkeypatch.setattr(kept, "site_curvature", forbidden)
    for seed in (1, 2, 3):
        bound = fitted(seed, SAMPLES, num_probes=SAMPLES // 2).log_marginal_likelihood()
        assert abs(bound.mean - exact.mean) < 4 * np.hypot(bound.sem, exact.sem)


def test_products_and_closed_forms_of_a_site_are_those_of_its_average(x64_module):
    """In all three ways in which curvature is asked for, against the average of Lambda as a matrix."""
    rng = np.random.default_rng(0)
    likelihood = bnnlaplace.tempered(bnnlaplace.categorical(), 0.5)
    samples, weights = jnp.asarray(rng.normal(size=(4, 3, 6))), jnp.asarray(rng.uniform(size=4))
    probs = softmax(np.asarray(samples), axis=-1)
    of_samples = 2 * (np.eye(6) * probs[..., None] - probs[..., None] * probs[..., None, :])
    matrices = of_samples.mean(axis=1)
    np.testing.assert_allclose(sites.dense(likelihood, jnp.moveaxis(samples, 1, 0)), matrices, atol=1e-12)
    v = jnp.asarray(rng.normal(size=(4, 6)))
    for found, points in (
        (sites.by_samples(likelihood), samples),
        (sites.by_factors(likelihood), jnp.asarray(sites.roots(matrices))),
    ):
        np.testing.assert_allclose(found.hessian_mv(points, v), np.einsum("ncd,nd->nc", matrices, v), atol=1e-12)
        diagonal = closed_forms.curvature_diagonal(found, points)
        np.testing.assert_allclose(diagonal, np.einsum("ncc->nc", matrices), atol=1e-12)
        total = closed_forms.curvature_sum(found, points, weights)
        np.testing.assert_allclose(total, np.einsum("n,ncd->cd", weights, matrices), atol=1e-12)
        rows = [jnp.broadcast_to(row, (4, 6)) for row in jnp.eye(6)]
        factor = np.stack([found.factor_mv(points, row) for row in rows], axis=2)
        transposed = np.stack([found.factor_transpose_mv(points, row) for row in rows], axis=1)
        np.testing.assert_allclose(factor, transposed, atol=1e-12)


def test_the_factor_of_samples_has_the_right_mean(x64_module):
    """Columns are those of single samples, which all orders of the samples pick equally often."""
    likelihood, samples = bnnlaplace.categorical(), np.random.default_rng(0).normal(size=(3, 6))
    found = sites.by_samples(likelihood)
    squares = []
    for shift in range(3):
        points = jnp.asarray(np.roll(samples, shift, axis=0))
        factor = np.stack([found.factor_mv(points, row) for row in jnp.eye(6)], axis=-1)
        squares.append(factor @ factor.T)
    probs = softmax(samples, axis=-1)
    expected = (np.eye(6) * probs[..., None] - probs[..., None] * probs[..., None, :]).mean(axis=0)
    np.testing.assert_allclose(np.mean(squares, axis=0), expected, atol=1e-12)


def test_no_sample_of_a_site_stays_for_ever():
    """Each step of a half replaces the half that the step before has kept."""
    one, other = (kept.Sites([np.full((1, 4, 2), value)], True) for value in (0.0, 1.0))
    assert one.towards(other, 0.5).batches[0].mean() == 0.5
    assert one.towards(other, 0.5).towards(other, 0.5).batches[0].mean() == 1


@pytest.mark.filterwarnings("ignore:the mean of the variational posterior is fitted to its 64 samples")
@pytest.mark.parametrize("structure", ["full", "lanczos"])
def test_exact_structures_have_matrices_as_sites_whatever_the_number_of_classes(x64, structure):
    """The factor of sites kept as samples is that of another curvature: the bound was 20 nats above the evidence."""
    rng = np.random.default_rng(1)
    weights, x, precision = jnp.asarray(rng.normal(size=(4, CLASSES))), 2 * rng.normal(size=(6, 4)), 0.3
    labels = np.asarray(x @ weights).argmax(-1)
    la = Laplace(
        bnnlaplace.Network.from_function(lambda w, inputs: inputs @ w, weights),
        hessian_structure=structure,
        prior_precision=precision,
    )
    options = Variational(num_samples=64)  # fewer than there are classes
    fitted = la.fit((x, labels), key=jax.random.key(0), approximation=options, max_vectors=6 * CLASSES)
    mean = np.asarray(fitted.network.params).ravel()
    covariance = np.stack([fitted.structure.inverse_product(unit, precision) for unit in np.eye(mean.size)])
    samples = mean + rng.normal(size=(4000, mean.size)) @ np.linalg.cholesky(covariance).T
    log_p = log_softmax(np.einsum("nd,sdc->snc", x, samples.reshape(-1, *weights.shape)), axis=-1)
    expected = np.take_along_axis(log_p, labels[None, :, None], -1)[..., 0].sum(1)
    complexity = precision * (np.trace(covariance) + mean @ mean) - mean.size
    divergence = 0.5 * (complexity - np.linalg.slogdet(precision * covariance)[1])
    bound = fitted.log_marginal_likelihood()
    sem = np.hypot(bound.sem, expected.std() / np.sqrt(len(expected)))
    assert abs(bound.mean - (expected.mean() - divergence)) < 4 * sem
