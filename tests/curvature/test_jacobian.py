"""Jacobians as factors against those in forward mode, and covariances that structures make of them against matrices."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import NETWORKS, at_random, drawn, random_problem, usual

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


CASES = ["convolutions", "transformer", "recurrent", "products", "shared"]


@cache
def case(name):
    """A network, its inputs, groups of two outputs, and the rows of its Jacobian. Computed once in a run.

    The last index of the groups is past the outputs (padding).
    """
    network, inputs, rows = drawn(name)
    with jax.enable_x64(True):
        count = rows.shape[1]
        numbers = np.array([[count - 1, 0], [count // 2, count]])
        chosen = np.concatenate([rows, np.zeros_like(rows[:, :1])], axis=1)[:, numbers]
        arrays = jax.jit(lambda n, x: [leaf[:2] for leaf in derivatives(n, x, numbers).leaves])(network, inputs)
        layers = find(network, inputs).layers
        layouts = [layers[leaf].layout if leaf in layers else None for leaf in range(len(arrays))]
        leaves = [jacobian.LeafJacobian(*pair, layout) for pair, layout in zip(arrays, layouts, strict=True)]
        return network, inputs, rows, chosen, jacobian.Jacobian(leaves)


@pytest.mark.parametrize("name", CASES)
def test_rows(name, x64):
    network, inputs, rows, chosen, found = case(name)
    np.testing.assert_allclose(found.rows(), chosen, rtol=1e-9, atol=1e-11)
    assert sum(found.sizes) == size(network.params)
    counted = jacobian.size_of_jacobian(network, inputs)
    held = sum(leaf.inputs.size for leaf in found.leaves if leaf.inputs is not None)
    assert counted.example == held / len(inputs)
    shared = [leaf for leaf in found.leaves if len(leaf.derivatives) < len(inputs)]
    assert counted.shared == 2 * sum(leaf.derivatives.size for leaf in shared) / 4
    others = [leaf for leaf in found.leaves if len(leaf.derivatives) == len(inputs)]
    formed = [0 if leaf.is_single else (2 if leaf.inputs is not None else 1) * leaf.size for leaf in others]
    held = sum(leaf.derivatives.size for leaf in others) / (4 * len(inputs))
    assert counted.output == held + sum(formed)
    single = [leaf for leaf in found.leaves if leaf.is_single]
    assert counted.layers == tuple((leaf.inputs.shape[-1], leaf.derivatives.shape[-1]) for leaf in single)


@pytest.mark.parametrize("name", CASES)
def test_products(name, x64):
    """The product takes all rows of the matrix, or leaves out the last ones."""
    _, _, _, chosen, found = case(name)
    number = chosen.shape[-1]
    for missing in (0, 1, 7):
        matrix = np.concatenate([RNG.normal(size=(number - missing, 3)), np.zeros((missing, 3))])
        product = found.times(matrix[: number - missing])
        np.testing.assert_allclose(product, chosen @ matrix, rtol=1e-9, atol=1e-10, err_msg=f"{missing} rows missing")


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
    scaled = rows / np.sqrt(relative)
    identity = np.eye(len(curvature))
    inverses = np.stack([np.linalg.inv(curvature + d * identity) for d in GRID])
    return np.einsum("mucp,dpq,muwq->dmucw", scaled, inverses, scaled, optimize=True)


def structures(rows):
    """Yield each structure with the matrix that it represents."""
    number = rows.shape[-1]
    root = RNG.normal(size=(5, number))
    diagonal = RNG.uniform(0, 3, number)
    yield DiagonalStructure(jnp.asarray(diagonal)), np.diag(diagonal)
    yield DenseStructure(jnp.asarray(root.T @ root)), root.T @ root
    many = DenseStructure(jnp.asarray(root.T @ root))
    many.output_covariance(np.linspace(1, 2, 6))  # from now on by eigenvectors
    yield many, root.T @ root
    yield SpectralStructure.fit(jnp.asarray(root)), root.T @ root


@pytest.mark.parametrize(
    ("name", "with_relative"),
    usual([("convolutions", False), ("products", True)], CASES, (False, True)),
)
def test_covariances(name, with_relative, x64):
    network, _, rows, chosen, found = case(name)
    relative = relatives(network, by_leaf=False) if with_relative else 1.0
    for structure, matrix in structures(rows):
        covariance = structure.output_covariance(GRID, relative)
        expected = expected_covariances(chosen, matrix, relative)
        np.testing.assert_allclose(covariance(found), expected, rtol=1e-8, atol=1e-9, err_msg=type(structure).__name__)


@pytest.mark.parametrize("name", usual(["transformer", "recurrent"], CASES))
def test_kronecker_covariances(name, x64):
    network, inputs, _, chosen, found = case(name)
    likelihood = bnnlaplace.gaussian(1.0)
    batch = Batch(inputs, None, jnp.ones(len(inputs)))
    structure = exact_structure("kron", batch_curvature("kron", network, likelihood, batch, microbatch=2), 1.5)
    # The matrix from its action on unit vectors, which is tested elsewhere: rotated, times eigenvalues, rotated back.
    identity = np.eye(chosen.shape[-1])
    parts = [block.rotated_back(block.eigenvalues * block.rotated(part)) for block, part in structure._parts(identity)]
    matrix = np.concatenate(parts, axis=-1)
    for relative in (1.0, relatives(network, by_leaf=True)):
        covariance = structure.output_covariance(GRID, relative)(found)
        expected = expected_covariances(chosen, matrix, relative)
        np.testing.assert_allclose(covariance, expected, rtol=1e-8, atol=1e-9, err_msg=f"relative: {relative}")


def test_a_linearised_network_has_the_jacobian_of_its_centre(x64):
    """The linearised network has the same layers, so it has Kronecker factors too."""
    of_products = NETWORKS["products"]
    network = at_random(of_products.make())
    moved = network.linearised().with_params(jax.tree.map(lambda leaf: leaf + 1.0, network.params))
    inputs, numbers = RNG.normal(size=of_products.shape), np.arange(3)[:, None]

    @jax.jit
    def rows_and_outputs(network):
        passed = tapped.forward(network, network.params, inputs)
        return jacobian.jacobian(passed, numbers).rows(), passed.outputs

    (plain, outputs), (linear, moved_outputs) = rows_and_outputs(network), rows_and_outputs(moved)
    np.testing.assert_allclose(plain, linear, rtol=1e-12)
    names, layers = leaf_names(network.params), find(moved, inputs).layers
    assert {names[leaf]: layer.positions for leaf, layer in layers.items()} == of_products.layers
    np.testing.assert_allclose(moved_outputs, moved(moved.params, inputs))
    assert np.abs(moved_outputs - outputs).max() > 1


@pytest.mark.parametrize("structure", usual(["lanczos"], ["diag", "kron", "full", "lanczos"]))
def test_variances_have_derivatives_in_the_inputs(structure, x64):
    """Central differences agree, even at zero, where the inputs of a layer vanish."""
    problem = random_problem(bnnlaplace.categorical(), np.arange(8) % 3)
    la = bnnlaplace.Laplace(problem.network, hessian_structure=structure).fit((problem.inputs, problem.targets))
    for summary in (lambda x: jnp.sum(la.functional_variance(x)), lambda x: jnp.sum(la.predictive(x)[:, 0])):
        at, step = jnp.zeros((2, 4)), jnp.zeros((2, 4)).at[1, 2].set(1e-5)
        derivative = jax.grad(summary)(at)
        np.testing.assert_allclose(derivative[1, 2], (summary(at + step) - summary(at - step)) / 2e-5, rtol=1e-6)
        assert jnp.isfinite(derivative).all()
