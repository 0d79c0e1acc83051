"""Lanczos and its adjoint, against dense algebra and against autodiff through the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace.krylov import lanczos

SIZE = 12


def symmetric(params):
    matrix = params["half"] + params["half"].T
    return matrix + params["shift"] * jnp.eye(SIZE)


def matvec(vector, params):
    return symmetric(params) @ vector


@pytest.fixture
def problem(x64):
    rng = np.random.default_rng(0)
    params = {"half": jnp.asarray(rng.normal(size=(SIZE, SIZE))), "shift": jnp.asarray(0.3)}
    return jnp.asarray(rng.normal(size=SIZE)), params


@pytest.mark.parametrize("depth", [1, 2, 7, SIZE])
def test_decomposition(problem, depth):
    start, params = problem
    result = lanczos(matvec, start, params, num_matvecs=depth)
    tridiagonal = jnp.diag(result.diagonal) + jnp.diag(result.off_diagonal, 1) + jnp.diag(result.off_diagonal, -1)
    last = jnp.zeros((depth, SIZE)).at[-1].set(result.residual)
    np.testing.assert_allclose(result.basis @ symmetric(params), tridiagonal @ result.basis + last, atol=1e-12)
    np.testing.assert_allclose(result.basis @ result.basis.T, np.eye(depth), atol=1e-13)
    np.testing.assert_allclose(result.start_norm * result.basis[0], start, atol=1e-13)
    np.testing.assert_allclose(result.basis @ result.residual, 0, atol=1e-12)


def test_ritz_values_at_full_depth_are_eigenvalues(problem):
    start, params = problem
    result = lanczos(matvec, start, params, num_matvecs=SIZE)
    tridiagonal = jnp.diag(result.diagonal) + jnp.diag(result.off_diagonal, 1) + jnp.diag(result.off_diagonal, -1)
    np.testing.assert_allclose(jnp.linalg.eigvalsh(tridiagonal), jnp.linalg.eigvalsh(symmetric(params)), atol=1e-11)


@pytest.mark.parametrize("depth", [1, 2, 7, SIZE])
def test_adjoint_is_the_derivative_of_the_loop(problem, depth):
    start, params = problem
    shapes = jax.eval_shape(lambda: lanczos(matvec, start, params, num_matvecs=depth))
    keys = jax.random.split(jax.random.key(depth), len(shapes))
    cotangent = type(shapes)(*(jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, shapes, strict=True)))
    if depth == SIZE:  # the residual is a constant zero there
        cotangent = cotangent._replace(residual=jnp.zeros(SIZE))

    def pullback(gradient):
        def run(start, params):
            return lanczos(matvec, start, params, num_matvecs=depth, gradient=gradient)

        return jax.jit(lambda: jax.vjp(run, start, params)[1](cotangent))()

    adjoint, autodiff = jax.tree.leaves(pullback("adjoint")), jax.tree.leaves(pullback("autodiff"))
    for ours, reference in zip(adjoint, autodiff, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-9, atol=1e-9 * float(jnp.abs(reference).max()))
    # The custom rule ran: rounding differs from that of the loop.
    assert any(
        np.any(np.asarray(ours) != np.asarray(reference)) for ours, reference in zip(adjoint, autodiff, strict=True)
    )


def test_gradient_reaches_closed_over_arrays(problem):
    start, params = problem

    def last_entry(params, close_over):
        function = (lambda v: matvec(v, params)) if close_over else matvec
        arguments = () if close_over else (params,)
        return lanczos(function, start, *arguments, num_matvecs=5).diagonal[-1]

    closed = jax.jit(jax.grad(last_entry), static_argnums=1)(params, True)
    passed = jax.jit(jax.grad(last_entry), static_argnums=1)(params, False)
    np.testing.assert_allclose(closed["half"], passed["half"], rtol=1e-12)
    assert abs(closed["shift"]) > 0


def test_invariant_subspace_ends_the_recurrence(x64):
    values = jnp.array([5.0, 2.0, 1.0] + [0.0] * 9)
    start = jnp.arange(1.0, 13.0)
    result = lanczos(lambda v, values: values * v, start, values, num_matvecs=8)
    # Four distinct eigenvalues, 0 among them: the space has dimension four.
    assert result.off_diagonal[2] > 1e-3
    np.testing.assert_array_equal(result.off_diagonal[3:], 0)
    np.testing.assert_array_equal(result.basis[4:], 0)
    np.testing.assert_array_equal(result.residual, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_matvecs": 0}, "between 1 and the dimension 12; got 0"),
        ({"num_matvecs": 13}, "between 1 and the dimension 12; got 13"),
        ({"num_matvecs": 3, "gradient": "magic"}, "'adjoint' or 'autodiff'; got 'magic'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        lanczos(lambda v: v, jnp.ones(12), **options)
