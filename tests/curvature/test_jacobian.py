"""Jacobians as factors against those in forward mode, and covariances that structures make of them against matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from problems import random_problem
from test_layers import CASES, at_random

import bnnlaplace
from bnnlaplace.core.tree import leaf_names, size
from bnnlaplace.curvature import jacobian, tapped
from bnnlaplace.curvature.layers import find
from bnnlaplace.fitting.fit import batch_curvature, exact_structure
from bnnlaplace.model.data import Batch
from bnnlaplace.structure import DenseStructure, DiagonalStructure, SpectralStructure

RNG = np.random.default_rng(0)
GRID = [0.3, 20.0]


def derivatives(network, inputs, numbers):
    passed = tapped.forward(network, network.params, inputs)
    return jacobian.jacobian(passed, numbers)


@pytest.fixture(scope="module", params=["convolutions", "transformer", "recurrent", "products", "shared"])
def case(request):
    """A network, its inputs, groups of two outputs of which the last is none, and the rows of its Jacobian."""
    make, shape, _ = CASES[request.param]
    with jax.enable_x64(True):
        network, inputs = at_random(make()), jnp.asarray(RNG.normal(size=shape))
        flat, unravel = jax.flatten_util.ravel_pytree(network.params)

        def forward(p, x):
            return network(unravel(p), x[None])[0].reshape(-1)

        rows = np.asarray(jax.jit(jax.vmap(jax.jacfwd(forward), in_axes=(None, 0)))(flat, inputs))
        count = rows.shape[1]
        numbers = np.array([[count - 1, 0], [1, count]])
        chosen = np.concatenate([rows, np.zeros_like(rows[:, :1])], axis=1)[:, numbers]
        found = jax.jit(lambda n, x: [leaf[:2] for leaf in derivatives(n, x, numbers).leaves])(network, inputs)
        layers = find(network, inputs).layers
        layouts = [layers[leaf].layout if leaf in layers else None for leaf in range(len(found))]
        factors = [jacobian.LeafJacobian(*arrays, held) for arrays, held in zip(found, layouts, strict=True)]
        yield network, inputs, rows, chosen, jacobian.Jacobian(factors)


def test_rows(case, x64):
    network, inputs, rows, chosen, found = case
    np.testing.assert_allclose(found.rows(), chosen, rtol=1e-9, atol=1e-11)
    assert sum(found.sizes) == size(network.params)
    counted = jacobian.size_of_jacobian(network, inputs)
    held = sum(leaf.inputs.size for leaf in found.leaves if leaf.inputs is not None)
    assert counted.example == held / len(inputs)
    formed = [0 if leaf.is_single else (2 if leaf.inputs is not None else 1) * leaf.size for leaf in found.leaves]
    held = sum(leaf.derivatives.size for leaf in found.leaves) / (4 * len(inputs))
    assert counted.output == held + sum(formed)
    single = [leaf for leaf in found.leaves if leaf.is_single]
    assert counted.layers == tuple((leaf.inputs.shape[-1], leaf.derivatives.shape[-1]) for leaf in single)


@pytest.mark.parametrize("missing", [0, 1, 7])
def test_products(case, missing, x64):
    _, _, _, chosen, found = case
    number = chosen.shape[-1]
    matrix = np.concatenate([RNG.normal(size=(number - missing, 3)), np.zeros((missing, 3))])
    expected = chosen @ matrix
    np.testing.assert_allclose(found.times(matrix[: number - missing]), expected, rtol=1e-9, atol=1e-10)


def relatives(network, *, by_leaf):
    """One number for each weight, or for each leaf."""
    draw = (
        (lambda leaf: np.full(leaf.size, RNG.uniform(0.5, 2)))
        if by_leaf
        else (lambda leaf: RNG.uniform(0.5, 2, leaf.size))
    )
    return jnp.asarray(np.concatenate([draw(leaf) for leaf in jax.tree.leaves(network.params)]))


def expected_covariances(rows, curvature, relative):
    """J D^-1/2 (G + delta I)^-1 D^-1/2 J' in the coordinates of G."""
    scaled = rows if relative is None else rows / np.sqrt(relative)
    identity = np.eye(len(curvature))
    return np.stack(
        [np.einsum("mucp,pq,mudq->mucd", scaled, np.linalg.inv(curvature + d * identity), scaled) for d in GRID]
    )


def structures(rows):
    """Each with the matrix that it stands for."""
    number = rows.shape[-1]
    root = RNG.normal(size=(5, number))
    diagonal = RNG.uniform(0, 3, number)
    yield DiagonalStructure(jnp.asarray(diagonal)), np.diag(diagonal)
    yield DenseStructure(jnp.asarray(root.T @ root)), root.T @ root
    many = DenseStructure(jnp.asarray(root.T @ root))
    many.output_covariance(np.linspace(1, 2, 6))  # from now on by eigenvectors
    yield many, root.T @ root
    yield SpectralStructure.fit(jnp.asarray(root)), root.T @ root


@pytest.mark.parametrize("with_relative", [False, True])
def test_covariances(case, with_relative, x64):
    network, _, rows, chosen, found = case
    relative = relatives(network, by_leaf=False) if with_relative else None
    for structure, matrix in structures(rows):
        covariance = structure.output_covariance(GRID, relative)
        expected = expected_covariances(chosen, matrix, relative)
        np.testing.assert_allclose(covariance(found), expected, rtol=1e-8, atol=1e-9, err_msg=type(structure).__name__)


@pytest.mark.parametrize("with_relative", [False, True])
def test_kronecker_covariances(case, with_relative, x64):
    network, inputs, _, chosen, found = case
    relative = relatives(network, by_leaf=True) if with_relative else None
    likelihood = bnnlaplace.gaussian(1.0)
    batch = Batch(inputs, None, jnp.ones(len(inputs)))
    structure = exact_structure(
        "kron", batch_curvature("kron", network, likelihood, batch, microbatch=2), 1.5
    )
    # The matrix from its action on unit vectors, which is tested elsewhere: rotated, times eigenvalues, rotated back.
    identity = np.eye(chosen.shape[-1])
    parts = [block.rotated_back(block.eigenvalues * block.rotated(part)) for block, part in structure._parts(identity)]
    matrix = np.concatenate(parts, axis=-1)
    covariance = structure.output_covariance(GRID, relative)(found)
    np.testing.assert_allclose(covariance, expected_covariances(chosen, matrix, relative), rtol=1e-8, atol=1e-9)


def test_a_linearised_network_has_the_jacobian_of_its_centre(x64):
    """And the same layers, so that its Kronecker structure is one."""
    make, shape, expected = CASES["products"]
    network = at_random(make())
    moved = network.linearised().with_params(jax.tree.map(lambda leaf: leaf + 1.0, network.params))
    inputs, numbers = RNG.normal(size=shape), np.arange(3)[:, None]
    plain, linear = (derivatives(n, inputs, numbers) for n in (network, moved))
    jax.tree.map(np.testing.assert_array_equal, plain.rows(), linear.rows())
    passed = tapped.forward(moved, moved.params, inputs)
    names = leaf_names(network.params)
    assert {names[leaf]: layer.positions for leaf, layer in passed.weights.layers.items()} == expected
    np.testing.assert_allclose(passed.outputs, moved(moved.params, inputs))
    assert np.abs(passed.outputs - network(network.params, inputs)).max() > 1


@pytest.mark.parametrize("structure", ["diag", "kron", "full", "lanczos"])
def test_variances_have_derivatives_in_the_inputs(structure, x64):
    """Also at zero, where what a layer multiplies vanishes; against central differences."""
    problem = random_problem(bnnlaplace.categorical(), np.arange(8) % 3)
    la = bnnlaplace.Laplace(problem.network, hessian_structure=structure).fit((problem.inputs, problem.targets))
    for summary in (lambda x: jnp.sum(la.functional_variance(x)), lambda x: jnp.sum(la.predictive(x)[:, 0])):
        at, step = jnp.zeros((2, 4)), jnp.zeros((2, 4)).at[1, 2].set(1e-5)
        found = jax.grad(summary)(at)
        np.testing.assert_allclose(found[1, 2], (summary(at + step) - summary(at - step)) / 2e-5, rtol=1e-6)
        assert jnp.isfinite(found).all()
