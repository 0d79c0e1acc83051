"""One question has one answer, whatever was asked before, and after saving and loading."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace

SIGMA, DELTA = 0.03, 0.4
GRID = np.geomspace(1e-2, 1e4, 25)


@pytest.fixture(scope="module")
def problem():
    """A regression with little noise: eigenvalues of G from 1e6 down to far below the prior precision."""
    rng = np.random.default_rng(2)
    x = rng.uniform(-2, 2, (200, 1)).astype(np.float32)
    y = (np.sin(3 * x) + SIGMA * rng.normal(size=x.shape)).astype(np.float32)
    shapes = {"a": (1, 12), "b": (12,), "c": (12, 1)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    network = bnnlaplace.Network.from_function(lambda p, x: jnp.tanh(x @ p["a"] + p["b"]) @ p["c"], params)
    return network, x, y


def fit(problem, structure):
    network, x, y = problem
    la = bnnlaplace.Laplace(network, "regression", hessian_structure=structure, sigma_noise=SIGMA)
    return la.fit((x, y), key=jax.random.key(0), num_probes=16, max_vectors=48)


def answers(la):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        la = la.with_prior_precision(DELTA)
        x = jnp.linspace(-3, 3, 5)[:, None]
        return {
            "evidence": la.log_marginal_likelihood().mean,
            "variance": np.asarray(la.functional_variance(x)),
            "samples": np.asarray(la.sample(jax.random.key(1), 3)["a"]),
            "effective": la.effective_parameters(),
        }


@pytest.mark.parametrize("structure", usual(["lanczos"], ["full", "diag", "kron", "lanczos"]))
def test_two_orders_and_a_checkpoint(problem, structure, tmp_path):
    fresh = answers(fit(problem, structure))
    used = fit(problem, structure)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        used.evidence_curve(GRID)
        used.optimize_prior_precision()
        used.validation_curve(problem[1][:20], problem[2][:20], GRID, key=jax.random.key(0))
    used.save(tmp_path / "posterior")
    loaded = bnnlaplace.Laplace.load(tmp_path / "posterior", problem[0])
    for la in (used, loaded):
        found = answers(la)
        for name, expected in fresh.items():
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, err_msg=name)


def test_the_dense_variance_is_that_of_float64(problem):
    """The reference for 'full': derivatives in closed form, all algebra in float64."""
    network, x, _ = problem
    p = {name: np.asarray(value, np.float64) for name, value in network.params.items()}

    def jacobian(x):
        hidden = np.tanh(x.astype(np.float64) @ p["a"] + p["b"])
        slope = (1 - hidden**2) * p["c"][:, 0]
        return np.concatenate([slope * x, slope, hidden], axis=1)

    ours, at = jacobian(x), np.linspace(-3, 3, 5)[:, None]
    precision = ours.T @ ours / SIGMA**2 + DELTA * np.eye(ours.shape[1])
    expected = np.einsum("np,pq,nq->n", jacobian(at), np.linalg.inv(precision), jacobian(at))
    found = answers(fit(problem, "full"))["variance"][:, 0, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-3)


@pytest.mark.filterwarnings("ignore:the prior precision .* is below .*, the rounding of the curvature")
@pytest.mark.parametrize("structure", ["full", "diag", "kron"])
def test_an_argument_of_jit_gives_the_same_answers(problem, structure):
    """A matrix that `jit` rounds to float32 gives variances that are half too large."""
    la, x = fit(problem, structure).with_prior_precision(DELTA), jnp.linspace(-3, 3, 5)[:, None]
    key = jax.random.key(1)
    variance, samples = jax.jit(lambda la: (la.functional_variance(x), la.sample(key, 3)["a"]))(la)
    np.testing.assert_allclose(variance, la.functional_variance(x), rtol=1e-3)
    np.testing.assert_allclose(samples, la.sample(key, 3)["a"], rtol=1e-3, atol=1e-3)
    returned = jax.jit(lambda la: la)(la)
    np.testing.assert_allclose(returned.functional_variance(x), la.functional_variance(x), rtol=1e-5)
    assert returned.log_marginal_likelihood().mean == pytest.approx(la.log_marginal_likelihood().mean, rel=1e-6)


@pytest.mark.parametrize("relative", usual([True], [False, True]))
def test_derivatives_in_a_prior_precision_of_a_traced_matrix(problem, relative):
    la, x = fit(problem, "full"), jnp.linspace(-3, 3, 5)[:, None]

    def total(delta, la):
        precision = {"a": delta, "b": 0.1, "c": 0.2} if relative else delta
        return la.with_prior_precision(precision).functional_variance(x).sum()

    step = 1e-3 * DELTA
    expected = (float(total(DELTA + step, la)) - float(total(DELTA - step, la))) / (2 * step)
    assert jax.jit(jax.grad(total))(DELTA, la) == pytest.approx(expected, rel=1e-2)
