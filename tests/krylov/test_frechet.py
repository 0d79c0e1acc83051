"""Derivatives of f(A) v where the Krylov space of v is invariant, against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from decompositions import assert_close

from bnnlaplace.krylov import matfun_arnoldi, matfun_lanczos

SIZE = 10


def expm(matrix):
    return jax.scipy.linalg.expm(matrix)


METHODS = {"lanczos": (matfun_lanczos, jnp.exp), "arnoldi": (matfun_arnoldi, expm)}
methods = pytest.mark.parametrize("name", METHODS)


def operator(name, values, half):
    """Diagonal, with repeated values, where `half` is zero; symmetric for Lanczos."""
    matrix = jnp.diag(values)
    return matrix + half + half.T if name == "lanczos" else matrix + half


@pytest.fixture
def problem(x64):
    """Three eigenvalues in ten dimensions: a Krylov space of three, which almost every change of A leads out of."""
    rng = np.random.default_rng(0)
    values = jnp.asarray(np.resize([2.0, 1.5, 0.5], SIZE))
    return values, jnp.zeros((SIZE, SIZE)), jnp.asarray(rng.normal(size=SIZE)), jnp.asarray(rng.normal(size=SIZE))


def gradients(name, problem, scale=1.0, **options):
    """Of w' f(scale A) v in A's diagonal, in the rest of it, in v and in what f closes over."""
    values, half, vector, weights = problem
    method, function = METHODS[name]

    def loss(values, half, vector, scale):
        matvec = lambda v, values, half: operator(name, values, half) @ v  # noqa: E731
        return weights @ method(lambda x: function(scale * x), matvec, vector, values, half, **options).value

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(values, half, vector, scale)


def dense(name, problem, scale=1.0):
    values, half, vector, weights = problem
    loss = lambda values, half, vector, scale: weights @ expm(scale * operator(name, values, half)) @ vector  # noqa: E731
    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(values, half, vector, scale)


@methods
@pytest.mark.parametrize("gradient", ["adjoint", "frechet"])
@pytest.mark.parametrize("depth", [3, 6])
def test_gradient_in_an_invariant_space_is_dense(problem, name, gradient, depth):
    (value, ours), (expected, reference) = (
        gradients(name, problem, num_matvecs=depth, gradient=gradient),
        dense(name, problem),
    )
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    assert_close(ours, reference, 1e-12)


@methods
def test_differentiating_the_loop_misses_what_leaves_the_space(problem, name):
    """A negative control: it takes more than the recurrence that ended."""
    _, ours = gradients(name, problem, num_matvecs=6, gradient="autodiff")
    _, reference = dense(name, problem)
    assert jnp.abs(ours[1] - reference[1]).max() > 0.01 * jnp.abs(reference[1]).max()
    assert_close(ours[3], reference[3], 1e-12)


@methods
@pytest.mark.parametrize("gradient", ["adjoint", "frechet"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-4)])
def test_gradient_of_a_general_operator_at_full_depth_is_dense(name, gradient, dtype, tolerance):
    rng = np.random.default_rng(0)
    arrays = np.linspace(0.5, 2, SIZE), rng.normal(size=(SIZE, SIZE)) / 4, rng.normal(size=SIZE), rng.normal(size=SIZE)
    with jax.enable_x64(True):
        expected, reference = dense(name, tuple(map(jnp.asarray, arrays)))
    with jax.enable_x64(dtype == np.float64):
        single = tuple(jnp.asarray(array, dtype) for array in arrays)
        value, ours = gradients(name, single, dtype(1), num_matvecs=SIZE, gradient=gradient)
    assert value.dtype == dtype
    np.testing.assert_allclose(value, np.asarray(expected), rtol=tolerance)
    assert_close(ours, jax.tree.map(np.asarray, reference), tolerance)


@pytest.mark.parametrize("depth", [4, 6, 8])
def test_error_of_the_gradient_is_one_of_truncation(x64, depth):
    """Before the space is exhausted both are approximations, no worse than ten times the value."""
    rng = np.random.default_rng(0)
    half = jnp.asarray(rng.normal(size=(SIZE, SIZE)) / 4)
    vectors = jnp.asarray(rng.normal(size=(2, SIZE)))
    problem = jnp.linspace(0.5, 2, SIZE), half, *vectors
    (_, reference) = dense("lanczos", problem)
    errors = {}
    for gradient in ("adjoint", "frechet"):
        _, ours = gradients("lanczos", problem, num_matvecs=depth, gradient=gradient)
        errors[gradient] = float(jnp.linalg.norm(ours[1] - reference[1]) / jnp.linalg.norm(reference[1]))
    assert errors["frechet"] < 10 * errors["adjoint"]
    assert errors["frechet"] < 10.0 ** (1 - depth / 2)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_almost_invariant_space(x64, seed):
    """Rounding keeps the recurrence from ending, and the adjoint goes where rounding leads: "frechet" does not."""
    size, count = 200, 10
    values = jnp.resize(jnp.linspace(1, 10, count), size)
    vector, weights = jax.random.normal(jax.random.key(seed), (2, size))

    def gradient(kind):
        def loss(values):
            options = {"num_matvecs": 20, "gradient": kind}
            return weights @ matfun_lanczos(jnp.log, lambda v, values: values * v, vector, values, **options).value

        return jax.jit(jax.grad(loss))(values)

    exact = weights * vector / values
    assert_close(gradient("frechet"), exact, 1e-9)
    assert jnp.abs(gradient("adjoint") - exact).max() > 0.1 * jnp.abs(exact).max()


@methods
@pytest.mark.parametrize("gradient", ["adjoint", "frechet", "autodiff"])
def test_a_zero_vector_inside_of_jit(problem, name, gradient):
    """f(A) 0 = 0, also where f is not defined at zero; its gradient in v is f(A)' w."""
    values, half, _, weights = problem
    method = METHODS[name][0]
    function = {"lanczos": jnp.log, "arnoldi": jnp.linalg.inv}[name]

    def loss(vector, scale):
        matvec = lambda v: operator(name, values, half) @ v  # noqa: E731
        found = method(lambda x: function(scale * x), matvec, vector, num_matvecs=4, gradient=gradient)
        return weights @ found.value, found

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, found), (d_vector, d_scale) = run(jnp.zeros(SIZE), 1.0)
    assert value == 0 and not found.value.any() and found.error == 0
    assert d_scale == 0 and jnp.isfinite(d_vector).all()
    if gradient != "autodiff":
        exact = weights * (jnp.log(values) if name == "lanczos" else 1 / values)
        np.testing.assert_allclose(d_vector, exact, rtol=1e-12)


@methods
@pytest.mark.parametrize("gradient", ["adjoint", "frechet"])
def test_vmap_over_vectors_of_which_one_ends(problem, name, gradient):
    values, half, vector, weights = problem
    half = half.at[0, 1].set(0.3).at[1, 4].set(0.1)
    vectors = jnp.stack([vector, jnp.zeros(SIZE), jnp.eye(SIZE)[2]])
    cotangents = jnp.stack([weights, weights, jnp.zeros(SIZE)])
    method, function = METHODS[name]

    def loss(half, vector, weights):
        matvec = lambda v, half: operator(name, values, half) @ v  # noqa: E731
        return weights @ method(function, matvec, vector, half, num_matvecs=4, gradient=gradient).value

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    one_by_one = [run(half, *pair) for pair in zip(vectors, cotangents, strict=True)]
    losses, (d_half, d_vectors) = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    assert jnp.isfinite(d_half).all() and jnp.isfinite(d_vectors).all()
    many = jax.vmap(run, (None, 0, 0))
    assert_close(jax.jit(many)(half, vectors, cotangents), (losses, (d_half, d_vectors)), 1e-12)
    # A loss over the batch, and over a batch of batches.
    for shape in ((3,), (1, 3)) if gradient == "adjoint" else ((3,),):
        batch = jax.vmap(loss, (None, 0, 0))
        batch = batch if len(shape) == 1 else jax.vmap(batch, (None, 0, 0))
        total = jax.jit(jax.grad(lambda half, *rows, batch=batch: batch(half, *rows).sum(), (0, 1)))
        found = total(half, vectors.reshape(*shape, SIZE), cotangents.reshape(*shape, SIZE))
        assert_close(found, (d_half.sum(axis=0), d_vectors.reshape(*shape, SIZE)), 1e-12)


def test_function_need_not_be_defined_where_the_start_vector_looks(x64):
    """v' A v = 0 for an A that has an inverse, which has as many steps to take after the space has ended."""
    signs, rotation = jnp.resize(jnp.array([1.0, -1.0]), 4), jnp.kron(jnp.eye(2), jnp.array([[0.0, -1.0], [1.0, 0.0]]))
    for gradient in ("adjoint", "frechet"):

        def symmetric(d, gradient=gradient):
            options = {"num_matvecs": 3, "gradient": gradient}
            return matfun_lanczos(lambda x: 1 / x, lambda v, d: d * v, jnp.ones(4), d, **options).value

        np.testing.assert_allclose(symmetric(signs), 1 / signs, rtol=1e-14)
        np.testing.assert_allclose(jax.jit(jax.jacrev(symmetric))(signs), -jnp.eye(4), atol=1e-13)

        def general(matrix, gradient=gradient):
            options = {"num_matvecs": 4, "gradient": gradient}
            return matfun_arnoldi(jnp.linalg.inv, lambda v, m: m @ v, jnp.ones(4), matrix, **options).value.sum()

        value, slope = jax.jit(jax.value_and_grad(general))(rotation)
        expected, reference = jax.value_and_grad(lambda m: jnp.linalg.inv(m).sum())(rotation)
        np.testing.assert_allclose(value, expected, atol=1e-14)
        assert_close(slope, reference, 1e-13)


def test_second_derivative_along_a_direction_that_was_not_seen(x64):
    """The eigenvector e_1, and a change of A that leads out of it: not zero, and not known."""
    change = jnp.zeros((3, 3)).at[0, 1].set(1.0).at[1, 0].set(1.0)
    first = jnp.eye(3)[0]
    for name, (method, function) in METHODS.items():

        def loss(t, depth, method=method, function=function):
            matvec = lambda v, t: (jnp.diag(jnp.array([1.0, 2.0, 4.0])) + t * change) @ v  # noqa: E731
            return first @ method(function, matvec, first, t, num_matvecs=depth).value

        for depth in (1, 2):
            assert jnp.isnan(jax.jit(jax.hessian(loss), static_argnums=1)(0.0, depth)), (name, depth)


@methods
@pytest.mark.parametrize("outer", [jax.jacfwd, jax.jacrev])
def test_second_derivatives(problem, name, outer):
    """Right at full depth by the adjoint, NaN in an invariant space, refused by "frechet"."""
    values, half, vector, weights = problem
    method, function = METHODS[name]

    def loss(values, depth, gradient="adjoint"):
        matvec = lambda v, values: operator(name, values, half) @ v  # noqa: E731
        return weights @ method(function, matvec, vector, values, num_matvecs=depth, gradient=gradient).value

    distinct = jnp.linspace(0.5, 2, SIZE)
    hessian = jax.jit(outer(jax.grad(loss)), static_argnums=(1, 2))
    np.testing.assert_allclose(hessian(distinct, SIZE), jnp.diag(weights * vector * jnp.exp(distinct)), atol=1e-8)
    assert jnp.isnan(hessian(values, 6)).all()
    with pytest.raises(TypeError, match="gradient='frechet' has first derivatives only; use gradient='adjoint'"):
        hessian(distinct, SIZE, "frechet")
