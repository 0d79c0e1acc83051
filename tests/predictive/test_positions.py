"""Several output positions to an example, as in segmentation: the same as each position being an example."""

import jax
import numpy as np
import pytest
from cases import random_problem, usual

import bnnlaplace
from bnnlaplace import evidence
from bnnlaplace.curvature import dense, diagonal, ggn, rows
from bnnlaplace.curvature.linearisation import linearise
from bnnlaplace.predictive import functional as posterior

COUNT, POSITIONS = 5, (2, 3)
FLAT = COUNT * 6


@pytest.fixture
def problem(x64):
    return random_problem(bnnlaplace.categorical(), np.random.default_rng(0).integers(0, 3, size=FLAT))


def with_positions(array):
    return array.reshape(COUNT, *POSITIONS, *array.shape[1:])


def test_curvature(problem):
    network, likelihood, inputs, _, matrix = problem
    images = with_positions(inputs)
    arguments = network, likelihood, network.params, images
    vectors = np.random.default_rng(3).normal(size=(3, len(matrix)))

    @jax.jit
    def products():
        linearised = linearise(network, network.params, images, microbatch=2)
        dual = ggn.dual_operator(linearised, likelihood)
        whole, diagonals = dense.ggn(*arguments), diagonal.ggn_diagonal(*arguments, microbatch=2)
        block = ggn.block_product(*arguments, microbatch=2)(vectors)
        one = ggn.ggn_operator(linearised, likelihood).matvec(vectors[0])
        return whole, diagonals, block, one, jax.vmap(dual.matvec)(np.eye(dual.size))

    whole, diagonals, block, one, gram = products()
    np.testing.assert_allclose(whole, matrix, atol=1e-10)
    np.testing.assert_allclose(diagonals, np.diagonal(matrix), atol=1e-10)
    np.testing.assert_allclose(block, vectors @ matrix, atol=1e-10)
    np.testing.assert_allclose(one, matrix @ vectors[0], atol=1e-10)
    expected = np.linalg.eigvalsh(matrix)
    np.testing.assert_allclose(np.linalg.eigvalsh(gram)[-len(expected) :], expected, atol=1e-9)


@pytest.mark.parametrize("side", usual(["dual"], ["primal", "dual"]))
def test_evidence(problem, side):
    network, likelihood, inputs, targets, matrix = problem
    size = len(matrix) if side == "primal" else 108  # a sixth example pads the last microbatch
    probes = np.sqrt(size) * np.eye(size)
    options = {"network": network, "likelihood": likelihood, "num_matvecs": 43}
    run = jax.jit(
        lambda batch: evidence.log_marginal_likelihood(
            network.params, 0.7, batch, probes, side=side, microbatch=2, **options
        )
    )
    found = run((with_positions(inputs), with_positions(targets))).mean
    flat = bnnlaplace.Laplace(network, hessian_structure="full", prior_precision=0.7).fit((inputs, targets))
    np.testing.assert_allclose(found, flat.log_marginal_likelihood().mean, rtol=1e-8)


def test_columns_of_the_dense_matrix_in_parts(problem, monkeypatch):
    """Too many outputs for one backward pass are taken in parts, whose size need not divide their number."""
    network, likelihood, inputs, _, matrix = problem
    monkeypatch.setattr(dense, "MOST_COTANGENTS", 5 * 2 * 18)  # of 18 outputs five, of two examples
    found = dense.ggn(network, likelihood, network.params, with_positions(inputs), microbatch=2)
    np.testing.assert_allclose(found, matrix, atol=1e-10)


@pytest.mark.parametrize("structure", usual(["lanczos"], ["full", "diag", "lanczos"]))
def test_front_object(problem, structure):
    network, _, inputs, targets, _ = problem
    la = bnnlaplace.Laplace(network, hessian_structure=structure, prior_precision=0.7)
    options = {"key": jax.random.key(0), "num_probes": 16, "tolerance": 1e-5, "microbatch": 2}
    positions = la.fit((with_positions(inputs), with_positions(targets)), **options)
    flat = la.fit((inputs, targets), **options)
    key = jax.random.key(1)
    images, pixels = with_positions(inputs)[:2], inputs[:12]
    for found, expected in (
        (positions.log_marginal_likelihood().mean, flat.log_marginal_likelihood().mean),
        (positions.mode_gradient(), flat.mode_gradient()),
        (positions.functional_variance(images), flat.functional_variance(pixels)),
        (positions.predictive(images), flat.predictive(pixels)),
    ):
        np.testing.assert_allclose(np.reshape(found, np.shape(expected)), expected, rtol=1e-8, atol=1e-10)
    mc = positions.predictive(images, link_approx="mc", key=key, num_samples=16)
    assert mc.shape == (2, *POSITIONS, 3)
    np.testing.assert_allclose(mc.sum(axis=-1), 1, rtol=1e-10)
    labels = with_positions(targets)[:2]
    samples = {"link_approx": "mc", "key": key, "num_samples": 16}
    # Structures other than "lanczos" draw at each position, from other keys.
    for options, tolerance in (({}, 1e-8), (samples, 1e-8 if structure == "lanczos" else 0.3)):
        curve = positions.validation_curve(images, labels, [0.7, 7.0], **options)
        expected = flat.validation_curve(pixels, targets[:12], [0.7, 7.0], **options)
        np.testing.assert_allclose(curve.negative_log_likelihood, expected.negative_log_likelihood, rtol=tolerance)


def test_targets_need_a_label_for_each_position(problem):
    network, _, inputs, targets, _ = problem
    with pytest.raises(
        ValueError, match=r"labels must be integers of shape \(5, 2, 3\), .* got int64 of shape \(5, 2\)"
    ):
        bnnlaplace.Laplace(network).fit((with_positions(inputs), with_positions(targets)[..., 0]))


@pytest.mark.parametrize("structure", usual(["diag"], ["full", "diag", "kron"]))
def test_outputs_of_one_input_in_parts(problem, structure, monkeypatch):
    """If the Jacobian of one input is too large, outputs are taken in parts. Their size need not divide the number."""
    network, likelihood, inputs, targets, _ = problem
    images, labels = with_positions(inputs), with_positions(targets)
    la = bnnlaplace.Laplace(network, likelihood, hessian_structure=structure).fit((images, labels))
    variance, probs = la.functional_variance(images), la.predictive(images)
    monkeypatch.setattr(rows, "row_sizes", lambda *given, **options: None)  # as if rows needed too much memory
    for inputs, groups, passes in ((2, 4, 3), (3, 5, 1), (1, 1, 1)):
        monkeypatch.setattr(
            posterior,
            "_sizes",
            lambda *given, parts=(inputs, groups, passes): posterior._Sizes(*parts[:2], given[4], parts[2]),
        )
        np.testing.assert_allclose(la.functional_variance(images), variance, rtol=1e-10, atol=1e-14)
        np.testing.assert_allclose(la.predictive(images), probs, rtol=1e-10)
    assert la.predictive(images[:0]).shape == (0, *POSITIONS, 3)


def test_parts_follow_memory(problem, monkeypatch):
    """All at once with enough memory, single passes without; in between, few inputs come before many outputs."""
    network, likelihood, inputs, targets, _ = problem
    images, labels = with_positions(inputs), with_positions(targets)
    la = bnnlaplace.Laplace(network, likelihood, hessian_structure="diag").fit((images, labels))

    def sizes(most, unit):
        monkeypatch.setattr(posterior, "JACOBIAN_BYTES", most)
        return posterior._sizes(la.network, images, la.structure, 18 // unit, unit, 1, 64)

    assert [sizes(2**25, unit) for unit in (1, 3)] == [(64, 18, 1, 18, False), (64, 6, 3, 18, False)]
    assert [sizes(1, unit) for unit in (1, 3)] == [(1, 1, 1, 1, False), (1, 1, 3, 1, False)]
    between = [sizes(most, 1) for most in (40_000, 60_000, 100_000)]
    assert all(8 <= found.inputs < 64 and 1 <= found.groups < 18 for found in between), between
    assert between[0].groups < between[1].groups < between[2].groups
