"""Predictions of a trained network, of no inputs, and of inputs that cannot be used."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_predictive_is_a_softer_distribution(full, trained, link):
    network, x, _ = trained
    probs = np.asarray(full.predictive(x[:50], link_approx=link, key=jax.random.key(0), num_samples=64))
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)
    at_mode = np.asarray(jax.nn.softmax(network(network.params, x[:50])))
    assert probs.max(axis=1).mean() < at_mode.max(axis=1).mean()


def test_predictive_tends_to_the_mode_as_the_prior_tightens(full, trained):
    network, x, _ = trained
    at_mode = jax.nn.softmax(network(network.params, x[:50]))
    tight = full.with_prior_precision(1e8)
    for link in ("probit", "mc"):
        np.testing.assert_allclose(
            tight.predictive(x[:50], link_approx=link, key=jax.random.key(0)), at_mode, atol=1e-3
        )


@pytest.mark.parametrize(
    ("name", "dtype"),
    usual(
        [("full", np.float32), ("diagonal", np.float64)], ("full", "diagonal", "unconverged"), (np.float32, np.float64)
    ),
)
def test_no_inputs_give_no_predictions(name, request, dtype):
    la = request.getfixturevalue(name).with_prior_precision(1e6)  # where even few vectors are enough
    none = np.empty((0, 64), dtype)
    assert la.predictive(none).shape == (0, 10)
    assert la.predictive(none, link_approx="mc", key=jax.random.key(0)).shape == (0, 10)
    assert la.functional_variance(none).shape == (0, 10, 10)
    (found,) = la.functional_posteriors(none, [1.0], key=jax.random.key(0), num_samples=3)
    assert [part.shape for part in found] == [(0, 10), (0, 10, 10), (3, 0, 10)]


def test_no_inputs_of_a_network_that_flattens_its_own():
    """JAX cannot find the -1 of a shape that holds a zero."""
    network = bnnlaplace.Network.from_function(lambda w, x: x.reshape(len(x), -1) @ w, jnp.zeros((8, 3)))
    x, y = np.random.default_rng(0).normal(size=(6, 2, 4)), np.arange(6) % 3
    la = bnnlaplace.Laplace(network, hessian_structure="diag", prior_precision=1e6).fit((x, y))
    assert la.predictive(x[:0]).shape == (0, 3)
    assert la.functional_variance(x[:0]).shape == (0, 3, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_inputs_to_predict_at_must_be_finite(diagonal, trained, value, convert):
    _, x, y = trained
    spoilt = x[:6].copy()
    spoilt[2:4, 7] = value
    options = {"key": jax.random.key(0), "num_samples": 2}
    for predict in (
        lambda x: diagonal.predictive(x),
        lambda x: diagonal.predictive(x, link_approx="mc", **options),
        lambda x: diagonal.functional_variance(x),
        lambda x: diagonal.functional_posteriors(x, [1.0], **options),
        lambda x: diagonal.validation_curve(x, y[:6], [1.0], **options),
    ):
        with pytest.raises(ValueError, match="infinite values in 2 of 6 of them, first in number 2"):
            predict(convert(spoilt))


def test_the_probit_link_is_for_what_it_approximates(diagonal, trained):
    own = dataclasses.replace(diagonal.likelihood, name="poisson")
    with pytest.raises(ValueError, match="made for softmax and sigmoid; got 'poisson'; use link_approx='mc'"):
        bnnlaplace.Laplace._of(diagonal.fitted._replace(likelihood=own), diagonal.settings).predictive(trained[1][:3])


@pytest.mark.parametrize("num_samples", [0, -1])
def test_averages_need_a_sample(diagonal, trained, num_samples):
    _, x, y = trained
    options = {"key": jax.random.key(0), "num_samples": num_samples}
    for call in (
        lambda: diagonal.predictive(x[:2], link_approx="mc", **options),
        lambda: diagonal.predictive(x[:2], pred_type="nn", **options),
        lambda: diagonal.functional_posteriors(x[:2], [1.0], **options),
        lambda: diagonal.validation_curve(x[:2], y[:2], [1.0], **options),
    ):
        with pytest.raises(ValueError, match=r"num_samples=...\) must be an integer of at least 1; got"):
            call()


def test_one_weight_sample_has_no_variance():
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((2, 1)))
    la = bnnlaplace.Laplace(network, "regression", hessian_structure="diag").fit((np.eye(2), np.zeros((2, 1))))
    with pytest.raises(ValueError, match="of a regression must be an integer of at least 2; got 1"):
        la.predictive(np.eye(2), pred_type="nn", key=jax.random.key(0), num_samples=1)
