"""The Gaussian of outputs at many inputs together, and draws of functions, for every structure."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import random_problem, usual

import bnnlaplace
from bnnlaplace.core import memory
from bnnlaplace.predictive import functional_posterior, joint
from bnnlaplace.structure import KrylovStructure

STRUCTURES = ["diag", "kron", "full", "spectral", "krylov"]
PRECISIONS = {"b1": 4.0, "b2": 12.0, "w1": 8.0, "w2": 2.0}
OPTIONS = {"key": jax.random.key(3), "num_probes": 16, "max_vectors": 32, "target_precision": 5.0}


@pytest.fixture(scope="module")
def problem():
    return random_problem(bnnlaplace.categorical(), np.random.default_rng(5).integers(0, 3, size=40), seed=5)


@pytest.fixture(scope="module")
def posteriors(problem):
    """By structure: a posterior in float32 under one prior precision for each layer."""

    def fit(name):
        structure = "lanczos" if name in ("spectral", "krylov") else name
        la = bnnlaplace.Laplace(
            problem.network, hessian_structure=structure, prior_precision=PRECISIONS, prior_groups=lambda path: path
        )
        return la.fit((problem.inputs, problem.targets), **(OPTIONS if name == "krylov" else {}))

    with pytest.warns(bnnlaplace.NotAModeWarning):
        return {name: fit(name) for name in STRUCTURES}


def flat_jacobian(problem, x):
    return oracles.two_layers_jacobian(problem.network.params, np.asarray(x, np.float64)).reshape(3 * len(x), -1)


def precisions():
    sizes = {"b1": 5, "b2": 3, "w1": 20, "w2": 15}
    return np.concatenate([np.full(sizes[name], PRECISIONS[name]) for name in sorted(sizes)])


def exact(problem, x):
    """J (G + P0)^-1 J' in float64."""
    rows = flat_jacobian(problem, x)
    return rows @ np.linalg.solve(problem.ggn + np.diag(precisions()), rows.T)


def matrix(posterior):
    return np.asarray(posterior.covariance, np.float64).reshape((posterior.mean.size,) * 2)


@pytest.mark.parametrize("name", ["full", "spectral"])
def test_all_inputs_at_once_against_matrices(name, posteriors, problem):
    x = problem.inputs[:7]
    found = posteriors[name].functional_posterior(x)
    assert found.is_joint and found.covariance.shape == (7, 3, 7, 3)
    np.testing.assert_allclose(matrix(found), exact(problem, x), rtol=2e-4, atol=2e-4)
    np.testing.assert_allclose(found.mean, problem.network(problem.network.params, x), rtol=1e-4, atol=1e-5)


def test_the_diagonal_structure_against_matrices(posteriors, problem):
    x = problem.inputs[:7]
    rows = flat_jacobian(problem, x)
    expected = rows / (np.diag(problem.ggn) + precisions()) @ rows.T
    np.testing.assert_allclose(matrix(posteriors["diag"].functional_posterior(x)), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("name", ["kron", "krylov"])
def test_approximations_are_near_the_matrices(name, posteriors, problem):
    """The whole covariance, of which the samples of a decomposition alone would be off by more than half."""
    x = problem.inputs[:7]
    expected = exact(problem, x)
    found = matrix(posteriors[name].functional_posterior(x))
    assert np.linalg.norm(found - expected) < 0.35 * np.linalg.norm(expected)
    assert np.linalg.eigvalsh(found)[0] > -1e-4


def test_a_decomposition_keeps_the_prior_outside_its_basis(lanczos, full, trained):
    """On a larger network, where the covariance of the samples is off by more than its size."""
    x = trained[1][200:212]
    la = lanczos.with_prior_precision(full.prior_precision)
    found, expected = (matrix(each.functional_posterior(x)) for each in (la, full))
    assert np.linalg.norm(found - expected) < 0.25 * np.linalg.norm(expected)
    np.testing.assert_allclose(np.trace(found), np.trace(expected), rtol=0.1)
    assert np.linalg.eigvalsh(found)[0] > -1e-5 * np.trace(found)


@pytest.mark.parametrize("name", usual(["kron", "krylov"], STRUCTURES))
def test_within_an_input_it_is_the_functional_variance(name, posteriors, problem):
    la, x = posteriors[name], problem.inputs[:4]
    within = np.einsum("ncnd->ncd", np.asarray(la.functional_posterior(x, microbatch=3).covariance))
    apart = la.functional_posterior(x, joint=False)
    assert not apart.is_joint
    np.testing.assert_array_equal(apart.covariance, la.functional_variance(x))
    if name != "krylov":  # whose samples estimate the one, and choose one number of the other
        np.testing.assert_allclose(within, apart.covariance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", usual(["diag", "spectral"], STRUCTURES))
def test_two_inputs_do_not_depend_on_others(name, posteriors, problem):
    la, x = posteriors[name], problem.inputs[:6]
    whole, part = la.functional_posterior(x), la.functional_posterior(x[4:2:-1])
    chosen = np.asarray(whole.covariance)[4:2:-1][:, :, 4:2:-1]
    np.testing.assert_allclose(part.covariance, chosen, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("seed", [0, 1])
def test_draws_have_the_covariance(name, seed, posteriors, problem):
    posterior = posteriors[name].functional_posterior(problem.inputs[:4])
    count, covariance = 4000, matrix(posterior)
    draws = np.asarray(posterior.sample(jax.random.key(seed), count)).reshape(count, -1)
    deviations = draws - np.asarray(posterior.mean).reshape(-1)
    found = deviations.T @ deviations / count
    spread = np.sqrt(np.diag(covariance))
    error = np.sqrt((covariance**2 + np.outer(spread, spread) ** 2) / count)
    assert np.abs(deviations.mean(axis=0) / spread).max() * np.sqrt(count) < 4.5
    assert np.abs((found - covariance) / error).max() < 5
    correlations = covariance / np.outer(spread, spread)
    assert np.abs(correlations[:3, 3:]).max() > 0.3  # the test would see draws that ignore it


@pytest.mark.parametrize("name", usual(["spectral", "krylov"], STRUCTURES))
def test_samples_at_given_precisions_are_functions_if_asked(name, posteriors, problem):
    """One key means one set of functions, at whatever inputs; and their correlations are those of the posterior."""
    la, x = posteriors[name], problem.inputs[:4]
    precision = la.prior.precision
    count = la.structure.num_probes if name == "krylov" else 2000
    options = {"key": jax.random.key(2), "num_samples": count, "joint": True}
    (whole,), (part,) = (la.functional_posteriors(some, [precision], **options) for some in (x, x[2:]))
    np.testing.assert_allclose(whole.deviations[:, 2:], part.deviations, rtol=1e-3, atol=1e-4)
    if name == "krylov":
        return
    found = np.asarray(whole.deviations).reshape(count, -1)
    covariance = matrix(la.functional_posterior(x))
    spread = np.sqrt(np.diag(covariance))
    error = np.sqrt((covariance**2 + np.outer(spread, spread) ** 2) / count)
    assert np.abs((found.T @ found / count - covariance) / error).max() < 5


def test_samples_from_covariances_are_independent_over_inputs_by_default(posteriors, problem):
    la, x = posteriors["full"], problem.inputs[:2]
    (found,) = la.functional_posteriors(x, [la.prior.precision], key=jax.random.key(0), num_samples=2000)
    correlations = np.corrcoef(np.asarray(found.deviations).reshape(2000, -1).T)
    assert np.abs(correlations[:3, 3:]).max() < 5 / np.sqrt(2000)


def test_a_decomposition_of_the_whole_curvature_is_exact(problem, x64):
    """Without curvature outside the basis the share of the prior's variance is one."""
    x = problem.inputs[:3]
    la = bnnlaplace.Laplace(problem.network, prior_precision=2.0)
    with pytest.warns(bnnlaplace.NotAModeWarning):
        spectral = la.fit((problem.inputs[:4], problem.targets[:4]))
    # Eight nonzero eigenvalues: two for each of four examples with three classes. Four probes find them in two blocks.
    values, vectors = np.asarray(spectral.structure.eigenvalues), np.asarray(spectral.structure.eigenvectors)
    ggn = vectors.T * values @ vectors
    probes = jax.random.normal(jax.random.key(0), (4, 43), jnp.float64)
    *_, decomposition = bnnlaplace.krylov.block_lanczos(lambda v: v @ ggn, probes, max_vectors=12)
    structure = KrylovStructure.from_decomposition(decomposition)
    krylov = spectral.fitted._replace(structure=structure)
    found, expected = functional_posterior(krylov, x), functional_posterior(spectral.fitted, x)
    np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", usual(["full"], ["diag", "kron", "full"]))
def test_inside_jit(name, posteriors, problem):
    la, x = posteriors[name], jnp.asarray(problem.inputs[:3])
    inside = jax.jit(lambda la, x: la.functional_posterior(x))(la, x)
    np.testing.assert_allclose(inside.covariance, la.functional_posterior(x).covariance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["spectral", "krylov"])
def test_closed_over_inside_jit(name, posteriors, problem):
    la, x = posteriors[name], jnp.asarray(problem.inputs[:3])
    inside = jax.jit(lambda x: la.functional_posterior(x).covariance)(x)
    np.testing.assert_allclose(inside, la.functional_posterior(x).covariance, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["full", "krylov"])
def test_the_answer_does_not_depend_on_what_was_asked_before(name, posteriors, problem):
    la, x = posteriors[name], problem.inputs[:3]
    first = la.functional_posterior(x).covariance
    for factor in (2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 100.0):
        other = la._of(la.fitted.at(la.prior._replace(precision=factor * la.prior.precision)), la.settings)
        other.functional_posterior(x)
    np.testing.assert_allclose(la.functional_posterior(x).covariance, first, rtol=1e-5, atol=1e-6)


def test_several_positions_and_features(x64):
    """Outputs (B, T, C) of a last layer after features."""
    rng = np.random.default_rng(0)
    params = {"hidden": jnp.asarray(rng.normal(size=(3, 4))), "last": jnp.asarray(rng.normal(size=(4, 2)))}
    network = bnnlaplace.Network.from_function(lambda p, x: jnp.tanh(x @ p["hidden"]) @ p["last"], params)
    x, y = rng.normal(size=(5, 2, 3)), rng.normal(size=(5, 2, 2))
    la = bnnlaplace.Laplace(network, "regression", "last_layer", "full").fit((x, y))
    features = np.tanh(x @ np.asarray(params["hidden"]))
    rows = np.einsum("bti,cd->btcid", features, np.eye(2)).reshape(20, 8)
    expected = (rows @ np.linalg.solve(rows.T @ rows + np.eye(8), rows.T)).reshape(5, 2, 2, 5, 2, 2)
    found = la.functional_posterior(x)
    np.testing.assert_allclose(found.covariance, expected, rtol=1e-6, atol=1e-8)
    assert found.sample(jax.random.key(0), 3).shape == (3, 5, 2, 2)
    assert la.functional_posterior(x, joint=False).sample(jax.random.key(0), 3).shape == (3, 5, 2, 2)


@pytest.mark.parametrize("is_joint", [True, False])
def test_no_inputs(is_joint, posteriors, problem):
    found = posteriors["full"].functional_posterior(problem.inputs[:0], joint=is_joint)
    assert found.covariance.shape == ((0, 3, 0, 3) if is_joint else (0, 3, 3))
    assert found.is_joint == is_joint
    assert found.sample(jax.random.key(0), 2).shape == (2, 0, 3)


def test_too_many_inputs_are_refused(posteriors, problem, monkeypatch):
    monkeypatch.setattr(memory, "free_bytes", lambda: 10_000)
    found = posteriors["full"].functional_posterior(problem.inputs[:2])
    assert found.covariance.shape == (2, 3, 2, 3)
    with pytest.raises(MemoryError, match=r"120 outputs, 40 inputs times 3, .* 43 weights; got 10 kB free for about"):
        posteriors["full"].functional_posterior(problem.inputs)
    assert joint.functional_posterior(posteriors["full"].fitted, problem.inputs, joint=False).mean.shape == (40, 3)


def test_bad_arguments(posteriors, problem, unchecked_annotations):
    la, x = posteriors["full"], problem.inputs[:2]
    key = jax.random.key(0)
    for value in ("yes", None, 1):
        with pytest.raises(ValueError, match=r"functional_posterior\(joint=...\) must be True or False; got"):
            la.functional_posterior(x, joint=value)
        with pytest.raises(ValueError, match=r"functional_posteriors\(joint=...\) must be True or False; got"):
            la.functional_posteriors(x, [1.0], key=key, num_samples=2, joint=value)
    with pytest.raises(ValueError, match=r"functional_posteriors\(spread=...\) must be"):
        la.functional_posteriors(x, [1.0], key=key, num_samples=2, spread="all")
    for value in (0, 2.5, True):
        with pytest.raises(ValueError, match="microbatch=... must be an integer of at least 1"):
            la.functional_posterior(x, microbatch=value)
        with pytest.raises(ValueError, match=r"sample\(num_samples=...\) must be an integer of at least 1"):
            la.functional_posterior(x).sample(key, value)
    with pytest.raises(ValueError, match=r"sample\(key=...\) must be one random key; got 0"):
        la.functional_posterior(x).sample(0, 2)
    with pytest.raises(ValueError, match="infinite values in 1 of 2 of them"):
        la.functional_posterior(np.where(np.arange(8).reshape(2, 4) == 5, np.nan, x))
    with pytest.raises(ValueError, match="call la = la.fit"):
        bnnlaplace.Laplace(problem.network).functional_posterior(x)


def test_a_laplace_is_called_for_its_predictions(posteriors, problem):
    la, x = posteriors["diag"], problem.inputs[:3]
    np.testing.assert_array_equal(la(x), la.predictive(x))
    options = {"link_approx": "mc", "key": jax.random.key(0), "num_samples": 3}
    np.testing.assert_array_equal(la(x, "glm", **options), la.predictive(x, "glm", **options))


@pytest.mark.parametrize("name", usual(["krylov"], ["full", "krylov"]))
def test_draws_can_be_differentiated_in_the_inputs(name, problem, x64):
    """Also where they are more than the weights, so that the covariance has a null space: NaN before, silently."""
    structure = "lanczos" if name in ("spectral", "krylov") else name
    network = problem.network.with_params(jax.tree.map(lambda w: w.astype(jnp.float64), problem.network.params))
    la = bnnlaplace.Laplace(network, hessian_structure=structure, prior_precision=2.0)
    la = la.fit((problem.inputs, problem.targets), **(OPTIONS if name == "krylov" else {}))
    x = jnp.asarray(problem.inputs[:16]).at[1].set(problem.inputs[0])
    weight = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 3)))

    def answers(factor):
        together, apart = (la.functional_posterior(factor * x, joint=joint) for joint in (True, False))
        draws = [jnp.sum(weight * each.sample(jax.random.key(0), 2)) for each in (together, apart)]
        return jnp.stack([*draws, jnp.einsum("nc,ncmd,md", weight[0], together.covariance, weight[1])])

    # Differences are off by the roots of the rounding of zeros, about 1e-8 / step.
    step = 1e-5
    expected = (answers(1 + step) - answers(1 - step)) / (2 * step)
    np.testing.assert_allclose(jax.jacrev(answers)(1.0), expected, rtol=5e-3)


@pytest.mark.exhaustive  # as above in other numbers
def test_draws_can_be_differentiated_in_float32(posteriors, problem):
    def value(factor):
        posterior = posteriors["krylov"].functional_posterior(factor * problem.inputs[:16])
        return posterior.sample(jax.random.key(0), 2).sum() + posterior.covariance.sum()

    slope = jax.grad(value)(1.0)
    assert np.isfinite(slope) and abs(slope) > 0
