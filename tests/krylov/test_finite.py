"""Results that are not finite say so: in their record inside of `jit`, and with the cause outside of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace.krylov import (
    Eigenpairs,
    arnoldi,
    check_symmetric,
    lanczos,
    leading_eigenpairs,
    matfun_arnoldi,
    matfun_lanczos,
    rademacher_probes,
    stochastic_lanczos_quadrature,
)

INDEFINITE = jnp.array([-2.0, 0.5, 1.0, 3.0])
PROBES = rademacher_probes(jax.random.key(0), INDEFINITE, 10)
CAUSE = (
    r"function is nan at the Ritz value -2, and not finite at 1 of 4, which lie between -2 and 3; shift the operator"
)
PRODUCTS = "the products of matvec are not finite, or too large for float32"


def product(vector):
    return INDEFINITE * vector


def not_finite(vector):
    return vector / 0


def estimate(probes, **options):
    return stochastic_lanczos_quadrature(jnp.log, product, probes, num_matvecs=4, **options)


def test_a_trace_that_is_not_finite_has_not_converged():
    with pytest.warns(UserWarning, match="^stochastic_lanczos_quadrature has a mean that is not finite: " + CAUSE):
        outside = estimate(PROBES, relative_sem=0.5)
    for found in (outside, jax.jit(estimate)(PROBES)):
        assert not found.converged and np.isnan(found.mean) and found.truncation == np.inf


def test_a_trace_names_products_and_deflation():
    with pytest.warns(UserWarning, match=PRODUCTS):
        found = stochastic_lanczos_quadrature(jnp.exp, not_finite, PROBES, num_matvecs=2)
    assert not found.converged
    pairs = Eigenpairs(INDEFINITE[:1], jnp.eye(4)[:1], jnp.zeros(1))
    with pytest.warns(UserWarning, match="function is not finite at a value of the deflation"):
        estimate(PROBES, deflation=pairs)


def test_a_vector_that_is_not_finite_has_an_infinite_error():
    """Its space is invariant, where the estimate of the error would be zero."""
    options = {"num_matvecs": 4, "gradient": "autodiff"}
    with pytest.warns(UserWarning, match="^matfun_lanczos has a value that is not finite: " + CAUSE):
        outside = matfun_lanczos(jnp.sqrt, product, jnp.ones(4), **options)
    inside = jax.jit(lambda v: matfun_lanczos(jnp.sqrt, product, v, **options))(jnp.ones(4))
    assert outside.error == inside.error == np.inf


def test_functions_of_general_matrices():
    options = {"gradient": "autodiff"}
    undefined = lambda matrix: matrix / 0  # noqa: E731
    with pytest.warns(UserWarning, match="function is not finite at the projected matrix"):
        assert matfun_arnoldi(undefined, product, jnp.ones(4), num_matvecs=2, **options).error == np.inf
    with pytest.warns(UserWarning, match=PRODUCTS):
        assert matfun_arnoldi(lambda m: m @ m, not_finite, jnp.ones(4), num_matvecs=2, **options).error == np.inf


def test_products_that_are_not_finite():
    large = lambda v: v * 1e38 * 1e3  # noqa: E731
    loop = {"gradient": "autodiff"}
    for function, options in ((lanczos, loop), (arnoldi, loop), (leading_eigenpairs, {"num_pairs": 1})):
        for matvec in (not_finite, large) if function is lanczos else (not_finite,):
            with pytest.warns(
                UserWarning, match=f"^{function.__name__} has a decomposition that is not finite: {PRODUCTS}"
            ):
                function(matvec, jnp.ones(4), num_matvecs=2, **options)
    with pytest.raises(
        ValueError, match=r"^check_symmetric\(matvec=...\) must return finite products; got a ratio of nan"
    ):
        check_symmetric(not_finite, jnp.ones(4), jax.random.key(0))
