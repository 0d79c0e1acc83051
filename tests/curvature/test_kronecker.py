"""Kronecker factors of weights that an example uses several times, against sums over dense Jacobians."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import exhaustive, usual

import bnnlaplace
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.curvature import kronecker
from bnnlaplace.structure import KroneckerStructure

RNG = np.random.default_rng(0)
EXAMPLES, INPUTS, OUTPUTS = 5, 12, 11  # 132 numbers, more than have an exact block


def function(outputs, **shapes):
    """A function of weights drawn at random."""
    params = {name: 0.4 * RNG.normal(size=shape) for name, shape in shapes.items()}
    return bnnlaplace.Network.from_function(outputs, params)


def exact_block(network, likelihood, inputs, leaf):
    """The block of G of one leaf, (*shape, *shape), from a Jacobian in forward mode."""
    jacobian = oracles.jacobian(network, network.params, inputs)
    classes = jacobian.shape[-2]
    outputs = np.asarray(network(network.params, inputs)).reshape(-1, classes)
    start = sum(value.size for name, value in network.params.items() if name < leaf)
    shape, size = network.params[leaf].shape, network.params[leaf].size
    part = jacobian[..., start : start + size].reshape(-1, classes, size)
    return oracles.ggn(part, oracles.output_curvature(likelihood, outputs)).reshape(*shape, *shape)


def sums(network, likelihood, inputs, **options):
    """Compiled, as it is used, by the names of the leaves."""
    run = jax.jit(lambda n, x: kronecker.factors(n, likelihood, n.params, x, **options))
    return dict(zip(leaf_names(network.params), run(network, inputs), strict=True))


def block(leaf):
    """The block that sums stand for, as a matrix."""
    if isinstance(leaf, kronecker.LayerSums):
        return np.kron(leaf.inputs, leaf.outputs) / leaf.count
    (matrix,) = leaf.blocks
    return matrix


def partial_traces(exact):
    """The Kronecker product of both partial traces of a block, divided by its trace."""
    rows, columns = np.einsum("iojo->ij", exact), np.einsum("ioip->op", exact)
    return np.kron(rows, columns) / np.trace(rows)


def pooled(params, x):
    return jnp.tanh(x @ params["w"]).mean(axis=1) @ params["head"]


# Few positions are multiplied with one another, for many the matrices of derivatives are formed.
@pytest.mark.parametrize("positions", usual([3], [3, 16]))
def test_partial_traces(positions, x64):
    network = function(pooled, w=(INPUTS, OUTPUTS), head=(OUTPUTS, 3))
    likelihood, inputs = bnnlaplace.categorical(), RNG.normal(size=(EXAMPLES, positions, INPUTS))
    found = sums(network, likelihood, inputs, scale=2.5, microbatch=2)["w"]
    exact = exact_block(network, likelihood, inputs, "w")
    np.testing.assert_allclose(block(found), 2.5 * partial_traces(exact), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(np.trace(block(found)), 2.5 * np.einsum("ioio->", exact), rtol=1e-9)


def test_sums_over_positions(x64):
    network = function(pooled, w=(INPUTS, OUTPUTS), head=(OUTPUTS, 3))
    likelihood, inputs = bnnlaplace.categorical(), RNG.normal(size=(EXAMPLES, 3, INPUTS))
    found = sums(network, likelihood, inputs, scale=2.5, microbatch=2, shared_weights="reduce")
    hidden = 1 - np.tanh(inputs @ np.asarray(network.params["w"])) ** 2
    summed = np.einsum("nto,oc->nco", hidden / 3, network.params["head"])
    curved = oracles.output_curvature(likelihood, network(network.params, inputs))
    factors = inputs.sum(axis=1), np.einsum("nco,ncd,ndp->op", summed, curved, summed)
    expected = 2.5 * np.kron(factors[0].T @ factors[0], factors[1]) / (EXAMPLES * 3**2)
    np.testing.assert_allclose(block(found["w"]), expected, rtol=1e-9, atol=1e-12)
    # A layer that is used once has the same factors whatever is chosen.
    other = sums(network, likelihood, inputs, scale=2.5, microbatch=2)
    np.testing.assert_allclose(block(found["head"]), block(other["head"]), rtol=1e-12)


@pytest.mark.parametrize(
    ("outputs", "choice", "wrong"),
    [
        (lambda params, x: x @ params["w"], "expand", "reduce"),
        (lambda params, x: (x @ params["w"]).mean(axis=1), "reduce", "expand"),
        exhaustive(lambda params, x: (x @ params["w"]).sum(axis=1), "reduce", "expand"),
    ],
)
def test_linear_networks_have_exact_blocks(outputs, choice, wrong, x64):
    network, likelihood = function(outputs, w=(INPUTS, OUTPUTS)), bnnlaplace.gaussian(0.4)
    inputs = RNG.normal(size=(EXAMPLES, 4, INPUTS)) + 0.5
    expected = exact_block(network, likelihood, inputs, "w").reshape(INPUTS * OUTPUTS, -1)
    for name in ("partial_traces", choice):
        found = sums(network, likelihood, inputs, shared_weights=name, microbatch=2)["w"]
        np.testing.assert_allclose(block(found), expected, rtol=1e-9, atol=1e-9, err_msg=name)
    found = block(sums(network, likelihood, inputs, shared_weights=wrong, microbatch=2)["w"])
    assert np.abs(found - expected).max() > 0.1 * np.abs(expected).max()


def tied(params, tokens):
    """A table of embeddings that is the output layer, too."""
    x = params["table"][tokens]
    return jnp.tanh(x + x.mean(axis=1, keepdims=True) + params["bias"]) @ params["table"].T


def by_scan(params, x):
    """A kernel of 12 x 12 within a loop over time."""

    def step(h, a):
        return jnp.tanh(a + h @ params["kernel"]), None

    return jax.lax.scan(step, jnp.zeros((len(x), 12)), jnp.swapaxes(x, 0, 1))[0] @ params["head"]


@pytest.mark.parametrize(
    ("network", "leaf", "inputs"),
    [
        exhaustive(function(tied, table=(17, 8), bias=(8,)), "table", RNG.integers(0, 17, size=(4, 3))),
        (function(by_scan, kernel=(12, 12), head=(12, 2)), "kernel", RNG.normal(size=(4, 3, 12))),
    ],
)
def test_weights_of_several_uses_are_matrices(network, leaf, inputs, x64):
    network = network.with_params(jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), network.params))
    found = sums(network, bnnlaplace.categorical(), inputs, microbatch=2)[leaf]
    expected = partial_traces(exact_block(network, bnnlaplace.categorical(), inputs, leaf))
    np.testing.assert_allclose(block(found), expected, rtol=1e-9, atol=1e-12)


def test_small_weights_of_several_uses_have_exact_blocks(x64):
    network = function(tied, table=(6, 4), bias=(4,))
    likelihood, inputs = bnnlaplace.categorical(), RNG.integers(0, 6, size=(4, 3))
    expected = exact_block(network, likelihood, inputs, "table").reshape(24, 24)
    np.testing.assert_allclose(block(sums(network, likelihood, inputs)["table"]), expected, rtol=1e-9, atol=1e-12)


def test_depthwise_convolutions_have_a_block_for_each_channel():
    module = nn.Conv(20, (3, 3), feature_group_count=20)
    network = bnnlaplace.Network.from_linen(module, {"params": {"kernel": np.ones((3, 3, 1, 20)), "bias": np.ones(20)}})
    found = jax.eval_shape(lambda n, x: sums(n, bnnlaplace.gaussian(), x), network, np.ones((2, 4, 4, 20)))
    assert found["kernel"].blocks.shape == (20, 9, 9)


def test_sums_of_parts_add_up(x64):
    network = function(pooled, w=(INPUTS, OUTPUTS), head=(OUTPUTS, 3))
    likelihood, inputs = bnnlaplace.categorical(), RNG.normal(size=(EXAMPLES, 3, INPUTS))
    counted = np.array([1.0, 0.0, 1.0, 1.0, 0.0])
    options = {"microbatch": 2}
    parts = [sums(network, likelihood, inputs, weights=part, **options) for part in (counted, 1 - counted)]
    together, whole = jax.tree.map(jnp.add, *parts), sums(network, likelihood, inputs, **options)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), together, whole)


def test_a_weight_without_effect_has_no_curvature():
    network = function(lambda params, x: pooled(params, x) * 0, w=(INPUTS, OUTPUTS), head=(OUTPUTS, 3))
    inputs = RNG.normal(size=(EXAMPLES, 3, INPUTS))
    found = sums(network, bnnlaplace.categorical(), inputs)
    structure = KroneckerStructure.fit(list(found.values()))
    assert structure.log_determinant(1e-6) == 0


def test_other_choices_are_refused(unchecked_annotations):
    network = function(pooled, w=(INPUTS, OUTPUTS), head=(OUTPUTS, 3))
    with pytest.raises(ValueError, match="shared_weights=.* must be 'partial_traces', 'expand' or 'reduce'; got"):
        sums(network, bnnlaplace.categorical(), RNG.normal(size=(2, 3, INPUTS)), shared_weights="extend")
