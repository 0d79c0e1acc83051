"""A Newton step of the mean is that of the dense Hessian, in the space of the outputs and in that of the weights."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest

import bnnlaplace
from bnnlaplace.core.tree import ravel
from bnnlaplace.curvature.keep import keep
from bnnlaplace.fitted import Fitted
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.model.data import as_data
from bnnlaplace.prior import Prior
from bnnlaplace.structure import DenseStructure
from bnnlaplace.variational import newton_outputs, newton_weights
from bnnlaplace.variational.draws import without_spread
from bnnlaplace.variational.expectations import expectations
from bnnlaplace.variational.newton_outputs import Kernel, OutputNewton
from bnnlaplace.variational.newton_weights import WeightNewton
from bnnlaplace.variational.sites import at_sites, sites_of

SCALE, DELTA = 2.5, 0.3


@pytest.fixture
def problem(x64):
    """A model that keeps rows, in two batches of which one is padded, with examples that count differently."""
    network, inputs, labels, weights = cases.at_positions(11)
    data = as_data([(inputs[:6], labels[:6], weights[:6]), (inputs[6:], labels[6:], weights[6:])])
    for _ in data:
        pass
    rows = keep(network, data, num_products=1000, microbatch=4)
    rng, count = np.random.default_rng(1), len(ravel(network.params))
    prior = Prior(DELTA, rng.uniform(0.5, 2, size=count), rng.normal(size=count))
    model = Model(network.linearised(), network, bnnlaplace.categorical(), data, None, rows)
    return model, prior, (inputs, labels, weights)


def at_the_weights(model, prior):
    """The outputs of each batch, without spread."""
    fitted = Fitted(model.network, model.likelihood, prior, None, None)
    return list(without_spread(fitted, model.data, microbatch=4))


def dense_step(model, prior, arrays, mean, draws):
    """The direction, gradient times direction, and the quadratic form, from the Jacobian as a matrix."""
    inputs, labels, weights = arrays
    network = model.head
    flat, unravel = jax.flatten_util.ravel_pytree(network.params)
    jacobian = np.asarray(jax.jacobian(lambda v: network(unravel(v), inputs).reshape(-1, 3))(flat))
    outputs = np.concatenate([np.asarray(each.mean) for each in draws])[: len(inputs)].reshape(-1, 3)
    probs = np.asarray(jax.nn.softmax(outputs))
    each = SCALE * np.repeat(weights, 4)
    residuals = each[:, None] * (np.eye(3)[labels.reshape(-1)] - probs)
    curvature = each[:, None, None] * (np.eye(3) * probs[:, None] - probs[:, :, None] * probs[:, None, :])
    precision = DELTA * np.asarray(prior.relative)
    ascent = np.einsum("ncp,nc->p", jacobian, residuals) - precision * (mean - prior.mean)
    direction = np.linalg.solve(oracles.ggn(jacobian, curvature) + np.diag(precision), ascent)
    return direction, jacobian @ direction, ascent @ direction, lambda u: u @ (precision * u)


@pytest.mark.parametrize("space", ["outputs", "weights"])
def test_steps_are_those_of_the_dense_hessian(problem, space, monkeypatch):
    """Half a step and then another one: the second begins outside of the span of P0^-1 J'."""
    model, prior, arrays = problem
    mean, options = np.asarray(ravel(model.network.params)), {"scale": SCALE, "microbatch": 4}
    if space == "outputs":
        newton = OutputNewton(model, prior, Kernel().of(model, prior), mean, **options)
    else:
        monkeypatch.setattr(newton_weights, "RESIDUAL", 1e-13)

        def inverse_at(there):
            return DenseStructure(np.zeros((len(mean), len(mean))))

        newton = WeightNewton(model, prior, inverse_at, mean, **options)
    draws = at_the_weights(model, prior)
    for length in (0.5, 1.0):
        expected = [expectations(model.likelihood, each) for each in draws]
        move = newton.move(at_sites(model, sites_of(model.likelihood, draws, by_samples=False)), expected)
        direction, images, decrement, form = dense_step(model, prior, arrays, mean, draws)
        found = np.concatenate([np.asarray(each) for each in move.images])[:11].reshape(-1, 3)
        np.testing.assert_allclose(found, images, atol=1e-8)
        np.testing.assert_allclose(move.decrement, decrement, rtol=1e-8)
        np.testing.assert_allclose(move.quadratic(0.3), form(mean + 0.3 * direction - prior.mean), rtol=1e-8)
        move.go(length)
        mean = mean + length * direction
        np.testing.assert_allclose(newton.mean(), mean, atol=1e-8)
        pairs = zip(draws, move.images, strict=True)
        draws = [each._replace(mean=each.mean + length * by) for each, by in pairs]


def test_a_step_that_is_not_finite_is_none(problem):
    model, prior, _ = problem
    mean = np.asarray(ravel(model.network.params))
    newton = OutputNewton(model, prior, Kernel().of(model, prior), mean, scale=1.0, microbatch=4)
    draws = at_the_weights(model, prior)
    expected = [expectations(model.likelihood, each) for each in draws]
    expected[0] = expected[0]._replace(residuals=jnp.full_like(expected[0].residuals, jnp.inf))
    with np.errstate(invalid="ignore"):  # as a fit does
        move = newton.move(at_sites(model, sites_of(model.likelihood, draws, by_samples=False)), expected)
    assert not move.decrement > 0
    np.testing.assert_allclose(newton.mean(), mean)


def test_the_space_of_the_outputs_is_for_few_of_them(problem, monkeypatch):
    """Sites that are samples have no factor, and many outputs have a large matrix."""
    model, _, _ = problem
    assert newton_outputs.is_for(model, num_pairs=64)
    assert not newton_outputs.is_for(model, num_pairs=1)
    assert not newton_outputs.is_for(model._replace(rows=None), num_pairs=64)
    monkeypatch.setattr(newton_outputs, "MOST_OUTPUTS", 2 * 6 * 4 * 3 - 1)
    assert not newton_outputs.is_for(model, num_pairs=64)
