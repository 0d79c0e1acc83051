"""Derivatives of f(A) v where the Krylov space of v is invariant, against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cases import usual
from krylov.decompositions import assert_close

from bnnlaplace.krylov import matfun_arnoldi, matfun_lanczos

SIZE = 10
METHODS = {"lanczos": (matfun_lanczos, jnp.exp), "arnoldi": (matfun_arnoldi, jax.scipy.linalg.expm)}
# The programs of an inverse compile in a third of the time of those of an exponential.
INVERSES = {"lanczos": (matfun_lanczos, lambda x: 1 / x), "arnoldi": (matfun_arnoldi, jnp.linalg.inv)}


def operator(name, values, half):
    """Diagonal, with repeated values, if `half` is zero; symmetric for Lanczos."""
    matrix = jnp.diag(values)
    return matrix + half + half.T if name == "lanczos" else matrix + half


@pytest.fixture
def problem(x64):
    """Three eigenvalues in ten dimensions: a Krylov space of three, which almost every change of A leads out of."""
    rng = np.random.default_rng(0)
    return np.resize([2.0, 1.5, 0.5], SIZE), np.zeros((SIZE, SIZE)), rng.normal(size=SIZE), rng.normal(size=SIZE)


def general_problem():
    """A problem with as many different eigenvalues as dimensions."""
    rng = np.random.default_rng(0)
    half, vector, weights = rng.normal(size=(SIZE, SIZE)) / 4, rng.normal(size=SIZE), rng.normal(size=SIZE)
    return np.linspace(0.5, 2, SIZE), half, vector, weights


def gradients(name, problem, scale=1.0, **options):
    """w' f(scale A) v, and its gradient in A's diagonal, in the rest of it, in v and in what f closes over."""
    values, half, vector, weights = problem
    method, function = METHODS[name]

    def loss(values, half, vector, scale):
        matvec = lambda v, values, half: operator(name, values, half) @ v  # noqa: E731
        return weights @ method(lambda x: function(scale * x), matvec, vector, values, half, **options).value

    return jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3)))(values, half, vector, scale)


def dense(name, problem):
    """The same for scale 1, by SciPy: the gradient in A is the Frechet derivative of exp at A', in direction w v'."""
    values, half, vector, weights = problem
    matrix = np.diag(values) + half + (half.T if name == "lanczos" else 0)
    exponential, slope = scipy.linalg.expm_frechet(matrix.T, np.outer(weights, vector))
    d_half = slope + slope.T if name == "lanczos" else slope
    d_scale = np.sum(slope * matrix)
    return weights @ exponential.T @ vector, (np.diag(slope), d_half, exponential @ weights, d_scale)


@pytest.mark.parametrize(
    ("name", "gradient", "depth"),
    usual(
        [("lanczos", "adjoint", 3), ("arnoldi", "frechet", 6)],
        METHODS,
        ("adjoint", "frechet"),
        (3, 6),
    ),
)
def test_gradient_in_an_invariant_space_is_dense(problem, name, gradient, depth):
    value, ours = gradients(name, problem, num_matvecs=depth, gradient=gradient)
    expected, reference = dense(name, problem)
    np.testing.assert_allclose(value, expected, rtol=1e-13)
    assert_close(ours, reference, 1e-12)


@pytest.mark.parametrize("name", usual(["arnoldi"], METHODS))
def test_differentiating_the_loop_misses_what_leaves_the_space(problem, name):
    """A negative control: it takes more than the recurrence that ended."""
    _, ours = gradients(name, problem, num_matvecs=6, gradient="autodiff")
    _, reference = dense(name, problem)
    assert np.abs(ours[1] - reference[1]).max() > 0.01 * np.abs(reference[1]).max()
    assert_close(ours[3], reference[3], 1e-12)


@pytest.mark.parametrize(
    ("name", "gradient", "dtype"),
    usual(
        [("lanczos", "frechet", np.float64), ("arnoldi", "adjoint", np.float32)],
        METHODS,
        ("adjoint", "frechet"),
        (np.float32, np.float64),
    ),
)
def test_gradient_of_a_general_operator_at_full_depth_is_dense(name, gradient, dtype):
    tolerance = {np.float64: 1e-10, np.float32: 1e-4}[dtype]
    arrays = general_problem()
    with jax.enable_x64(dtype == np.float64):
        rounded = tuple(jnp.asarray(array, dtype) for array in arrays)
        value, ours = gradients(name, rounded, dtype(1), num_matvecs=SIZE, gradient=gradient)
    assert value.dtype == dtype
    expected, reference = dense(name, arrays)
    np.testing.assert_allclose(value, expected, rtol=tolerance)
    assert_close(ours, reference, tolerance)


@pytest.mark.exhaustive  # at full depth the gradient is compared above, and the error of a value in `test_matfun.py`
@pytest.mark.parametrize("depth", (4, 6, 8))
def test_error_of_the_gradient_is_one_of_truncation(x64, depth):
    """Before the space is exhausted both are approximations, no worse than ten times the value."""
    problem = general_problem()
    _, reference = dense("lanczos", problem)
    errors = {}
    for gradient in ("adjoint", "frechet"):
        _, ours = gradients("lanczos", problem, num_matvecs=depth, gradient=gradient)
        errors[gradient] = np.linalg.norm(ours[1] - reference[1]) / np.linalg.norm(reference[1])
    assert errors["frechet"] < 10 * errors["adjoint"]
    assert errors["frechet"] < 10.0 ** (1 - depth / 2)


def test_an_almost_invariant_space(x64):
    """Rounding keeps the recurrence from ending, and the adjoint goes where rounding leads. "frechet" does not."""
    size, count = 200, 10
    values = jnp.resize(jnp.linspace(1, 10, count), size)

    def gradient(kind):
        def loss(values, vector, weights):
            options = {"num_matvecs": 20, "gradient": kind}
            return weights @ matfun_lanczos(jnp.log, lambda v, values: values * v, vector, values, **options).value

        return jax.jit(jax.grad(loss))

    frechet, adjoint = gradient("frechet"), gradient("adjoint")
    for seed in (1, 2, 3):
        vector, weights = jax.random.normal(jax.random.key(seed), (2, size))
        exact = weights * vector / values
        assert_close(frechet(values, vector, weights), exact, 1e-9)
        assert jnp.abs(adjoint(values, vector, weights) - exact).max() > 0.1 * jnp.abs(exact).max()


@pytest.mark.parametrize(
    ("name", "gradient"),
    usual(
        [("lanczos", "adjoint")],
        METHODS,
        ("adjoint", "frechet", "autodiff"),
    ),
)
def test_a_zero_vector_inside_of_jit(problem, name, gradient):
    """f(A) 0 = 0, even if f is not defined at zero. Its gradient in v is f(A)' w."""
    values, half, _, weights = problem
    method = METHODS[name][0]
    function = {"lanczos": jnp.log, "arnoldi": jnp.linalg.inv}[name]

    def loss(vector, scale):
        matvec = lambda v: operator(name, values, half) @ v  # noqa: E731
        result = method(lambda x: function(scale * x), matvec, vector, num_matvecs=4, gradient=gradient)
        return weights @ result.value, result

    run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    (value, result), (d_vector, d_scale) = run(np.zeros(SIZE), 1.0)
    assert value == 0 and not result.value.any() and result.error == 0
    assert d_scale == 0 and np.isfinite(d_vector).all()
    if gradient != "autodiff":
        exact = weights * (np.log(values) if name == "lanczos" else 1 / values)
        np.testing.assert_allclose(d_vector, exact, rtol=1e-12)


@pytest.mark.parametrize(
    ("name", "gradient"),
    usual([("arnoldi", "frechet")], METHODS, ("adjoint", "frechet")),
)
def test_vmap_over_vectors_of_which_one_ends(problem, name, gradient):
    values, half, vector, weights = map(jnp.asarray, problem)
    half = half.at[0, 1].set(0.3).at[1, 4].set(0.1)
    vectors = jnp.stack([vector, jnp.zeros(SIZE), jnp.eye(SIZE)[2]])
    cotangents = jnp.stack([weights, weights, jnp.zeros(SIZE)])
    method, function = INVERSES[name]

    def loss(half, vector, weights):
        matvec = lambda v, half: operator(name, values, half) @ v  # noqa: E731
        return weights @ method(function, matvec, vector, half, num_matvecs=4, gradient=gradient).value

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    one_by_one = [run(half, *pair) for pair in zip(vectors, cotangents, strict=True)]
    losses, (d_half, d_vectors) = jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one)
    assert jnp.isfinite(d_half).all() and jnp.isfinite(d_vectors).all()
    many = jax.vmap(run, (None, 0, 0))
    assert_close(jax.jit(many)(half, vectors, cotangents), (losses, (d_half, d_vectors)), 1e-12)
    # A loss over the batch, and over a batch of batches; for one method, since this does not depend on the method.
    for shape in ((3,), (1, 3)) if (name, gradient) == ("lanczos", "adjoint") else ():
        batch = jax.vmap(loss, (None, 0, 0))
        batch = batch if len(shape) == 1 else jax.vmap(batch, (None, 0, 0))
        total = jax.jit(jax.grad(lambda half, *rows, batch=batch: batch(half, *rows).sum(), (0, 1)))
        summed = total(half, vectors.reshape(*shape, SIZE), cotangents.reshape(*shape, SIZE))
        assert_close(summed, (d_half.sum(axis=0), d_vectors.reshape(*shape, SIZE)), 1e-12)


@pytest.mark.parametrize("gradient", usual(["frechet"], ["adjoint", "frechet"]))
def test_function_need_not_be_defined_where_the_start_vector_looks(x64, gradient):
    """v' A v = 0 for an A that has an inverse, and there are as many steps to take after the space has ended."""
    signs, rotation = np.resize([1.0, -1.0], 4), np.kron(np.eye(2), np.array([[0.0, -1.0], [1.0, 0.0]]))
    ones = np.ones(4)

    def symmetric(d):
        options = {"num_matvecs": 3, "gradient": gradient}
        value = matfun_lanczos(lambda x: 1 / x, lambda v, d: d * v, ones, d, **options).value
        return value, value

    slopes, value = jax.jit(jax.jacrev(symmetric, has_aux=True))(signs)
    np.testing.assert_allclose(value, 1 / signs, rtol=1e-14)
    np.testing.assert_allclose(slopes, -np.eye(4), atol=1e-13)

    def general(matrix):
        options = {"num_matvecs": 4, "gradient": gradient}
        return matfun_arnoldi(jnp.linalg.inv, lambda v, m: m @ v, ones, matrix, **options).value.sum()

    value, slope = jax.jit(jax.value_and_grad(general))(rotation)
    inverse = np.linalg.inv(rotation)
    np.testing.assert_allclose(value, inverse.sum(), atol=1e-14)
    assert_close(slope, -np.outer(inverse.T @ ones, inverse @ ones), 1e-13)


@pytest.mark.parametrize(("name", "depth"), usual([("arnoldi", 2)], METHODS, (1, 2)))
def test_second_derivative_along_a_direction_that_was_not_seen(x64, name, depth):
    """The eigenvector e_1, and a change of A that leads out of it: the derivative is not zero, and not known."""
    change = np.zeros((3, 3))
    change[0, 1] = change[1, 0] = 1
    first = np.eye(3)[0]
    method, function = INVERSES[name]

    def loss(t):
        matvec = lambda v, t: (np.diag([1.0, 2.0, 4.0]) + t * change) @ v  # noqa: E731
        return first @ method(function, matvec, first, t, num_matvecs=depth).value

    assert np.isnan(jax.jit(jax.hessian(loss))(0.0))


@pytest.mark.parametrize(
    ("name", "outer"),
    usual([("arnoldi", jax.jacfwd)], METHODS, (jax.jacfwd, jax.jacrev)),
)
def test_second_derivatives(x64, name, outer):
    """Right at full depth by the adjoint, NaN in an invariant space, refused by "frechet"."""
    rng, size = np.random.default_rng(0), 5
    distinct, vector, weights = np.linspace(0.5, 2, size), rng.normal(size=size), rng.normal(size=size)
    method, function = INVERSES[name]

    def loss(values, gradient):
        options = {"num_matvecs": size, "gradient": gradient}
        return weights @ method(function, lambda v, values: values * v, vector, values, **options).value

    hessian = jax.jit(outer(jax.grad(loss)), static_argnums=1)
    exact = np.diag(2 * weights * vector / distinct**3)
    np.testing.assert_allclose(hessian(distinct, "adjoint"), exact, atol=1e-8)
    assert np.isnan(hessian(np.resize([2.0, 1.5, 0.5], size), "adjoint")).all()
    with pytest.raises(TypeError, match="gradient='frechet' has first derivatives only; use gradient='adjoint'"):
        hessian(distinct, "frechet")
