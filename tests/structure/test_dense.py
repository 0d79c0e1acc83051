"""Dense structures: what they remember, and matrices that rounding made indefinite."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np

import bnnlaplace
from bnnlaplace.structure import dense as structure_dense


def test_what_a_trace_asks_for_is_remembered_beyond_it(full, trained):
    """A dense structure decomposes itself when it is asked often; inside of a trace, too."""
    x = jnp.asarray(trained[1][:3])
    structure = bnnlaplace.structure.DenseStructure(full.structure.matrix)
    fresh = bnnlaplace.Laplace._of(full.fitted._replace(structure=structure), full.settings)
    expected = fresh.functional_variance(x)
    for _ in range(4):
        inside = jax.jit(lambda x: fresh.functional_variance(x))(x)
        np.testing.assert_allclose(inside, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(fresh.functional_variance(x), expected, rtol=1e-3, atol=1e-4)


def test_a_dense_matrix_that_rounding_made_indefinite():
    values = jnp.array([-1e-3, 0.0, 1.0, 1e4])
    structure = bnnlaplace.structure.DenseStructure(jnp.diag(values))
    expected = np.log1p(np.array([0.0, 0.0, 1.0, 1e4]) / 1e-4).sum()
    for _ in range(4):
        np.testing.assert_allclose(structure.log_determinant(1e-4), expected, rtol=1e-6)


def test_a_trace_of_a_dense_matrix_that_rounding_made_indefinite():
    x = (255 * np.random.default_rng(0).uniform(size=(10, 40))).astype(np.float32)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((40, 1)) / 40)
    options = {"hessian_structure": "full", "sigma_noise": 0.1, "prior_precision": 0.01}
    la = bnnlaplace.Laplace(network, "regression", **options).fit((x, x[:, :1]))
    traced = jax.jit(lambda la, x: la.predictive(x)[1])(la, x[:2])
    np.testing.assert_allclose(traced, la.predictive(x[:2])[1], rtol=0.05)
    assert np.isfinite(jax.jit(lambda la, key: la.sample(key, 2))(la, jax.random.key(0))).all()


def test_threads_at_different_precisions(full, trained):
    _, x, _ = trained
    expected = {delta: full.with_prior_precision(delta).functional_variance(x[:3]) for delta in (1.0, 100.0)}

    def ask(number):
        delta = (1.0, 100.0)[number % 2]
        return delta, full.with_prior_precision(delta).functional_variance(x[:3])

    with ThreadPoolExecutor(4) as pool:
        for delta, found in pool.map(ask, range(40)):
            np.testing.assert_allclose(found, expected[delta], rtol=1e-3)


def test_a_pickled_structure_holds_its_matrix_alone(full, trained):
    full.predictive(trained[1][:2])
    again = pickle.loads(pickle.dumps(full.structure))
    assert set(vars(again)) == {"matrix", "rounding"}  # and nothing that was factorised
    np.testing.assert_array_equal(again.matrix, full.structure.matrix)


def test_a_precision_that_float32_does_not_have_is_factorised_once(trained, monkeypatch):
    network, x, y = trained
    calls = []
    factorise = structure_dense._shifted_cholesky
    monkeypatch.setattr(structure_dense, "_shifted_cholesky", lambda *args: calls.append(args) or factorise(*args))
    la = bnnlaplace.Laplace(network, hessian_structure="full", prior_precision=0.1).fit((x, y))
    la.predictive(x[:3])
    la.log_marginal_likelihood()
    la.predictive(x[:3])
    assert len(calls) == 1
