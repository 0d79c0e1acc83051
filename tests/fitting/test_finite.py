"""Curvature beyond the range of float32 is an error that says what to do, whatever the structure."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace

STRUCTURES = ("diag", "kron", "lanczos", "full")


def regression(scale, count):
    """A feature in nanoseconds, say: its squares sum to more than float32 holds."""
    rng = np.random.default_rng(0)
    x = (scale * (1 + 1e-3 * rng.normal(size=(count, 2)))).astype(np.float32)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((2, 1)))
    return network, x, rng.normal(size=(count, 1)).astype(np.float32)


@pytest.mark.parametrize(
    ("outputs", "structure"),
    usual(
        [("few outputs", "kron"), ("many outputs", "full"), ("many outputs", "lanczos")],
        ("few outputs", "many outputs"),
        STRUCTURES,
    ),
)
def test_an_overflow_is_an_error_or_the_right_value(structure, outputs):
    count = 40 if outputs == "few outputs" else 700
    network, x, y = regression(3e18, count)
    la = bnnlaplace.Laplace(network, "regression", hessian_structure=structure)
    options = {"key": jax.random.key(0), "num_probes": 2, "max_vectors": 64}
    if structure != "full":
        with pytest.raises(ValueError, match=r"curvature must be finite in float32.*standardise the inputs"):
            la.fit((x, y), **options)
        return
    la = la.fit((x, y), **options)  # in float64, which holds the numbers
    with pytest.warns(UserWarning, match="the rounding of the curvature"):
        found = la.log_marginal_likelihood().mean
    exact = x.astype(np.float64)
    determinant = np.linalg.slogdet(np.eye(2) + exact.T @ exact)[1]
    value = -0.5 * (y.astype(np.float64) ** 2).sum() - 0.5 * count * np.log(2 * np.pi) - 0.5 * determinant
    assert found == pytest.approx(value, rel=1e-5)


def test_a_product_that_overflows_is_an_error():
    """With more weights than probes 'lanczos' multiplies, and the product is what overflows."""
    rng = np.random.default_rng(1)
    x = (1e19 * rng.normal(size=(90, 12))).astype(np.float32)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((12, 1)))
    la = bnnlaplace.Laplace(network, "regression")
    with pytest.raises(ValueError, match="curvature must be finite"):
        la.fit((x, x[:, :1] * 1e-19), key=jax.random.key(0), num_probes=4, max_vectors=16)


@pytest.mark.parametrize("structure", ["diag", "kron"])
def test_a_curvature_that_overflows_later_is_an_error(structure):
    """It is finite as it is summed, and not after it was scaled, divided by a noise or whitened."""
    network, x, y = regression(1e16, 40)
    options = {"hessian_structure": structure, "sigma_noise": 0.01}
    la = bnnlaplace.Laplace(network, "regression", **options)
    with pytest.raises(ValueError, match="curvature must be finite"):
        la.fit((x, y), num_data=1_000_000)
    fitted = la.fit((x, y))
    with pytest.raises(ValueError, match="curvature must be finite"):
        fitted.with_sigma_noise(1e-5)
    weights = {"a": jnp.zeros(1), "b": jnp.zeros(1)}
    other = bnnlaplace.Network.from_function(lambda p, x: x[:, :1] * p["a"] + x[:, 1:] * p["b"], weights)
    fitted = bnnlaplace.Laplace(other, "regression", **options).fit((x, y))
    with pytest.raises(ValueError, match="curvature must be finite"):
        fitted.with_prior_precision({"a": 1e-8, "b": 1e8})


def test_factors_that_overflow_in_their_product_are_an_error():
    network, x, y = regression(1e10, 40)
    la = bnnlaplace.Laplace(network, "regression", hessian_structure="kron", sigma_noise=1e-10)
    with pytest.raises(ValueError, match="curvature must be finite"):
        la.fit((x, y))
