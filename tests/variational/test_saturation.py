"""The warning that the Gaussian at the mode does not fit the data whose evidence chose its prior."""

import re
import sys
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace import Laplace, SaturatedPosteriorWarning
from bnnlaplace.model.data import as_data
from bnnlaplace.variational.saturation import training_fit

WARNING = "error::bnnlaplace.SaturatedPosteriorWarning"
rng = np.random.default_rng(0)
BLOBS = np.array([[2.0, 0.0], [-1.0, 1.7], [-1.0, -1.7]])
Y = np.arange(60) % 3
X = (BLOBS[Y] + 0.7 * rng.normal(size=(60, 2))).astype(np.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(30)(x)))


@pytest.fixture(scope="module")
def saturated():
    """153 weights at the mode for a wide prior: all labels have probability one."""
    optimizer = optax.adam(1e-2)

    def loss(params):
        misfit = optax.softmax_cross_entropy_with_integer_labels(Net().apply(params, X), Y).sum()
        return misfit + 0.5e-3 * optax.tree.norm(params, squared=True)

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    params = Net().init(jax.random.key(0), X)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3000))((params, optimizer.init(params)))
    return bnnlaplace.Network.from_linen(Net(), params)


@pytest.fixture(scope="module")
def warned(saturated):
    la = Laplace(saturated, hessian_structure="full", prior_precision=1e-3).fit((X, Y))
    with pytest.warns(SaturatedPosteriorWarning) as caught:
        best = la.optimize_prior_precision()
    return la, best, str(caught[0].message)


def test_a_saturated_classifier_warns_with_both_numbers(warned):
    _, best, message = warned
    nll, evidence = map(float, re.search(r"its NLL is (\S+) nats, where the evidence says (\S+)\. ", message).groups())
    np.testing.assert_allclose(evidence, -best.log_marginal_likelihood().mean / len(Y), rtol=1e-2)
    probs = best.predictive(X, link_approx="mc", key=jax.random.key(1), num_samples=2000)
    exact = -np.log(np.asarray(probs)[np.arange(60), Y])
    assert nll > evidence and abs(nll - exact.mean()) < 0.2 * exact.mean()
    assert "approximation='variational'" in message


@pytest.mark.parametrize("structure", usual(["lanczos"], ["diag", "lanczos"]))
def test_other_structures_warn_too(saturated, structure):
    la = Laplace(saturated, hessian_structure=structure, prior_precision=1e-3).fit((X, Y), key=jax.random.key(0))
    with pytest.warns(SaturatedPosteriorWarning):
        la.optimize_prior_precision()


@pytest.mark.filterwarnings(WARNING)
def test_the_variational_posterior_of_the_same_network_does_not_warn_and_fits(saturated):
    la = Laplace(saturated, hessian_structure="full", prior_precision=0.1)
    la = la.fit((X, Y), key=jax.random.key(0), approximation=bnnlaplace.Variational(prior_structure="scalar"))
    found = training_fit(la.fitted, as_data((X, Y)).sample(60))
    assert not found.is_saturated and found.nll < found.evidence


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("structure", usual(["diag"], ["full", "diag"]))
def test_a_model_that_made_its_labels_does_not_warn(structure):
    """Two inputs and noisy labels: logistic regression at its mode."""
    x, truth = rng.normal(size=(150, 2)), np.array([[1.0, -1.0, 0.0], [0.5, 0.5, -1.0]])
    logits = x @ truth
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.asarray(truth))
    la = Laplace(network, hessian_structure=structure).fit((x, labels), mean="linear")
    la.optimize_prior_precision()


@pytest.mark.filterwarnings(WARNING)
def test_a_regression_has_no_such_check(monkeypatch):
    module = sys.modules["bnnlaplace.variational.choose_prior"]  # a function of the package has the same name
    monkeypatch.setattr(module, "training_fit", lambda *arguments: pytest.fail("a check"))
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 1)))
    la = Laplace(network, "regression", hessian_structure="full").fit((X, X[:, :1]), mean="linear")
    la.optimize_prior_precision()


def test_the_sample_is_kept_by_methods_and_lost_on_disk_and_in_jit(warned, saturated, tmp_path):
    la, best, _ = warned
    assert la.with_prior_precision(2.0).fitted.sample.data is not None
    assert len(best.fitted.sample.data.first) == 60
    la.save(tmp_path / "posterior")
    again = Laplace.load(tmp_path / "posterior", saturated)
    assert again.fitted.sample.data is None
    with warnings.catch_warnings():
        warnings.simplefilter("error", SaturatedPosteriorWarning)
        again.optimize_prior_precision()
    leaves, structure = jax.tree.flatten(la)
    assert sum(np.size(leaf) for leaf in leaves if np.shape(leaf) == X.shape) == 0
    assert jax.tree.unflatten(structure, leaves).fitted.sample.data is None


def test_the_numbers_count_positions_weights_and_unknown_labels():
    """The evidence of an example is that of all data over the sum of their weights."""
    network = bnnlaplace.Network.from_function(
        lambda w, x: jnp.stack([x @ w, x @ w[:, ::-1]], axis=1), jnp.asarray(rng.normal(size=(2, 3)))
    )
    labels = np.stack([Y, (Y + 1) % 3], axis=1)
    likelihood = bnnlaplace.categorical(ignore_index=2)
    weights = np.where(np.arange(60) < 30, 2.0, 1.0)
    la = Laplace(network, likelihood, hessian_structure="full").fit((X, labels, weights))
    found = training_fit(la.fitted, la.fitted.sample.data)
    count = (weights[:, None] * (labels != 2)).sum()
    np.testing.assert_allclose(found.evidence, -la.log_marginal_likelihood().mean / count, rtol=1e-5)
    probs = np.asarray(la.predictive(X, link_approx="mc", key=jax.random.key(0), num_samples=4000))
    log_probs = np.log(np.take_along_axis(probs, labels[..., None], axis=-1)[..., 0])
    expected = -(weights[:, None] * (labels != 2) * log_probs).sum() / count
    np.testing.assert_allclose(found.nll, expected, rtol=0.02)
