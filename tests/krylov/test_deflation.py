"""Traces with leading eigenpairs summed exactly, at the edges: no pair found, all found, and pairs that are refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from krylov.decompositions import Refusal, assert_close, check_refusals

from bnnlaplace.krylov import Eigenpairs, leading_eigenpairs, rademacher_probes, stochastic_lanczos_quadrature

SIZE = 6
VALUES = jnp.array([8.0, 4.0, 2.0, 1.5, 1.0, 0.5])
EXACT = np.float32(np.sqrt(SIZE)) * np.eye(SIZE, dtype=np.float32)


def pairs(count):
    """The leading `count` eigenpairs of diag(VALUES), and zeros for the others."""
    present = jnp.arange(SIZE) < count
    return Eigenpairs(jnp.where(present, VALUES, 0), jnp.diag(present.astype(VALUES.dtype)), jnp.zeros(SIZE))


def log_determinant(values, scale, probes=EXACT, **options):
    """log det(scale * diag(values)), whose logarithm is not defined at the zero of a pair that was not found."""
    return stochastic_lanczos_quadrature(
        lambda x: jnp.log(scale * x), lambda v, d: d * v, jnp.asarray(probes), values, num_matvecs=SIZE, **options
    ).mean


@pytest.mark.parametrize("gradient", usual(["quadrature"], ["adjoint", "quadrature", "autodiff"]))
def test_any_number_of_pairs(gradient):
    def deflated(values, scale, deflation):
        return log_determinant(values, scale, gradient=gradient, deflation=deflation)

    run = jax.jit(jax.value_and_grad(deflated, (0, 1)))
    for count in (0, 2, SIZE):
        value, slopes = run(VALUES, 0.7, pairs(count))
        np.testing.assert_allclose(value, np.sum(np.log(0.7 * VALUES)), rtol=1e-5)
        assert_close(slopes, (1 / VALUES, SIZE / 0.7), 1e-4)


def test_a_batch_with_probes_of_which_nothing_is_left():
    """The probes sqrt(n) e_i of deflated directions are zero, those of others are not."""
    options = {"probe_batch_size": 4, "deflation": pairs(3)}
    value, slope = jax.jit(jax.value_and_grad(lambda d: log_determinant(d, 1.0, **options)))(VALUES)
    np.testing.assert_allclose(value, jnp.sum(jnp.log(VALUES)), rtol=1e-5)
    np.testing.assert_allclose(slope, 1 / VALUES, rtol=1e-4)


SECOND = {"hessian": jax.hessian, "reverse mode twice": lambda loss: jax.jacrev(jax.grad(loss))}


@pytest.mark.parametrize(
    ("gradient", "mode"),
    usual([("quadrature", "hessian")], ("adjoint", "quadrature"), SECOND),
)
def test_second_derivatives(x64, gradient, mode):
    """Second derivatives are those of the estimated gradient. They are exact at full depth. Deflation refuses them."""
    values, probes = jnp.asarray(np.asarray(VALUES, np.float64)), jnp.asarray(EXACT, jnp.float64)

    def loss(values, **options):
        return log_determinant(values**2, 1.0, probes @ mixing, gradient=gradient, **options)

    mixing = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (SIZE, SIZE)))[0]
    derivative = jax.jit(SECOND[mode](loss))
    np.testing.assert_allclose(derivative(values), np.diag(-2 / values**2), atol=1e-8)
    with pytest.raises(TypeError, match=r"quadrature\(deflation=...\) has first derivatives only"):
        derivative(values, deflation=jax.tree.map(lambda x: x.astype(values.dtype), pairs(2)))


@pytest.mark.exhaustive  # as above with a loop that may stop
def test_second_derivatives_of_a_loop_that_may_stop(x64):
    values = jnp.asarray(np.asarray(VALUES, np.float64))
    mixing = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (SIZE, SIZE)))[0]

    def loss(values):
        return log_determinant(values, 1.0, EXACT @ mixing, relative_sem=1e-9)

    np.testing.assert_allclose(jax.jit(jax.hessian(loss))(values), jnp.diag(-1 / values**2), atol=1e-8)
    with pytest.raises(TypeError, match=r"quadrature\(relative_sem=...\) .*jax.hessian .*leave relative_sem out"):
        jax.jit(jax.jacrev(jax.grad(loss)))(values)


def shorter(pairs):
    return pairs._replace(vectors=pairs.vectors[:, :-1])


BAD = {
    "another type": (lambda pairs: tuple(pairs), TypeError, "be what leading_eigenpairs returns; got tuple"),
    "another length": (shorter, ValueError, r"vectors like the probes, of shapes \(6,\); got \{6\} of shapes \(5,\)"),
    "another structure": (lambda f: f._replace(vectors=[f.vectors]), ValueError, "vectors like the probes"),
    "no vectors": (lambda f: jax.tree.map(lambda x: x[:0], f), ValueError, "hold one or more vectors"),
    "integers": (lambda f: f._replace(vectors=f.vectors.astype(int)), TypeError, "floating-point dtype; got int32"),
    "not of unit length": (lambda f: f._replace(vectors=2 * f.vectors), ValueError, "orthonormal .* off by 3"),
    "not orthogonal": (lambda f: f._replace(vectors=f.vectors.at[0, 1].set(0.1)), ValueError, "orthonormal"),
}


def test_bad_pairs(unchecked_annotations):
    probes = rademacher_probes(jax.random.key(0), VALUES, 3)
    check_refusals(
        Refusal(
            case,
            lambda change=change: log_determinant(VALUES, 1.0, probes, deflation=change(pairs(2))),
            error,
            rf"^stochastic_lanczos_quadrature\(deflation=...\) must .*{message}",
        )
        for case, (change, error, message) in BAD.items()
    )


def test_pairs_in_another_precision(x64):
    double = jax.tree.map(lambda x: x.astype(jnp.float64), pairs(2))
    estimate = jax.jit(lambda: log_determinant(VALUES, 1.0, deflation=double))()
    assert estimate.dtype == jnp.float32
    np.testing.assert_allclose(estimate, np.sum(np.log(VALUES)), rtol=1e-5)


def test_no_pair_and_a_probe_that_sees_zero():
    """z' A z = 0: there is no safe number at which to evaluate f for a missing pair, and no need to."""
    signs, probes = jnp.array([1.0, -1, 1, -1, 1, -1]), jnp.ones((1, SIZE))

    def trace(scale):
        return stochastic_lanczos_quadrature(
            lambda x: 1 / (scale * x) ** 2, lambda v: signs * v, probes, num_matvecs=3, deflation=pairs(0)
        ).mean

    np.testing.assert_allclose(jax.jit(jax.value_and_grad(trace))(1.0), (SIZE, -2 * SIZE), rtol=1e-5)


def test_a_zero_probe_inside_of_jit():
    probes = jnp.asarray(EXACT).at[0].set(0.0)
    value, slope = jax.jit(jax.value_and_grad(lambda p, d: log_determinant(d, 1.0, p), 1))(probes, VALUES)
    np.testing.assert_allclose(value, jnp.sum(jnp.log(VALUES[1:])), rtol=1e-5)
    np.testing.assert_allclose(slope, (1 / VALUES).at[0].set(0.0), rtol=1e-4)


def test_standard_errors_at_any_scale():
    probes = rademacher_probes(jax.random.key(0), VALUES, 32)

    @jax.jit
    def estimate(scale):
        matvec = lambda v: scale * (VALUES * v + jnp.roll(v, 1) + jnp.roll(v, -1))  # noqa: E731
        return stochastic_lanczos_quadrature(lambda x: x, matvec, probes, num_matvecs=4, relative_sem=0.05)

    rows = np.asarray(probes, np.float64)
    forms = np.sum(rows * (np.asarray(VALUES) * rows + np.roll(rows, 1, axis=1) + np.roll(rows, -1, axis=1)), axis=1)
    for scale in (1e-25, 1.0, 1e25):
        trace = estimate(scale)
        assert trace.num_probes == 32 and not trace.converged
        np.testing.assert_allclose(trace.sem / scale, np.std(forms, ddof=1) / np.sqrt(32), rtol=1e-4)


def test_pairs_found_by_lanczos_are_good():
    """Outside of `jit`, where their orthogonality is checked."""
    found = leading_eigenpairs(lambda v: VALUES * v, jnp.ones(SIZE), num_pairs=3, num_matvecs=SIZE)
    estimate = jax.jit(lambda values: log_determinant(values, 1.0, deflation=found))(VALUES)
    np.testing.assert_allclose(estimate, np.sum(np.log(VALUES)), rtol=1e-5)
