"""Functions of a matrix times a vector, against dense ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cases import usual

from bnnlaplace.krylov import matfun_arnoldi, matfun_lanczos
from bnnlaplace.krylov.tridiagonal import divided_differences

SIZE = 10
FUNCTIONS = {
    "inverse square root": jax.lax.rsqrt,
    "square root": jnp.sqrt,
    "logarithm": jnp.log,
    "exponential": jnp.exp,
    "own": lambda x: jnp.sin(x) / (1 + x),
}


@pytest.fixture
def problem(x64):
    rng = np.random.default_rng(0)
    half = rng.normal(size=(SIZE, SIZE)) / 4
    return jnp.asarray(half), jnp.asarray(rng.normal(size=SIZE)), jnp.asarray(rng.normal(size=SIZE))


def symmetric(half):
    return half @ half.T + jnp.diag(jnp.linspace(0.5, 2, SIZE))


def dense(function, matrix, vector):
    values, vectors = jnp.linalg.eigh(matrix)
    return vectors @ (function(values) * (vectors.T @ vector))


@pytest.mark.parametrize("name", usual(["logarithm"], FUNCTIONS))
def test_lanczos_at_full_depth_is_dense(problem, name):
    half, vector, weights = problem
    function = FUNCTIONS[name]

    def ours(half, vector):
        product = lambda v, half: symmetric(half) @ v  # noqa: E731
        result = matfun_lanczos(function, product, vector, half, num_matvecs=SIZE)
        return weights @ result.value, result

    (_, result), gradients = jax.jit(jax.value_and_grad(ours, (0, 1), has_aux=True))(half, vector)
    dense_loss = lambda h, v: weights @ dense(function, symmetric(h), v)  # noqa: E731
    reference = jax.jit(jax.grad(dense_loss, (0, 1)))(half, vector)
    expected = dense(function, symmetric(half), vector)
    np.testing.assert_allclose(result.value, expected, rtol=0, atol=1e-12 * float(jnp.abs(expected).max()))
    assert result.error == 0
    for mine, other in zip(gradients, reference, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-10 * float(jnp.abs(other).max()))


@pytest.mark.parametrize(
    ("gradient", "reorthogonalise"),
    usual([("adjoint", "none")], ("adjoint", "autodiff"), ("full", "none")),
)
def test_arnoldi_at_full_depth_is_dense(problem, gradient, reorthogonalise):
    half, vector, weights = problem

    def ours(half, vector):
        result = matfun_arnoldi(
            jax.scipy.linalg.expm,
            lambda v, half: half @ v,
            vector,
            half,
            num_matvecs=SIZE,
            gradient=gradient,
            reorthogonalise=reorthogonalise,
        )
        return weights @ result.value

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(half, vector)
    # The gradient of w' exp(A) v in A is the Frechet derivative of exp at A' in the direction w v'.
    exponential, slope = scipy.linalg.expm_frechet(np.asarray(half).T, np.outer(weights, vector))
    np.testing.assert_allclose(value, weights @ exponential.T @ vector, rtol=1e-11)
    for mine, other in zip(gradients, (slope, exponential @ weights), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-9 * np.abs(other).max())


@pytest.mark.parametrize("depth", usual([3], [3, 5, 7]))
def test_error_estimate(problem, depth):
    half, vector, _ = problem
    product = lambda v: symmetric(half) @ v  # noqa: E731
    symmetric_result = jax.jit(lambda: matfun_lanczos(jnp.log, product, vector, num_matvecs=depth))()
    error = jnp.linalg.norm(symmetric_result.value - dense(jnp.log, symmetric(half), vector))
    assert error / 3 < symmetric_result.error < 100 * error
    expm = jax.scipy.linalg.expm
    general = jax.jit(lambda: matfun_arnoldi(expm, lambda v: half @ v, vector, num_matvecs=depth))()
    error = np.linalg.norm(general.value - scipy.linalg.expm(half) @ vector)
    assert error / 3 < general.error < 100 * error


def test_gradient_in_what_the_function_closes_over(problem):
    half, vector, weights = problem

    def ours(shift):
        function = lambda x: jax.lax.rsqrt(x + shift)  # noqa: E731
        return weights @ matfun_lanczos(function, lambda v: symmetric(half) @ v, vector, num_matvecs=SIZE).value

    expected = jax.grad(lambda s: weights @ dense(lambda x: jax.lax.rsqrt(x + s), symmetric(half), vector))(0.7)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(0.7), expected, rtol=1e-10)


def test_breakdown_and_single_step(problem):
    _, vector, _ = problem
    for function, depth in ((jnp.log, 1), (jax.lax.rsqrt, 4)):
        options = {"num_matvecs": depth}
        result = jax.jit(lambda f=function, o=options: matfun_lanczos(f, lambda v: 3.0 * v, vector, **o))()
        np.testing.assert_allclose(result.value, function(3.0) * vector, rtol=1e-13)
        assert result.error == 0
    # The inverse is not defined for the zeros that follow a breakdown in H.
    for function, factor in ((jax.scipy.linalg.expm, np.exp(3.0)), (jnp.linalg.inv, 1 / 3)):
        result = jax.jit(lambda f=function: matfun_arnoldi(f, lambda v: 3.0 * v, vector, num_matvecs=4))()
        np.testing.assert_allclose(result.value, factor * vector, rtol=1e-12)


def test_pytrees(problem):
    half, vector, _ = problem

    def product(tree):
        image = symmetric(half) @ jnp.concatenate([tree["a"].reshape(-1), tree["b"]])
        return {"a": image[:6].reshape(2, 3), "b": image[6:]}

    tree = {"a": vector[:6].reshape(2, 3), "b": vector[6:]}
    result = jax.jit(lambda: matfun_lanczos(jnp.sqrt, product, tree, num_matvecs=SIZE))()
    expected = dense(jnp.sqrt, symmetric(half), vector)
    np.testing.assert_allclose(result.value["a"].reshape(-1), expected[:6], rtol=1e-11)
    np.testing.assert_allclose(result.value["b"], expected[6:], rtol=1e-11)


@pytest.mark.parametrize("method", usual([matfun_arnoldi], [matfun_lanczos, matfun_arnoldi]))
def test_every_option_reaches_the_program(method):
    def program(**options):
        run = lambda v, d: method(jnp.sin, lambda v, d: d * v, v, d, num_matvecs=3, **options).value.sum()  # noqa: E731
        return str(jax.make_jaxpr(jax.grad(run, 1))(jnp.ones(5), jnp.arange(5.0)))

    options = {"reorthogonalise": "none"}, {"gradient": "autodiff"}, {"vjp_batch_size": 2}
    programs = [program(), *(program(**option) for option in options)]
    assert len(set(programs)) == len(programs)


def test_gradient_of_a_function_that_is_almost_constant():
    """Single precision: all but one coordinate of f(A) v are of the size of `largest`, and divided by it."""
    weights = np.array([1, 2, 3], np.float32)

    def ours(values):
        result = matfun_lanczos(lambda x: 1 / (1 + x), lambda v, d: d * v, jnp.ones(3), values, num_matvecs=3)
        return weights @ result.value

    gradient = jax.jit(jax.grad(ours))
    for largest in (1e-8, 1.0):
        values = (largest * np.array([0.1, 0.4, 1.0])).astype(np.float32)
        np.testing.assert_allclose(gradient(values), -weights / (1 + values) ** 2, rtol=1e-4)


EXACT_DIVIDED_DIFFERENCES = {
    "exponential": (jnp.exp, lambda x, y: np.exp((x + y) / 2) * np.sinc((x - y) / 2j / np.pi).real),
    "resolvent": (lambda x: 1 / (1 + x), lambda x, y: -1 / ((1 + x) * (1 + y))),
    "square root": (jnp.sqrt, lambda x, y: 1 / (np.sqrt(x) + np.sqrt(y))),
    "cube": (lambda x: x**3, lambda x, y: x**2 + x * y + y**2),
}


@pytest.mark.parametrize("name", EXACT_DIVIDED_DIFFERENCES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_divided_differences_of_eigenvalues_near_each_other_and_near_zero(name, dtype):
    function, exact = EXACT_DIVIDED_DIFFERENCES[name]
    around = np.array([1e-18, 1e-9, 1e-5, 1e-3, 0.1, 1.0, 3.0])
    values = np.concatenate([around, around * (1 + 1e-7), around * (1 + 1e-4), around * 1.03]).astype(dtype)
    with jax.enable_x64(dtype == np.float64):
        found = divided_differences(jax.vmap(function), jnp.asarray(values), jax.vmap(function)(values))
    expected = exact(values[:, None].astype(np.float64), values[None, :].astype(np.float64))
    np.testing.assert_allclose(found, expected, rtol=10 * np.finfo(dtype).eps ** (2 / 3))
