"""The objective of training by the evidence, against dense determinants differentiated by autodiff."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace.core.tree import as_vector, leaf_names, ravel
from bnnlaplace.curvature import dense
from bnnlaplace.marglik import EvidenceOptions, log_precision_of, negative_log_evidence, precision_of, prior_update
from bnnlaplace.prior import by_layer, group_names
from training.models.van import VAN, VANVariant

TINY = VANVariant((2,), (1,), (1,), 3, 2, (4, 4, 1))
NUM_DATA = 20


def tiny_van():
    """A Visual Attention Network of 251 weights in double precision, away from its initialisation, with two batches."""
    module = VAN.from_variant(TINY, 3)
    x = jax.random.normal(jax.random.key(0), (9, 4, 4, 1))
    variables = jax.jit(lambda: module.init(jax.random.key(1), x[:1]))()
    network = bnnlaplace.Network.from_linen(module, jax.tree.map(jnp.float64, variables), train=False)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: leaf + 0.3 * rng.normal(size=leaf.shape), network.params)
    labels = jnp.arange(9) % 3
    return network.with_params(params), (x[:5], labels[:5]), (x[5:], labels[5:])


def dense_objective(network, params, log_precision, batch, curvature_batch):
    """The objective by dense matrices alone: likelihood of one batch, GGN of the other, both scaled to 20 images."""
    if isinstance(log_precision, dict):
        leaves = [jnp.exp(log_precision[by_layer(name)]) for name in leaf_names(params)]
        delta = as_vector(jax.tree.unflatten(jax.tree.structure(params), leaves), params)
    else:
        delta = jnp.full(ravel(params).shape, jnp.exp(log_precision))
    log_probs = jax.nn.log_softmax(network(params, batch[0]))[jnp.arange(len(batch[1])), batch[1]]
    value = -NUM_DATA / len(batch[1]) * log_probs.sum() + 0.5 * jnp.sum(delta * ravel(params) ** 2)
    scale = NUM_DATA / len(curvature_batch[1])
    matrix = dense.ggn(network, bnnlaplace.categorical(), params, curvature_batch[0], scale=scale)
    return value + 0.5 * jnp.linalg.slogdet(jnp.eye(len(delta)) + matrix / jnp.sqrt(jnp.outer(delta, delta)))[1]


def close(got, wanted, rtol):
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(wanted))
    for one, other in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=rtol, atol=rtol * largest)


@pytest.mark.exhaustive  # smaller networks are compared below, and the determinant by the tests of the evidence
def test_the_gradient_on_a_tiny_van_is_that_of_dense_algebra_and_without_the_determinant_it_is_not(x64):
    network, batch, curvature_batch = tiny_van()
    names = group_names(network.params, by_layer)
    log_precision = {name: jnp.asarray(0.1 * number - 0.5) for number, name in enumerate(names)}
    # The rows of sqrt(n) I give the exact trace, and 12 steps exhaust the space of 4 images with 3 classes.
    rows, options = jnp.sqrt(12.0) * jnp.eye(12), EvidenceOptions(num_matvecs=12)
    model = {"network": network, "likelihood": bnnlaplace.categorical(), "num_data": NUM_DATA, "options": options}

    def ours(params, log_precision):
        return negative_log_evidence(params, log_precision, batch, curvature_batch, rows, **model)[0]

    def exact(params, log_precision):
        return dense_objective(network, params, log_precision, batch, curvature_batch)

    arguments = network.params, log_precision
    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(*arguments)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(exact, (0, 1)))(*arguments)
    np.testing.assert_allclose(value, wanted, rtol=1e-10)
    close(gradients, wanted_gradients, 1e-5)
    options = {**model, "log_determinant": False}
    without = jax.grad(
        lambda *weights: negative_log_evidence(*weights, batch, curvature_batch, rows, **options)[0], (0, 1)
    )(*arguments)
    for with_it, without_it in zip(gradients, without, strict=True):  # in the weights, and in the prior precisions
        assert jnp.linalg.norm(ravel(with_it) - ravel(without_it)) > 0.05 * jnp.linalg.norm(ravel(with_it))


@pytest.mark.parametrize("structure", usual(["layerwise"], ["scalar", "layerwise"]))
def test_the_diagonal_is_differentiated_exactly(classification, structure):
    network, batch = classification.network, (classification.inputs, classification.targets)
    log_precision = log_precision_of(0.7, network.params, structure)
    model = {"network": network, "likelihood": classification.likelihood, "num_data": 33}
    model["options"] = EvidenceOptions("diag")

    def ours(params, log_precision):
        return negative_log_evidence(params, log_precision, batch, batch, jax.random.key(0), **model)[0]

    def exact(params, log_precision):
        scale = 33 / len(batch[1])
        diagonal = jnp.diag(dense.ggn(network, classification.likelihood, params, batch[0], scale=scale))
        log_likelihood = scale * jnp.sum(classification.likelihood.log_prob(network(params, batch[0]), batch[1]))
        if structure == "layerwise":
            delta = as_vector({name: jnp.exp(log_precision[name]) for name in params}, params)
        else:
            delta = jnp.exp(log_precision)
        quadratic_form = jnp.sum(delta * ravel(params) ** 2)
        return -log_likelihood + 0.5 * quadratic_form + 0.5 * jnp.sum(jnp.log1p(diagonal / delta))

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(network.params, log_precision)
    wanted, wanted_gradients = jax.jit(jax.value_and_grad(exact, (0, 1)))(network.params, log_precision)
    np.testing.assert_allclose(value, wanted, rtol=1e-10)
    close(gradients, wanted_gradients, 1e-8)


@pytest.mark.parametrize(
    ("structure", "hessian_structure"),
    usual([("layerwise", "lanczos")], ("scalar", "layerwise"), ("lanczos", "diag")),
)
def test_updates_of_the_prior_end_at_the_maximum_of_the_evidence(classification, structure, hessian_structure):
    """Against the front object, whose optimum is found by another algorithm from dense curvature."""
    network, data = classification.network, (classification.inputs, classification.targets)
    # Depth 25 exceeds the rank of the GGN, 22, and the rows of sqrt(n) I give the exact trace.
    options, rows = EvidenceOptions(hessian_structure, num_matvecs=25, microbatch=32), jnp.sqrt(43.0) * jnp.eye(43)
    model = {"network": network, "likelihood": classification.likelihood, "num_data": len(data[1]), "options": options}
    update = jax.jit(lambda log: prior_update(network.params, log, data, rows, **model))
    log_precision = log_precision_of(1.0, network.params, structure)
    for _ in range(20 if (structure, hessian_structure) == ("layerwise", "lanczos") else 2):
        log_precision, effective, evidence = update(log_precision)
    exact = bnnlaplace.Laplace(
        network, hessian_structure="full" if hessian_structure == "lanczos" else "diag", prior_precision=1.0
    ).fit(data)
    exact = exact.optimize_prior_precision(prior_structure=structure)
    found = precision_of(log_precision)
    assert jax.tree.structure(found) == jax.tree.structure(exact.prior_precision)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(exact.prior_precision), strict=True):
        assert one == pytest.approx(other, rel=2e-3)
    assert evidence.mean == pytest.approx(exact.log_marginal_likelihood().mean, abs=1e-3)
    assert effective == pytest.approx(exact.effective_parameters(), rel=1e-3)
