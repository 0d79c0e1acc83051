"""Sums of Kronecker-factored blocks, against matrices in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

from bnnlaplace.curvature import kronecker
from bnnlaplace.curvature.jacobian import Jacobian, LeafJacobian
from bnnlaplace.structure import KroneckerStructure, block_sum
from bnnlaplace.structure.block_sum import BlockSum
from bnnlaplace.structure.blocks import DiagonalBlock, FilterBlock

pytestmark = pytest.mark.usefixtures("x64_module")

# Two biases, a kernel (2, 3) stored output first, and a leaf of which only the diagonal is known.
SEGMENTS, ROWS, COLUMNS = ((2, False), (3, True)), 3, 2


def moment(rng, size):
    """A second moment of few vectors, so that the terms of a sum do not commute."""
    vectors = rng.normal(size=(size, size + 1)) * rng.exponential(size=(size, 1))
    return jnp.asarray(vectors @ vectors.T)


def task(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    bias = kronecker.FilterSums(scale * moment(rng, 2)[None])
    kernel = kronecker.LayerSums(moment(rng, ROWS), scale * moment(rng, COLUMNS), jnp.asarray(4.0), SEGMENTS)
    return KroneckerStructure.fit([bias, kernel, kronecker.DiagonalSums(scale * jnp.asarray(rng.exponential(size=3)))])


def matrices(structure):
    """Each block as a matrix."""
    identity, start = np.eye(11), 0
    for size in (2, 6, 3):
        part = np.stack([structure.product(row) for row in identity[start : start + size]])
        yield part[:, start : start + size]
        start += size


@pytest.mark.parametrize("max_exact", usual([0], [512, 0]))
def test_a_sum_of_three_tasks(monkeypatch, max_exact):
    """Products are exact. All that needs an inverse belongs to one matrix, which is the sum itself if that is small."""
    monkeypatch.setattr(block_sum, "MAX_EXACT", max_exact)
    terms, delta = [task(seed) for seed in range(3)], 0.7
    structure = terms[0].plus(terms[1]).plus(terms[2])
    kinds = [FilterBlock, FilterBlock if max_exact else BlockSum, DiagonalBlock]
    assert [type(block) for block in structure.blocks] == kinds
    totals = [sum(parts) for parts in zip(*map(matrices, terms), strict=True)]
    for found, total in zip(matrices(structure), totals, strict=True):
        np.testing.assert_allclose(found, total, atol=1e-12)
    traced = jax.jit(structure.product)(jnp.arange(11.0))
    np.testing.assert_allclose(traced, structure.product(np.arange(11.0)), rtol=1e-9)

    # What the root of the kernel's block stands for, as a matrix.
    root = block_sum.root_of(jax.tree.map(np.asarray, structure.blocks[1]), delta)
    whitened = block_sum.whitened(root, np.eye(6))
    np.testing.assert_allclose(block_sum.coloured(root, np.eye(6)), whitened.T, atol=1e-12)
    inverses = [np.linalg.inv(total + delta * np.eye(len(total))) for total in totals]
    error = np.abs(whitened @ whitened.T - inverses[1]).max() / np.abs(inverses[1]).max()
    assert (error < 1e-12) == bool(max_exact), error  # otherwise an approximation
    covariance = np.zeros((11, 11))
    covariance[:2, :2], covariance[2:8, 2:8], covariance[8:, 8:] = inverses[0], whitened @ whitened.T, inverses[2]

    log_determinant = -np.linalg.slogdet(delta * covariance)[1]
    np.testing.assert_allclose(structure.log_determinant(delta), log_determinant, rtol=1e-10)
    vector = np.arange(11.0)
    form = structure.inverse_quadratic_form(vector, delta)
    np.testing.assert_allclose(form, vector @ covariance @ vector, rtol=1e-10)
    rows = np.random.default_rng(9).normal(size=(2, 1, 2, 11))
    parts = jnp.split(jnp.asarray(rows), [2, 8], axis=-1)
    found = structure.output_covariance([0.1, delta])(Jacobian([LeafJacobian(None, part, None) for part in parts]))
    np.testing.assert_allclose(found[1], rows @ covariance @ rows.swapaxes(-1, -2), rtol=1e-8, atol=1e-12)
    # Signs of eigenvectors are not the same inside `jit`, samples are.
    inside = jax.jit(lambda: structure.samples(jax.random.key(1), 3, delta))()
    np.testing.assert_allclose(inside, structure.samples(jax.random.key(1), 3, delta), rtol=1e-8)
    noise = np.asarray(structure.samples(jax.random.key(0), 20_000, delta))
    deviation = (noise.T @ noise / 20_000 - covariance) / np.sqrt(
        np.outer(covariance.diagonal(), covariance.diagonal())
    )
    assert np.abs(deviation).max() < 4 * np.sqrt(2 / 20_000)
    for max_columns in (2048, 0):  # then by probes
        monkeypatch.setattr(block_sum, "MAX_COLUMNS", max_columns)
        expected = 11 - delta * np.trace(covariance)
        found = structure.effective_parameters(delta, np.zeros(11, int)).item()
        assert abs(found - expected) < (1e-9 if max_exact or max_columns else 4 * np.sqrt(2 * 6 / 64))


def test_two_products_are_exact_where_the_prior_does_not_count(monkeypatch):
    """Then whitening by the first leaves a Kronecker product of the second, whatever their eigenvectors."""
    monkeypatch.setattr(block_sum, "MAX_EXACT", 0)
    first, second, delta = task(0), task(1), 1e-9
    expected = sum(
        np.linalg.slogdet(np.eye(len(m)) + m / delta)[1] for m in map(np.add, *map(matrices, (first, second)))
    )
    np.testing.assert_allclose(first.plus(second).log_determinant(delta), expected, rtol=1e-8)
    # So it is at any scale of both and of the prior.
    both, relative = first.plus(second), np.full(11, 4.0)
    scaled = both.scaled(2).whitened(relative)
    np.testing.assert_allclose(scaled.log_determinant(0.35), both.log_determinant(0.7), rtol=1e-12)
    assert both.resolution() >= max(first.resolution(), second.resolution())


def test_a_task_without_curvature_changes_nothing(monkeypatch):
    monkeypatch.setattr(block_sum, "MAX_EXACT", 0)
    once = task(0)
    for sum_ in (once.plus(task(1, scale=0.0)), task(1, scale=0.0).plus(once)):
        np.testing.assert_allclose(sum_.log_determinant(0.5), once.log_determinant(0.5), rtol=1e-12)


def test_blocks_of_two_kinds_are_refused_if_they_are_large(monkeypatch):
    """As with two values of `shared_weights`."""
    first, second = task(0), task(1)
    filters = kronecker.FilterSums(jnp.eye(6)[None])
    other = KroneckerStructure([second.blocks[0], FilterBlock.fit(filters, 1e-6), second.blocks[2]])
    small = first.plus(other)
    expected = next(iter(list(matrices(first))[1:])) + np.eye(6)
    np.testing.assert_allclose(list(matrices(small))[1], expected, atol=1e-12)
    monkeypatch.setattr(block_sum, "MAX_EXACT", 0)
    with pytest.raises(ValueError, match=r"fit\(prior=...\).*blocks of one kind.*\['FilterBlock', 'KroneckerBlock'\]"):
        first.plus(other)
