"""The front object: a pytree, an argument of jitted functions, its settings, and what bad input gets."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace.core.tree import ravel


def test_sample_is_a_tree_of_weights(lanczos):
    samples = lanczos.sample(jax.random.key(0), 5)
    for sample, weight in zip(jax.tree.leaves(samples), jax.tree.leaves(lanczos.network.params), strict=True):
        assert sample.shape == (5, *weight.shape)
    first, second = (ravel(jax.tree.map(lambda leaf, i=i: leaf[i], samples)) for i in (0, 1))
    assert np.linalg.norm(first - second) > 1


def test_is_a_pytree(diagonal, trained):
    _, x, _ = trained
    inside = jax.jit(lambda la, x: la.predictive(x))(diagonal, x[:5])
    np.testing.assert_allclose(inside, diagonal.predictive(x[:5]), rtol=1e-5)
    assert dataclasses.is_dataclass(jax.tree.map(lambda leaf: leaf, diagonal))


@pytest.mark.parametrize("name", usual(["diagonal"], ["full", "diagonal"]))
def test_is_an_argument_of_jitted_functions(name, request, trained):
    la, x = request.getfixturevalue(name), trained[1][:3]
    for method in (
        lambda la, x: la.predictive(x),
        lambda la, x: la.predictive(x, link_approx="mc", key=jax.random.key(0), num_samples=4),
        lambda la, x: la.functional_variance(x),
        lambda la, x: la.sample(jax.random.key(0), 2),
        lambda la, x: la.mode_gradient(),
    ):
        expected, found = method(la, x), jax.jit(method)(la, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


def test_lanczos_is_closed_over_and_not_traced(lanczos, trained):
    la, x = lanczos, jnp.asarray(trained[1][:3])
    for method in (
        lambda la: la.predictive(x),
        lambda la: la.functional_variance(x),
        lambda la: la.sample(jax.random.key(0), 2),
        lambda la: la.log_marginal_likelihood().mean,
    ):
        with pytest.raises(TypeError, match="hessian_structure='lanczos' must not be traced.*close over the object"):
            jax.jit(method)(la)
        with pytest.raises(TypeError, match="nor its prior precision"):
            jax.jit(lambda precision, method=method: method(la.with_prior_precision(precision)))(2.0)
    np.testing.assert_allclose(jax.jit(lambda x: la.predictive(x))(x), la.predictive(x), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda: la.predictive(x))(), la.predictive(x), rtol=1e-5)


def test_sigma_noise_is_read_from_the_likelihood(tmp_path):
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 1)))
    assert bnnlaplace.Laplace(network).sigma_noise is None
    la = bnnlaplace.Laplace(network, "regression", hessian_structure="full", sigma_noise=0.3).fit(
        (jnp.eye(2), jnp.ones((2, 1)))
    )
    la.save(tmp_path / "la")
    own = bnnlaplace.Laplace(network, bnnlaplace.gaussian(0.3))
    for each in (la, la.with_prior_precision(2.0), own, bnnlaplace.Laplace.load(tmp_path / "la", network)):
        np.testing.assert_allclose(each.sigma_noise, 0.3)
    noise = jax.jit(lambda sigma: bnnlaplace.Laplace(network, "regression", sigma_noise=sigma).sigma_noise)
    np.testing.assert_allclose(noise(0.2), 0.2)
    with pytest.raises(ValueError, match="sigma_noise.*left out unless likelihood='regression'"):
        bnnlaplace.Laplace(network, sigma_noise=0.3)
    with pytest.raises(ValueError, match="sigma_noise.*positive and finite"):
        bnnlaplace.Laplace(network, "regression", sigma_noise=jnp.float32(-1.0))


def test_is_rebuilt_with_any_leaves(diagonal):
    # As vmap and sharding do: a scale per leaf, a batch of precisions.
    axes = jax.tree.map(lambda leaf: 0, diagonal)
    assert axes.prior_precision == 0
    batch = jax.vmap(diagonal.with_prior_precision)(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(batch.prior_precision, [1.0, 2.0])
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(diagonal)}
    assert {".settings.prior_precision", ".state.structure.diagonal", ".state.network.params['w1']"} <= paths


@pytest.mark.parametrize("precision", [0.0, np.nan, jnp.inf, -1, [1.0, 2.0], np.ones(3), {"w1": 1.0}, "1", None])
def test_the_prior_precision_fits_the_weights(trained, diagonal, precision):
    network, _, _ = trained
    with pytest.raises(ValueError, match=r"Laplace\(prior_precision=...\) must be one"):
        bnnlaplace.Laplace(network, prior_precision=precision)
    if precision is not None:
        for method in (diagonal.log_marginal_likelihood, diagonal.mode_gradient, diagonal.mode_decrement):
            with pytest.raises(ValueError, match=r"prior_precision=...\)? must be one"):
                method(precision)


@pytest.mark.parametrize("precision", [2, 2.0, np.float32(2), np.asarray(2.0), jnp.asarray(2.0)])
def test_a_prior_precision_of_any_numeric_type(diagonal, precision):
    assert diagonal.with_prior_precision(precision).log_marginal_likelihood() == diagonal.log_marginal_likelihood(2.0)


def test_bad_input(trained, diagonal, unchecked_annotations):
    network, x, y = trained
    la = bnnlaplace.Laplace(network)
    with pytest.raises(
        ValueError, match=r"hessian_structure=\.\.\.\) must be 'diag', 'full', 'kron' or 'lanczos'; got 'kfac'"
    ):
        bnnlaplace.Laplace(network, hessian_structure="kfac")
    with pytest.raises(ValueError, match="prior_precision.*one positive, finite number; got -1"):
        bnnlaplace.Laplace(network, prior_precision=-1)
    with pytest.raises(ValueError, match="call la = la.fit"):
        la.log_marginal_likelihood()
    for key in (None, 0, np.zeros(2)):
        with pytest.raises(ValueError, match=r"fit\(key=...\).* must be one random key; got .*; try jax.random.key"):
            la.fit((x, y), key=key)
    with pytest.raises(ValueError, match="must hold at least one batch"):
        la.fit([], key=jax.random.key(0))
    with pytest.raises(ValueError, match="as many targets as inputs"):
        la.fit((x, y[:5]), key=jax.random.key(0))
    for num_data in (0, -5, np.nan):
        with pytest.raises(ValueError, match=r"fit\(num_data=...\) must be an integer of at least 1"):
            la.fit((x, y), key=jax.random.key(0), num_data=num_data)
    for tolerance in (0, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"fit\(tolerance=...\) must be positive"):
            la.fit((x, y), key=jax.random.key(0), tolerance=tolerance)
    with pytest.raises(ValueError, match="labels must lie in 0..9"):
        la.fit((x, y + 5), key=jax.random.key(0))
    with pytest.raises(ValueError, match="x must be finite; got NaN or infinite values"):
        la.fit((x.copy() * np.nan, y), key=jax.random.key(0))
    with pytest.raises(ValueError, match="outputs must be one array of shape"):
        bnnlaplace.Laplace(bnnlaplace.Network.from_function(lambda w, x: x[:, 0] * w, jnp.ones(()))).fit((x, y))
    with pytest.raises(ValueError, match="collection 'params'"):
        bnnlaplace.Network.from_linen(nn.Dense(3), {"kernel": 1})
    with pytest.raises(ValueError, match="'marglik' or 'gridsearch'; got 'cv'"):
        diagonal.optimize_prior_precision("cv")
    with pytest.raises(ValueError, match="'probit', 'mc' or 'bridge'; got 'exact'"):
        diagonal.predictive(x[:3], link_approx="exact")
    with pytest.raises(ValueError, match="'glm' or 'nn'; got 'bnn'"):
        diagonal.predictive(x[:3], pred_type="bnn")
    for options in ({"link_approx": "mc"}, {"pred_type": "nn"}):
        for key in (None, 0):
            with pytest.raises(ValueError, match="key=...\\) must be one random key; got"):
                diagonal.predictive(x[:3], key=key, **options)
    with pytest.raises(ValueError, match=r"sample\(key=...\) must be one random key; got 1"):
        diagonal.sample(1, 2)
    with pytest.raises(ValueError, match=r"sample\(num_samples=...\) must be an integer of at least 0; got -1"):
        diagonal.sample(jax.random.key(0), -1)
    for inputs in (x[:3].tolist(), "abc", 1.0):
        with pytest.raises(ValueError, match="inputs to predict at must be arrays.*pass jnp.asarray"):
            diagonal.predictive(inputs)
    with pytest.raises(ValueError, match="inputs to predict at must be numbers; got an array of <U1"):
        diagonal.predictive(np.array([["a"]]))
    with pytest.raises(
        ValueError, match=r"shape of those of the data.*of float32\[B,63\] the network raised TypeError"
    ):
        diagonal.predictive(x[:3, 1:])
    with pytest.raises(ValueError, match=r"fit\(max_vectors=...\) must be at least num_probes, 32; got 31"):
        la.fit((x, y), key=jax.random.key(0), max_vectors=31)
    with pytest.raises(TypeError, match=r"must be a bnnlaplace.Network; got Dense; wrap a Flax model"):
        bnnlaplace.Laplace(nn.Dense(3))
    with pytest.raises(TypeError, match=r"must be a flax.nnx.Module; got Dense; .*from_linen"):
        bnnlaplace.Network.from_nnx(nn.Dense(3))
    with pytest.raises(ValueError, match="with_noise=True.*of a regression with sigma_noise; got 'classification'"):
        diagonal.predictive(x[:3], with_noise=True)
    with pytest.raises(ValueError, match=r"fit\(target_precision=...\) must be one positive, finite number; got 0"):
        la.fit((x, y), key=jax.random.key(0), target_precision=0)
    for grid in ([], [1.0, -1.0], [[1.0]], [np.nan]):
        with pytest.raises(ValueError, match="must be positive"):
            diagonal.evidence_curve(grid)


def test_a_short_description(diagonal, lanczos):
    assert repr(diagonal).startswith("Laplace('classification', 'diag', 602 weights, prior_precision=")
    assert repr(diagonal).endswith("fitted as DiagonalStructure)")
    assert "fitted as KrylovStructure" in repr(lanczos)
    groups = bnnlaplace.Laplace(diagonal.network, prior_precision={"w1": 1.0, "w2": 2.0, "b2": 3.0})
    assert repr(groups).endswith("prior_precision=3 groups, not fitted)")


def test_bad_numbers(diagonal, trained, unchecked_annotations):
    _, x, y = trained
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="evidence_curve.* must be positive, finite numbers, at least one; got 1.0"):
        diagonal.evidence_curve(1.0)
    with pytest.raises(ValueError, match="functional_posteriors.* must be positive and finite"):
        diagonal.functional_posteriors(x[:2], [-1.0], key=key, num_samples=2)
    with pytest.raises(ValueError, match="must be an integer of at least 0; got 2.5"):
        diagonal.sample(key, 2.5)
    with pytest.raises(ValueError, match="validation_curve.*: soft targets must be probabilities"):
        diagonal.validation_curve(x[:2], np.full((2, 10), 0.2), [1.0], key=key, num_samples=2)
    with pytest.raises(ValueError, match="must be an integer of at least 2"):
        bnnlaplace.Laplace(trained[0]).fit((x, y), key=key, num_probes=4.0)
