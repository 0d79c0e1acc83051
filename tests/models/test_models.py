"""Evidence and variance of real models, with every structure, against dense algebra in double precision."""

from functools import cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from models.zoo import EXAMPLES
from scipy import stats

import bnnlaplace
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.curvature.kronecker import MAX_EXACT

# All of them take minutes, nearly all of it to compile.
pytestmark = pytest.mark.exhaustive
TRAIN, TEST, DELTA, PROBES = 8, 3, 0.7, 64
STRUCTURES = ("diag", "kron", "full", "lanczos")


class Dense(NamedTuple):
    """A model with data, and its derivatives in double precision.

    Attributes
    ----------
    network, inputs, targets, test
        As a user has them.
    factors
        B' J at the training inputs with Lambda = B B', one row for each output: (N T C, P).
    outputs, jacobian
        The outputs at the training inputs, and J in the place of B' J.
    test_jacobian
        J at the test inputs, (B, ..., C, P).
    """

    network: bnnlaplace.Network
    inputs: np.ndarray
    targets: np.ndarray
    test: np.ndarray
    factors: np.ndarray
    outputs: np.ndarray
    jacobian: np.ndarray
    test_jacobian: np.ndarray


@cache
def dense(name: str) -> Dense:
    """Build a model away from its initial weights, where some derivatives are zero, and differentiate it."""
    example, rng = EXAMPLES[name], np.random.default_rng(1)
    inputs, test = example.inputs(rng, TRAIN), example.inputs(rng, TEST)
    network = example.make(inputs)
    noise = [0.1 * rng.normal(size=leaf.shape) for leaf in jax.tree.leaves(network.params)]
    noise = jax.tree.unflatten(jax.tree.structure(network.params), noise)
    network = network.with_params(jax.tree.map(lambda a, b: jnp.asarray(a + b, jnp.float32), network.params, noise))
    with jax.enable_x64(not example.single):
        exact = network
        if not example.single:
            exact = jax.tree.map(
                lambda leaf: jnp.asarray(leaf, jnp.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
                network,
            )
        jacobian, test_jacobian = (
            np.asarray(jax.jit(by_examples)(exact, jax.tree.map(jnp.asarray, x)), np.float64) for x in (inputs, test)
        )
        outputs = np.asarray(exact(exact.params, inputs), np.float64)
        if not example.single:
            assert exact(exact.params, inputs).dtype == jnp.float64
    targets = draw_targets(rng, outputs, example.likelihood)
    curvatures = oracles.output_curvature(likelihood_of(name), outputs.reshape(-1, outputs.shape[-1]))
    values, vectors = np.linalg.eigh(curvatures)
    roots = vectors * np.sqrt(np.maximum(values, 0))[:, None]
    flat = jacobian.reshape(*roots.shape[:2], -1)
    factors = np.einsum("ncb,ncp->nbp", roots, flat).reshape(-1, flat.shape[-1])
    return Dense(network, inputs, targets, test, factors, outputs, flat, test_jacobian)


def by_examples(network, inputs):
    """d f / d params in reverse mode, one example in a batch at a time; shares no code with the package's."""
    flat, unravel = jax.flatten_util.ravel_pytree(network.params)

    def outputs(vector, x):
        return network(unravel(vector), jax.tree.map(lambda leaf: leaf[None], x))[0]

    return jax.lax.map(partial(jax.jacrev(outputs), flat), inputs)


def draw_targets(rng, outputs, likelihood):
    if likelihood == "binary":
        return rng.integers(0, 2, size=outputs.shape)
    return rng.integers(0, outputs.shape[-1], size=outputs.shape[:-1])


def likelihood_of(name):
    return bnnlaplace.bernoulli() if EXAMPLES[name].likelihood == "binary" else bnnlaplace.categorical()


def log_likelihood(outputs, targets, likelihood):
    """log p(y | f) in double precision."""
    if likelihood == "binary":
        return -np.sum(np.logaddexp(0, outputs) - targets * outputs)
    log_probs = outputs - np.logaddexp.reduce(outputs, axis=-1, keepdims=True)
    return np.take_along_axis(log_probs, targets[..., None], axis=-1).sum()


class Columns(NamedTuple):
    """The part of the weights with a posterior: its leaves, and where each is among all weights."""

    names: list[str]
    shapes: list[tuple[int, ...]]
    places: list[np.ndarray]


def columns(model, subset, last_layer):
    names, leaves = leaf_names(model.network.params), jax.tree.leaves(model.network.params)
    start, parts = 0, []
    for name, leaf in zip(names, leaves, strict=True):
        if subset == "all" or name in last_layer:
            parts.append((name, leaf.shape, np.arange(start, start + leaf.size)))
        start += leaf.size
    return Columns(*map(list, zip(*parts, strict=True)))


def kronecker_block(model, name, shape, place, once):
    """The block of one leaf, by the formulas in the docstring of `kronecker_factors`."""
    factors = model.factors[:, place]
    sizes = [size for size in shape if size > 1]
    if name in once:
        return once_for_each_example(model, name, shape, place)
    if len(sizes) <= 1 or len(place) <= MAX_EXACT:
        return factors.T @ factors
    # The kernels of queries, keys and values have all but their first axis as columns.
    first = any(f"/{part}/kernel" in name for part in ("query", "key", "value"))
    num_rows = sizes[0] if first else int(np.prod(sizes[:-1]))
    matrices = factors.reshape(len(factors), num_rows, -1)
    rows, outputs = np.einsum("kio,kjo->ij", matrices, matrices), np.einsum("kio,kip->op", matrices, matrices)
    return np.kron(rows, outputs) / np.trace(rows)


def once_for_each_example(model, name, shape, place):
    """Sum a a' kron sum g g' / N. The derivative in the kernel is a g', and that in the bias is g."""
    names = leaf_names(model.network.params)
    sizes = [leaf.size for leaf in jax.tree.leaves(model.network.params)]
    number = names.index(name.replace("kernel", "bias"))
    bias = sum(sizes[:number]) + np.arange(sizes[number])
    count = len(jax.tree.leaves(model.inputs)[0])
    kernel = model.jacobian[..., place].reshape(count, -1, *shape)
    g = model.jacobian[..., bias].reshape(count, -1, shape[-1])
    inputs = np.einsum("ncio,nco->ni", kernel, g) / np.sum(g**2, axis=(1, 2))[:, None]
    gradients = model.factors[:, bias]
    return np.kron(inputs.T @ inputs, gradients.T @ gradients) / count


def expected(model, structure, parts, example):
    """log det(I + G / delta), and the covariance of outputs at the test inputs, in double precision."""
    if structure in ("full", "lanczos"):
        everywhere = np.concatenate(parts.places)
        blocks, places = [model.factors[:, everywhere].T @ model.factors[:, everywhere]], [everywhere]
    else:
        places = parts.places
        if structure == "diag":
            blocks = [np.diag(np.sum(model.factors[:, place] ** 2, axis=0)) for place in places]
        else:
            leaves = zip(parts.names, parts.shapes, places, strict=True)
            blocks = [kronecker_block(model, *leaf, example.once) for leaf in leaves]
    log_determinant, covariance = 0.0, 0.0
    for block, place in zip(blocks, places, strict=True):
        log_determinant += np.linalg.slogdet(np.eye(len(block)) + block / DELTA)[1]
        rows = model.test_jacobian[..., place]
        solved = np.linalg.solve(block + DELTA * np.eye(len(block)), np.moveaxis(rows, -1, 0).reshape(len(block), -1))
        solved = np.moveaxis(solved.reshape(len(block), *rows.shape[:-1]), 0, -1)
        covariance = covariance + np.einsum("...cp,...dp->...cd", rows, solved)
    return log_determinant, covariance


@pytest.mark.parametrize("subset", ["all", "last_layer"])
@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("name", EXAMPLES)
def test_evidence_and_variance(name, structure, subset):
    example, model = EXAMPLES[name], dense(name)
    parts = columns(model, subset, example.last_layer)
    la = bnnlaplace.Laplace(
        model.network,
        example.likelihood,
        subset_of_weights=subset,
        hessian_structure=structure,
        prior_precision=DELTA,
    )
    options = {"key": jax.random.key(0), "num_probes": PROBES, "target_precision": DELTA, "microbatch": 4}
    la = la.fit((model.inputs, model.targets), **options)
    assert leaf_names(la.network.params) == parts.names
    log_determinant, covariance = expected(model, structure, parts, example)
    weights = np.asarray(jax.flatten_util.ravel_pytree(la.network.params)[0], np.float64)
    log_joint = log_likelihood(model.outputs, model.targets, example.likelihood) - DELTA / 2 * weights @ weights
    evidence = la.log_marginal_likelihood()
    error = la.krylov_error()
    bound = 1e-4 * abs(log_determinant) + 1e-3 + 4 * evidence.sem + (error.log_determinant / 2 if error else 0)
    assert abs(evidence.mean - (log_joint - log_determinant / 2)) < bound
    found = np.asarray(la.functional_variance(model.test, microbatch=2))
    if evidence.sem == 0:
        np.testing.assert_allclose(found, covariance, rtol=1e-3, atol=1e-4 * np.abs(covariance).max())
    else:
        # From S samples of the weights: S times the ratio to the exact variance has a chi-squared distribution. One
        # model in a thousand may have a ratio outside these quantiles.
        ratios = np.divide(*(np.diagonal(values, axis1=-2, axis2=-1) for values in (found, covariance)))
        tail = 0.5e-3 / ratios.size
        low, high = stats.chi2.ppf([tail, 1 - tail], PROBES) / PROBES
        assert low < ratios.min() and ratios.max() < high
