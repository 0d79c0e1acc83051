"""Stochastic Lanczos quadrature and its gradients, against dense determinants."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace.krylov import stochastic_lanczos_quadrature

SIZE, RANK = 14, 6


@pytest.fixture
def factor(x64):
    return jnp.asarray(np.random.default_rng(0).normal(size=(SIZE, RANK)))


def log_determinant(factor, delta):
    return jnp.linalg.slogdet(jnp.eye(SIZE) + factor @ factor.T / delta)[1]


def quadrature(factor, delta, probes, depth, gradient="adjoint"):
    forms = stochastic_lanczos_quadrature(
        lambda x: jnp.log1p(x / delta),
        lambda v, factor: factor @ (factor.T @ v),
        probes,
        factor,
        num_matvecs=depth,
        gradient=gradient,
    )
    return jnp.mean(forms)


# The rows of sqrt(n) I give the exact trace; depth 10 is beyond the rank, where the recurrence has broken down.
@pytest.mark.parametrize("depth", [RANK + 1, 10])
@pytest.mark.parametrize("gradient", ["adjoint", "autodiff"])
def test_value_and_gradient_are_dense(factor, depth, gradient):
    probes = jnp.sqrt(SIZE) * jnp.eye(SIZE)
    run = jax.jit(jax.value_and_grad(lambda f, d: quadrature(f, d, probes, depth, gradient), (0, 1)))
    value, gradients = run(factor, 0.3)
    expected, expected_gradients = jax.value_and_grad(log_determinant, (0, 1))(factor, 0.3)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for ours, reference in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("depth", [1, 3])
def test_adjoint_is_the_gradient_of_the_truncated_quadrature(factor, depth):
    probes = jax.random.rademacher(jax.random.key(0), (4, SIZE), dtype=jnp.float64)

    def gradients(gradient):
        return jax.jit(jax.grad(lambda f, d: quadrature(f, d, probes, depth, gradient), (0, 1)))(factor, 0.3)

    for ours, reference in zip(gradients("adjoint"), gradients("autodiff"), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_truncated_trace_within_four_standard_errors(factor, seed):
    probes = jax.random.normal(jax.random.key(seed), (200, SIZE), jnp.float64)
    forms = stochastic_lanczos_quadrature(jnp.log1p, lambda v: factor @ (factor.T @ v), probes, num_matvecs=RANK - 2)
    sem = forms.std(ddof=1) / np.sqrt(len(forms))
    assert abs(forms.mean() - log_determinant(factor, 1.0)) <= 4 * sem
