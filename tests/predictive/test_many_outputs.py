"""Samples of more outputs than samples: those of functions, without a covariance."""

from importlib import import_module

import jax
import numpy as np
import pytest
from cases import two_layers

import bnnlaplace
from bnnlaplace.predictive import functional, reading

INPUTS, HIDDEN, OUTPUTS, SAMPLES = 3, 4, 40, 6
KEY = jax.random.key(3)
OPTIONS = {"key": KEY, "num_samples": SAMPLES}


@pytest.fixture(scope="module", params=["diag", "kron"])
def posterior(request):
    rng = np.random.default_rng(0)
    shapes = {"w1": (INPUTS, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, OUTPUTS), "b2": (OUTPUTS,)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x, y = rng.normal(size=(9, INPUTS)).astype(np.float32), np.arange(9) % OUTPUTS
    network = bnnlaplace.Network.from_function(two_layers, params)
    la = bnnlaplace.Laplace(network, hessian_structure=request.param, prior_precision=30.0)
    return la.fit((x, y)), x


def test_samples_are_functions_and_no_covariance_is_formed(posterior, monkeypatch):
    """A covariance of C outputs at each input has C^2 numbers, and its root takes C^3 multiplications."""
    la, x = posterior
    (joint,) = la.functional_posteriors(x, [5.0], **OPTIONS, joint=True)
    monkeypatch.delattr(functional, "marginal_samples")
    for spread in ("marginal", "none"):
        (found,) = functional.functional_posteriors(la.fitted, x, [5.0], **OPTIONS, spread=spread)
        np.testing.assert_allclose(found.deviations, joint.deviations, rtol=1e-4, atol=1e-5)
        if spread == "none":
            assert found.variance is None
        else:
            of_outputs = np.diagonal(joint.variance, axis1=1, axis2=2)
            np.testing.assert_allclose(found.variance, of_outputs, rtol=1e-4)


def test_averages_do_not_depend_on_the_memory(posterior, monkeypatch):
    """Inputs in parts see the same functions; samples of the weights in parts are others, and as many."""
    la, x = posterior
    whole = la.predictive(x, link_approx="mc", **OPTIONS)
    monkeypatch.setattr(import_module("bnnlaplace.predictive.predictions"), "MOST_NUMBERS", 1)
    in_parts = la.predictive(x, link_approx="mc", **OPTIONS, microbatch=4)
    np.testing.assert_allclose(in_parts, whole, rtol=1e-4, atol=1e-6)
    monkeypatch.setattr(functional, "SAMPLE_BYTES", 4 * 4 * la.fitted.structure.samples(KEY, 1, 1.0).size)
    (parts,) = functional.functional_posteriors(la.fitted, x, [5.0], **OPTIONS, spread="none")
    assert parts.deviations.shape == (SAMPLES, len(x), OUTPUTS)
    flat = np.asarray(parts.deviations).reshape(SAMPLES, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(SAMPLES)).max() < 0.9  # no sample twice


def test_few_outputs_keep_their_exact_covariance(posterior):
    la, x = posterior
    draws = reading.Draws(KEY, OUTPUTS, spread="none")
    assert not reading.draws_functions(la.fitted, x, draws)
    assert reading.draws_functions(la.fitted, x, draws._replace(num_samples=OUTPUTS - 1))
