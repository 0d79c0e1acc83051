"""Breakdown: the recurrence stops in an invariant space and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from krylov.decompositions import DECOMPOSITIONS, SIZE, assert_close, random_operator

from bnnlaplace.krylov import check_symmetric, lanczos, leading_eigenpairs, tridiagonal_matrix

both = pytest.mark.parametrize("name", DECOMPOSITIONS)


SCALES = {np.float32: (1e-30, 1e30), np.float64: (1e-200, 1e200), np.float16: (1e3,)}


@pytest.mark.parametrize(
    ("name", "dtype"),
    usual([("lanczos", np.float32), ("arnoldi", np.float64), ("arnoldi", np.float16)], DECOMPOSITIONS, SCALES),
)
def test_size_of_the_operator_is_no_breakdown(name, dtype):
    """Squares of these scales are zero or infinite."""
    method = DECOMPOSITIONS[name]

    def total(params, scale):
        scaled = lambda v, params: scale * method.matvec(v, params)  # noqa: E731
        result = method.decompose(scaled, start, params, num_matvecs=5)
        matrix = method.matrix(result) / scale
        return matrix.sum(), (matrix, result.breakdown_step)

    with jax.enable_x64(dtype == np.float64):
        start, params = random_operator(dtype)
        run = jax.jit(jax.grad(total, has_aux=True))
        reference, (expected, _) = run(params, dtype(1))
        for scale in SCALES[dtype]:
            gradient, (matrix, breakdown_step) = run(params, dtype(scale))
            assert breakdown_step == -1
            assert_close((matrix, gradient), (expected, reference), 200 * np.finfo(dtype).eps)


@both
def test_norms_of_start_vectors_neither_overflow_nor_underflow(name):
    start, params = random_operator(np.float32)
    for scale in (1e-30, 1e30):
        result = DECOMPOSITIONS[name].run(scale * start, params, num_matvecs=3)
        np.testing.assert_allclose(result.start_norm, scale * np.linalg.norm(start), rtol=1e-6)
        assert result.breakdown_step == -1


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30, 3e36])
def test_check_symmetric_at_any_scale(scale):
    matrix = jnp.asarray(np.random.default_rng(0).normal(size=(20, 20)), jnp.float32)
    matvec, key = lambda v, m: scale * (m @ v), jax.random.key(0)  # noqa: E731
    assert check_symmetric(matvec, jnp.ones(20), key, matrix + matrix.T) < 1e-6
    with pytest.raises(ValueError, match="must be symmetric"):
        check_symmetric(matvec, jnp.ones(20), key, matrix)


@both
def test_infinite_products_stay_visible(name):
    start, params = random_operator(np.float32)
    with pytest.warns(UserWarning, match=f"^{name} has a decomposition that is not finite"):
        result = DECOMPOSITIONS[name].decompose(lambda v: v * jnp.inf, start, num_matvecs=3)
    assert result.breakdown_step == -1
    assert not np.isfinite(np.diagonal(DECOMPOSITIONS[name].matrix(result))).any()


def equidistant(count, size=1000):
    """An operator with `count` distinct eigenvalues between 1 and 10."""
    values = jnp.resize(jnp.linspace(1, 10, count), size)
    return jnp.linspace(1, 10, count), lambda v: values * v


@pytest.mark.parametrize(
    ("name", "count", "dtype"),
    usual(
        [("lanczos", 4, np.float32), ("arnoldi", 6, np.float32), ("lanczos", 6, np.float64)],
        DECOMPOSITIONS,
        (4, 6),
        (np.float32, np.float64),
    ),
)
def test_a_few_distinct_eigenvalues_are_a_breakdown(name, count, dtype):
    with jax.enable_x64(dtype == np.float64):
        _, matvec = equidistant(count)
        start = jax.random.normal(jax.random.key(0), (1000,), dtype)
        result = jax.jit(lambda: DECOMPOSITIONS[name].decompose(matvec, start, num_matvecs=20))()
        assert result.breakdown_step == count


@pytest.mark.parametrize(("name", "count"), usual([("lanczos", 12), ("arnoldi", 8)], DECOMPOSITIONS, (8, 10, 12)))
def test_rounding_grows_and_a_tolerance_can_say_so(x64, name, count):
    """The residual of the invariant space lies above the default tolerance for twelve eigenvalues, and far below 1."""
    exact, matvec = equidistant(count)
    start = jax.random.normal(jax.random.key(0), (1000,))

    def run(tolerance):
        options = {"num_matvecs": 20, "breakdown_tolerance": tolerance}
        result = jax.jit(lambda: DECOMPOSITIONS[name].decompose(matvec, start, **options))()
        return result.breakdown_step, DECOMPOSITIONS[name].matrix(result)

    step, matrix = run(1e-11)
    assert step == count
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(matrix[:count, :count]).real), exact, rtol=1e-12)
    step, matrix = run(0.0)
    assert step == -1
    if count == 12:
        assert run(None)[0] == -1
    # What follows changes no quadrature.
    values, vectors = np.linalg.eigh((matrix + matrix.T) / 2)
    dense = jnp.sum(start**2 * jnp.log(matvec(jnp.ones(1000)))) / jnp.sum(start**2)
    np.testing.assert_allclose(vectors[0] ** 2 @ np.log(values), dense, rtol=1e-13)


def test_scale_is_the_largest_product_so_far(x64):
    """Products with the later vectors are small, and their rounding is that of the first ones."""
    values = jnp.ones(50).at[0].set(1e8)
    start = jnp.full(50, 1e-3).at[0].set(1.0)
    result = lanczos(lambda v: values * v, start, num_matvecs=5)
    assert result.breakdown_step == 2


def test_eigenpairs_past_an_invariant_space(x64):
    """Two eigenvalues: one vector of each eigenspace, unless rounding is followed, which finds true ones."""
    values = jnp.repeat(jnp.array([3.0, 2.0]), 100)
    options = {"num_pairs": 5, "num_matvecs": 5}
    start = jax.random.normal(jax.random.key(0), (200,))
    pairs = leading_eigenpairs(lambda v: values * v, start, **options)
    np.testing.assert_allclose(pairs.values, [3, 2, 0, 0, 0], rtol=1e-14)
    pairs = leading_eigenpairs(lambda v: values * v, start, breakdown_tolerance=0.0, **options)
    assert np.count_nonzero(pairs.values) > 2
    np.testing.assert_allclose(pairs.vectors * values, pairs.values[:, None] * pairs.vectors, atol=1e-12)


# Second derivatives of Lanczos are in `test_decompositions.py`.
@pytest.mark.parametrize("name", usual(["arnoldi"], DECOMPOSITIONS))
def test_second_derivatives_past_a_breakdown_are_not_a_number(x64, name):
    """They would need directions that the recurrence has not seen. At the breakdown itself they are right."""
    method = DECOMPOSITIONS[name]
    start = jnp.arange(1.0, SIZE + 1)

    def trace_of_cube(values, depth):
        matvec = lambda v, values: jnp.repeat(values, 4) * v  # noqa: E731
        result = method.decompose(matvec, start, values, num_matvecs=depth)
        return result.start_norm**2 * (jnp.linalg.matrix_power(method.matrix(result), 3))[0, 0]

    def exact(values):
        return jnp.sum(start**2 * jnp.repeat(values, 4) ** 3)

    values = jnp.array([3.0, 2.0, 1.0])
    run = jax.jit(jax.hessian(trace_of_cube), static_argnums=1)
    np.testing.assert_allclose(run(values, 3), jax.hessian(exact)(values), atol=1e-9)
    assert np.isnan(run(values, 5)).all()
    if name == "lanczos":  # in reverse mode twice as well
        twice = jax.jit(jax.jacrev(jax.grad(trace_of_cube)), static_argnums=1)
        assert np.isnan(twice(values, 5)).all()
    gradient = jax.jit(jax.grad(trace_of_cube), static_argnums=1)(values, 5)
    np.testing.assert_allclose(gradient, jax.grad(exact)(values), rtol=1e-12)


@pytest.mark.exhaustive  # as `test_second_derivatives` of `test_decompositions.py`, in two arguments
@both
def test_mixed_second_derivatives_in_any_mode(x64, name):
    """An outer derivative in an argument that the inner one leaves out is forward over reverse, which is allowed."""
    method = DECOMPOSITIONS[name]

    def loss(values, shift):
        matvec = lambda v, values, shift: values * v + shift * jnp.roll(v, 1) + shift * jnp.roll(v, -1)  # noqa: E731
        return jnp.sum(method.matrix(method.decompose(matvec, start, values, shift, num_matvecs=3)) ** 2)

    start = jnp.arange(1.0, SIZE + 1)
    values = jnp.linspace(1, 2, SIZE)
    forward, reverse = (jax.jit(outer(jax.grad(loss), 1))(values, 0.3) for outer in (jax.jacfwd, jax.jacrev))
    assert_close(forward, reverse, 1e-11)
    if name == "lanczos":  # without jit as well
        np.testing.assert_allclose(jax.jacfwd(jax.grad(loss), 1)(values, 0.3), forward, rtol=1e-12)


def test_tridiagonal_matrix_is_symmetric():
    matrix = tridiagonal_matrix(jnp.arange(3.0), jnp.array([5.0, 6.0]))
    np.testing.assert_array_equal(matrix, [[0, 5, 0], [5, 1, 6], [0, 6, 2]])
