"""Predictions that are read from rows of the Jacobian against those that go forward or through factors."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace.curvature import rows
from bnnlaplace.predictive import functional, reading, shared_posteriors, validation_curves

RNG = np.random.default_rng(0)
KEY = jax.random.key(0)
GRID = [0.3, 2.0, 20.0]


@pytest.fixture(scope="module")
def posteriors():
    """A small convolutional network with three outputs, its images, and two posteriors at a prior of two ratios."""
    with jax.enable_x64(True):
        params = {
            "conv": jnp.asarray(0.5 * RNG.normal(size=(3, 3, 2, 4))),
            "bias": jnp.asarray(RNG.normal(size=4)),
            "head": jnp.asarray(RNG.normal(size=(4, 3))),
        }

        def outputs(p, x):
            y = jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            return jnp.mean(jnp.tanh(y + p["bias"]), axis=(1, 2)) @ p["head"]

        network = bnnlaplace.Network.from_function(outputs, params)
        x, y = RNG.normal(size=(21, 4, 4, 2)), RNG.integers(3, size=21)
        precision = {"conv": 1.0, "bias": 4.0, "head": 1.0}
        options = {"key": KEY, "num_probes": 8, "max_vectors": 24}
        yield (
            [
                bnnlaplace.Laplace(network, hessian_structure=structure, prior_precision=precision).fit(
                    (x, y), **options
                )
                for structure in ("diag", "lanczos")
            ],
            (x, y),
        )


def without_rows(monkeypatch):
    monkeypatch.setattr(rows, "row_sizes", lambda *given, **options: None)


def test_rows_are_the_jacobian_in_the_order_of_the_weights(posteriors, x64):
    (la, _), (x, _) = posteriors
    sizes = rows.RowSizes(5, 3, 3, 2)
    (found,) = rows.read(la.network, x[:7], sizes, [lambda part: jnp.moveaxis(part[0], 0, 1)[None]])
    np.testing.assert_allclose(found[0], oracles.jacobian(la.network, la.network.params, x[:7]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("marginal", [False, True])
def test_covariances_of_rows_are_those_of_factors(posteriors, marginal, monkeypatch, x64):
    """More inputs than a batch, a number of precisions that is padded, and chunks that leave a rest."""
    (la, _), (x, _) = posteriors
    monkeypatch.setattr("bnnlaplace.structure.diagonal.PAIR_NUMBERS", 1000)
    assert rows.row_sizes(la.network, x, 64) is not None
    found = list(functional.functional_variances(la.fitted, x, GRID, marginal=marginal))
    without_rows(monkeypatch)
    expected = list(functional.functional_variances(la.fitted, x, GRID, marginal=marginal))
    assert len(found) == len(GRID)
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precisions", usual([GRID], [GRID[:1], GRID]))
def test_posteriors_that_share_rows_are_those_of_each(posteriors, precisions, monkeypatch, x64):
    """Of the Krylov posterior samples are pushed at one precision, and the basis at three."""
    both, (x, _) = posteriors
    reads = []
    monkeypatch.setattr(rows, "read", lambda *given, read=rows.read: reads.append(len(given[3])) or read(*given))
    options = {"num_samples": 8, "microbatch": 64}
    fitted = [la.fitted for la in both]
    found = [list(one) for one in shared_posteriors(fitted, x, [precisions] * 2, keys=[KEY, KEY], **options)]
    assert reads == [2]
    without_rows(monkeypatch)
    for one, la in zip(found, fitted, strict=True):
        expected = functional.functional_posteriors(la, x, precisions, key=KEY, **options)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), one, list(expected))


def test_posteriors_of_equal_weights_share_rows_and_others_do_not(posteriors, monkeypatch, x64):
    """A posterior that was read from a checkpoint has arrays of its own."""
    (diag, lanczos), (x, _) = posteriors
    reads = []
    monkeypatch.setattr(rows, "read", lambda *given, read=rows.read: reads.append(len(given[3])) or read(*given))

    def read_with(change):
        reads.clear()
        old = lanczos.network
        network = bnnlaplace.Network(old.forward, jax.tree.map(change, old.params), old.frozen)
        fitted = [diag.fitted, lanczos.fitted._replace(network=network)]
        shared = shared_posteriors(fitted, x, [GRID] * 2, keys=[KEY, KEY], num_samples=8)
        return [next(iter(one)).mean for one in shared]

    same = read_with(lambda leaf: leaf + 0.0)
    assert reads == [2]
    np.testing.assert_array_equal(*same)
    own, other = read_with(lambda leaf: 1.1 * leaf)
    assert reads == [1, 1]
    assert np.abs(own - other).max() > 1e-3


def test_validation_curves_of_several_are_those_of_each(posteriors, monkeypatch, x64):
    both, (x, y) = posteriors
    options = {"link_approx": "mc", "key": KEY, "num_samples": 8}
    found = validation_curves([la.fitted for la in both], (x, y), GRID, **options)
    without_rows(monkeypatch)
    for curve, la in zip(found, both, strict=True):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), curve, la.validation_curve(x, y, GRID, **options)
        )


def test_one_program_serves_many_numbers_of_precisions():
    assert [reading._rounded_up(count) for count in (1, 2, 3, 5, 8, 9, 29)] == [1, 2, 4, 8, 8, 16, 32]


def test_rows_are_left_out_where_they_would_not_pay(posteriors, monkeypatch, x64):
    """Of a dense network, with too little memory, and along few directions."""
    (la, _), (x, _) = posteriors
    dense = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((4, 3)))
    assert rows.row_sizes(dense, np.ones((5, 4)), 64) is None
    sizes = rows.row_sizes(la.network, x, 64)
    assert sizes.inputs == rows.CPU_ROW_INPUTS
    assert not rows.directions_pay(sizes, 6) and rows.directions_pay(sizes, 7)
    monkeypatch.setattr(rows, "ROW_BYTES", 1000)
    assert rows.row_sizes(la.network, x, 64) is None
