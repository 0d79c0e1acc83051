"""Kronecker factors against factors and blocks from explicit sums, and their posterior against the dense one."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import two_layers, usual

import bnnlaplace
from bnnlaplace import checkpoint
from bnnlaplace.core.tree import leaf_names, ravel
from bnnlaplace.curvature import dense, kronecker, tapped
from bnnlaplace.curvature.jacobian import jacobian
from bnnlaplace.structure import CovarianceStructure, DenseStructure
from bnnlaplace.structure.blocks import FilterBlock, KroneckerBlock
from bnnlaplace.structure.kronecker import KroneckerStructure

RNG = np.random.default_rng(0)
DELTA = 0.7
LIKELIHOODS = {
    "classification": (bnnlaplace.categorical, 1),
    "regression": (lambda: bnnlaplace.gaussian(0.4), 0.5),
    "binary": (bnnlaplace.bernoulli, 1.0),
}


def mlp_network():
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}
    return bnnlaplace.Network.from_function(two_layers, {k: RNG.normal(size=shape) for k, shape in shapes.items()})


def fit_kronecker(network, likelihood, inputs, scale):
    return KroneckerStructure.fit(fitted(network, likelihood, inputs, scale=scale, microbatch=8))


def hessians(likelihood, outputs, target):
    """Lambda of every example and position, by autodiff of -log p."""
    flat = outputs.reshape(-1, outputs.shape[-1])
    kind = jnp.full(flat.shape[1:], target) if likelihood.target_kind == "array" else jnp.asarray(target)
    found = jax.jit(jax.vmap(jax.hessian(lambda f: -likelihood.log_prob(f, kind))))(flat)
    return np.asarray(found).reshape(*outputs.shape, outputs.shape[-1])


def output_moment(jacobian, curvatures):
    """sum J' Lambda J over all outputs, for any Jacobian of them."""
    classes = curvatures.shape[-1]
    rows = np.asarray(jacobian).reshape(curvatures.size // classes**2, classes, -1)
    return np.einsum("ncp,ncd,ndq->pq", rows, curvatures.reshape(-1, classes, classes), rows)


def matrix_of(block):
    """A block of a structure as a matrix of weights."""
    vectors = np.asarray(block.rotated_back(jnp.eye(block.size)))
    return vectors.T @ np.diag(block.eigenvalues) @ vectors


def fitted(network, likelihood, inputs, **options):
    """Compiled, as it is used."""
    run = jax.jit(lambda n, x: kronecker.factors(n, likelihood, n.params, x, **options))
    return run(network, inputs)


@pytest.mark.parametrize(
    ("positions", "name"), usual([((), "binary"), ((2,), "classification")], ((), (2,)), LIKELIHOODS)
)
def test_two_layers(name, positions, x64):
    network, (make, target) = mlp_network(), LIKELIHOODS[name]
    likelihood, params = make(), network.params
    params = jax.tree.map(np.asarray, params)
    inputs = RNG.normal(size=(5, *positions, 4))
    hidden = np.tanh(inputs @ params["w1"] + params["b1"])
    outputs = hidden @ params["w2"] + params["b2"]
    curved = hessians(likelihood, outputs, target)
    # Outputs depend on what their own position holds alone: a Jacobian for each.
    before = np.einsum("oc,...o->...co", params["w2"], 1 - hidden**2)
    first = sum(b.T @ h @ b for b, h in zip(before.reshape(-1, 3, 5), curved.reshape(-1, 3, 3), strict=True))
    second = curved.reshape(-1, 3, 3).sum(axis=0)
    count = inputs[..., 0].size
    moments = [np.einsum("ni,nj->ij", a, a) for a in (inputs.reshape(-1, 4), hidden.reshape(-1, 5))]
    sums = fitted(network, likelihood, inputs, scale=2.5, microbatch=2, shared_weights="expand")
    structure = KroneckerStructure.fit(sums)
    jacobian = jax.jit(jax.jacfwd(lambda p: two_layers(p, inputs)))(params)
    expected = {
        "b1": output_moment(jacobian["b1"], curved),
        "b2": output_moment(jacobian["b2"], curved),
        "w1": np.kron(moments[0], first) / count,
        "w2": np.kron(moments[1], second) / count,
    }
    for leaf, block in zip(leaf_names(params), structure.blocks, strict=True):
        np.testing.assert_allclose(matrix_of(block), 2.5 * expected[leaf], rtol=1e-9, atol=1e-10, err_msg=leaf)


class Convolutions(nn.Module):
    """What enters each layer is sown, what leaves it perturbed; both cost nothing where they are not asked for."""

    @nn.compact
    def __call__(self, x):
        x = self.layer(nn.Conv(3, (3, 2), strides=2, padding=((1, 1), (0, 1)), name="conv"), x)
        x = nn.BatchNorm(use_running_average=True, name="batch_norm")(jnp.tanh(x))
        x = nn.Conv(3, (3, 3), feature_group_count=3, name="depthwise")(x)
        x = x + self.layer(nn.DenseGeneral((2, 2), name="heads"), x).sum(axis=(-1, -2))[..., None]
        x = nn.LayerNorm(name="norm")(x).reshape(x.shape[0], -1)
        return self.layer(nn.Dense(2, name="head"), x)

    def layer(self, module, x):
        self.sow("intermediates", f"into_{module.name}", x)
        return self.perturb(f"from_{module.name}", module(x))


def window_moment(images):
    """sum a a' over 3 x 2 windows at stride 2 of padded images, one after another."""
    padded = np.pad(images, ((0, 0), (1, 1), (0, 1), (0, 0)))
    windows = [
        image[i : i + 3, j : j + 2].reshape(-1)
        for image in padded
        for i in range(0, padded.shape[1] - 2, 2)
        for j in range(0, padded.shape[2] - 1, 2)
    ]
    return sum(np.outer(window, window) for window in windows), len(windows)


@pytest.fixture(scope="module")
def convolutions():
    with jax.enable_x64(True):
        inputs = jnp.asarray(RNG.normal(size=(3, 5, 4, 2)))
        variables = jax.jit(Convolutions().init)(jax.random.key(0), inputs)
        variables = jax.tree.map(lambda leaf: jnp.asarray(0.3 + 0.4 * RNG.random(leaf.shape)), variables)
        perturbations = jax.tree.map(jnp.zeros_like, variables.pop("perturbations"))
        network = bnnlaplace.Network.from_linen(Convolutions(), variables)
        sums = fitted(network, bnnlaplace.categorical(), inputs, microbatch=2, shared_weights="expand")
        yield network, variables, perturbations, inputs, sums


def test_convolutions(convolutions, x64):
    network, variables, perturbations, inputs, sums = convolutions
    apply = jax.jit(lambda variables: Convolutions().apply(variables, inputs, mutable=["intermediates"]))
    outputs, state = apply(variables)
    curved = hessians(bnnlaplace.categorical(), outputs, 1)

    def disturbed(params, perturbations):
        return Convolutions().apply({**variables, "params": params, "perturbations": perturbations}, inputs)

    jacobians, layers = jax.jit(jax.jacrev(disturbed, argnums=(0, 1)))(variables["params"], perturbations)
    structure, names = KroneckerStructure.fit(sums), leaf_names(network.params)
    blocks = dict(zip(names, structure.blocks, strict=True))
    for layer in ("conv", "heads", "head"):
        entering = np.asarray(state["intermediates"][f"into_{layer}"][0])
        if layer == "conv":
            moment, count = window_moment(entering)
        else:
            rows = entering.reshape(-1, entering.shape[-1])
            moment, count = rows.T @ rows, len(rows)
        width = 4 if layer == "heads" else perturbations[f"from_{layer}"].shape[-1]
        jacobian = np.asarray(layers[f"from_{layer}"]).reshape(3, 2, -1, width)  # examples, classes, any place, outputs
        outgoing = np.einsum("nctp,ncd,ndtq->pq", jacobian, curved, jacobian)
        found = blocks[f"{layer}/kernel"]
        assert isinstance(found, KroneckerBlock)
        np.testing.assert_allclose(matrix_of(found), np.kron(moment, outgoing) / count, rtol=1e-8, atol=1e-11)
    for (keys, jacobian), name in zip(jax.tree_util.tree_leaves_with_path(jacobians), names, strict=True):
        block = blocks[name]
        if isinstance(block, KroneckerBlock):
            continue
        exact = output_moment(jacobian, curved)
        last = np.arange(block.size) % len(block.values)  # the filter that a weight belongs to
        exact = exact * (last[:, None] == last)
        assert isinstance(block, FilterBlock), keys
        np.testing.assert_allclose(matrix_of(block), exact, rtol=1e-8, atol=1e-11, err_msg=name)
    assert blocks["depthwise/kernel"].values.shape == (1, 27)  # one block, as it is small


def test_sums_add_up(convolutions, x64):
    network, _, _, inputs, sums = convolutions
    likelihood = bnnlaplace.categorical()
    counted = jnp.array([1.0, 1.0, 0.0])
    options = {"microbatch": 2, "shared_weights": "expand"}
    run = jax.jit(lambda w: kronecker.factors(network, likelihood, network.params, inputs, weights=w, **options))
    halves = jax.tree.map(jnp.add, run(counted), run(1 - counted))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), halves, sums)
    alone = jax.tree.leaves(run(counted))
    assert all(np.abs(a - b).max() > 0 for a, b in zip(alone, jax.tree.leaves(sums), strict=True))


@pytest.fixture(scope="module")
def single():
    """One example of one position: every block is exact. The second weight is stored output first."""

    def outputs(params, x):
        hidden = jnp.tanh(x @ params["w1"] + params["b1"])
        return hidden @ params["w2"].T + params["b2"][0]

    with jax.enable_x64(True):
        shapes = {"b1": (5,), "b2": (1, 3), "w1": (4, 5), "w2": (3, 5)}
        network = bnnlaplace.Network.from_function(outputs, {k: RNG.normal(size=shape) for k, shape in shapes.items()})
        inputs, likelihood = RNG.normal(size=(1, 4)), bnnlaplace.categorical()
        structure = fit_kronecker(network, likelihood, inputs, 2.5)
        matrix = jax.jit(lambda params: dense.ggn(network, likelihood, params, inputs, scale=2.5))(network.params)
        matrix = np.asarray(matrix)
        label = np.repeat([0, 1, 2, 3], [5, 3, 20, 15])
        yield structure, matrix * (label[:, None] == label), network, inputs


def test_posterior_of_exact_blocks(single, x64):
    structure, matrix, network, inputs = single
    reference = DenseStructure.fit(jnp.asarray(matrix))
    assert isinstance(structure, CovarianceStructure)
    passed = tapped.forward(network, network.params, RNG.normal(size=(2, 4)))
    derivatives = jacobian(passed, np.arange(3)[None])
    vector = RNG.normal(size=len(matrix))
    groups = np.repeat([0, 1, 2, 3], [5, 3, 20, 15])
    relative = np.array([0.5, 2.0, 3.0, 0.2])[groups]
    root = relative**-0.5
    whitened = DenseStructure.fit(jnp.asarray(root[:, None] * matrix * root))
    for found, expected in ((structure, reference), (structure.whitened(relative), whitened)):
        np.testing.assert_allclose(found.log_determinant(DELTA), expected.log_determinant(DELTA), rtol=1e-10)
        np.testing.assert_allclose(found.truncation(DELTA), [0.0])
        np.testing.assert_allclose(
            found.effective_parameters(DELTA, groups), expected.effective_parameters(DELTA, groups), rtol=1e-9
        )
        np.testing.assert_allclose(found.scaled(2.0).log_determinant(2 * DELTA), found.log_determinant(DELTA))
        np.testing.assert_allclose(
            found.inverse_quadratic_form(vector, DELTA), expected.inverse_quadratic_form(vector, DELTA), rtol=1e-10
        )
        variance = jax.jit(lambda s, d: s.output_covariance([d])(derivatives))(found, DELTA)
        np.testing.assert_allclose(variance, expected.output_covariance([DELTA])(derivatives), rtol=1e-9)


def test_precisions_within_an_array_are_refused(single, x64):
    structure, _, _, _ = single
    with pytest.raises(ValueError, match="must have one prior precision for all weights of an array"):
        structure.whitened(jnp.linspace(1, 2, 43))
    with pytest.raises(ValueError, match="all weights of an array in one group"):
        structure.effective_parameters(DELTA, np.arange(43))


@pytest.mark.parametrize("seed", usual([1], [1, 2, 3]))
def test_samples(single, seed, x64):
    structure, matrix, _, _ = single
    count, delta = 4000, 0.7
    draws = np.asarray(structure.samples(jax.random.key(seed), count, delta))
    # In the coordinates in which they should be independent: every entry of the covariance within 4.5 deviations,
    # which one of 43 x 44 / 2 exceeds once in 150 times.
    values, vectors = np.linalg.eigh(matrix)
    standard = draws @ vectors * np.sqrt(np.maximum(values, 0) + delta)
    error = standard.T @ standard / count - np.eye(len(matrix))
    assert np.abs(error / np.sqrt((1 + np.eye(len(matrix))) / count)).max() < 4.5


def test_through_a_checkpoint(single, tmp_path, x64):
    structure, _, _, _ = single
    checkpoint.save_pytree(tmp_path / "structure", {"structure": structure}, {})
    stored, _ = checkpoint.load_pytree(tmp_path / "structure")
    again = KroneckerStructure.from_arrays(stored["structure"])
    assert jax.tree.structure(again) == jax.tree.structure(structure)
    key = jax.random.key(0)
    np.testing.assert_array_equal(again.samples(key, 2, DELTA), structure.samples(key, 2, DELTA))


def test_large_weights_have_less(x64):
    params = {"long": np.ones(1100), "short": np.ones((3, 2)), "table": np.ones((600, 2)), "tall": np.ones((70, 2))}

    def outputs(params, x):
        # Products with numbers, not of matrices.
        table = sum((params[name] * x[:, :1, None]).sum(axis=1) for name in ("short", "table", "tall"))
        return table + (params["long"] * x[:, :1]).sum(axis=1, keepdims=True)

    network = bnnlaplace.Network.from_function(outputs, params)
    sums = kronecker.factors(network, bnnlaplace.bernoulli(), network.params, RNG.normal(size=(2, 2)))
    shapes = [leaf.shape for leaf in jax.tree.leaves(sums)]
    assert shapes == [(1100,), (1, 6, 6), (1200,), (2, 70, 70)]


def test_subset_and_single_precision():
    whole = mlp_network()
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), whole.params)
    network = whole.with_params(params).subset(lambda path: path in ("w2", "b2"))
    x = np.asarray(RNG.normal(size=(5, 4)), np.float32)
    structure = fit_kronecker(network, bnnlaplace.categorical(), x, 1.0)
    assert {leaf.dtype for leaf in jax.tree.leaves(structure)} == {jnp.dtype("float32")}
    assert structure.samples(jax.random.key(0), 2, DELTA).shape == (2, ravel(network.params).size)


def test_kernels_of_one_number():
    shapes = {"a": (3, 1), "b": (1, 1), "c": (1, 3)}
    params = {name: jnp.full(shape, 0.3) for name, shape in shapes.items()}
    network = bnnlaplace.Network.from_function(lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"], params)
    x, y = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32), np.arange(9) % 3
    la = bnnlaplace.Laplace(network, hessian_structure="kron").fit((x, y))
    assert [block.size for block in la.structure.blocks] == [3, 1, 3]
    full = bnnlaplace.Laplace(network, hessian_structure="full").fit((x, y))
    np.testing.assert_allclose(la.log_marginal_likelihood().mean, full.log_marginal_likelihood().mean, atol=0.5)
