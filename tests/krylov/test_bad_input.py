"""What every public function answers to arguments that it cannot use: its own name, the argument, and a way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace.krylov import (
    arnoldi,
    check_symmetric,
    lanczos,
    leading_eigenpairs,
    matfun_arnoldi,
    matfun_lanczos,
    normal_probes,
    rademacher_probes,
    stochastic_lanczos_quadrature,
)

SIZE = 4
VECTOR = jnp.ones(SIZE)
KEY = jax.random.key(0)
expm = jax.scipy.linalg.expm

# (positional arguments with the operator and the vector last, options)
CALLS = {
    lanczos: ((), "start", {"num_matvecs": 2}),
    arnoldi: ((), "start", {"num_matvecs": 2}),
    matfun_lanczos: ((jnp.exp,), "vector", {"num_matvecs": 2}),
    matfun_arnoldi: ((expm,), "vector", {"num_matvecs": 2}),
    stochastic_lanczos_quadrature: ((jnp.exp,), "probes", {"num_matvecs": 2}),
    leading_eigenpairs: ((), "start", {"num_matvecs": 2, "num_pairs": 1}),
    check_symmetric: ((), "vector", {}),
}
functions = pytest.mark.parametrize("function", CALLS, ids=lambda function: function.__name__)


def call(function, matvec=lambda v: v, vector=VECTOR, **options):
    before, argument, good = CALLS[function]
    if argument == "probes" and vector is VECTOR:
        vector = VECTOR[None]
    after = (KEY,) if function is check_symmetric else ()
    return function(*before, matvec, vector, *after, **{**good, **options})


@functions
def test_good_input_is_good(function):
    call(function)


@functions
@pytest.mark.parametrize("matvec", [None, np.eye(SIZE), "product"])
def test_an_operator_that_is_no_function(function, matvec):
    with pytest.raises(TypeError, match=rf"{function.__name__}\(matvec=...\) must be a function, such as lambda v"):
        call(function, matvec)


@functions
@pytest.mark.parametrize("matvec", [lambda v: np.eye(SIZE).dot(np.asarray(v)), lambda v: v if v[0] > 0 else -v])
def test_an_operator_that_cannot_be_traced(function, matvec):
    with pytest.raises(
        TypeError, match=rf"{function.__name__}\(matvec=...\) must be made of functions that JAX can trace"
    ):
        call(function, matvec)


@functions
@pytest.mark.parametrize("vector", [np.array(["a", "b"]), np.array([[object()]]), jnp.ones((2, 3), int), [KEY[None]]])
def test_a_vector_of_no_numbers(function, vector):
    argument = CALLS[function][1]
    with pytest.raises(TypeError, match=rf"{function.__name__}\({argument}=...\) must .* floating-point dtype; got "):
        call(function, vector=vector)


COUNTS = {
    lanczos: ("num_matvecs", "vjp_batch_size"),
    arnoldi: ("num_matvecs", "vjp_batch_size"),
    matfun_lanczos: ("num_matvecs", "vjp_batch_size"),
    matfun_arnoldi: ("num_matvecs", "vjp_batch_size"),
    stochastic_lanczos_quadrature: ("num_matvecs", "vjp_batch_size", "probe_batch_size"),
    leading_eigenpairs: ("num_matvecs", "num_pairs"),
    check_symmetric: ("num_probes",),
}


@pytest.mark.parametrize(
    ("function", "argument"),
    [(f, a) for f, names in COUNTS.items() for a in names],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_counts(function, argument):
    for value in (2.0, True, "2", None, np.array([1, 2])):
        with pytest.raises(TypeError, match=rf"{function.__name__}\({argument}=...\) must be an integer"):
            call(function, **{argument: value})
    for value in (0, -1):
        with pytest.raises(ValueError, match=rf"{function.__name__}\({argument}=...\) must .*got {value}"):
            call(function, **{argument: value})
    for value in (np.int64(1), jnp.asarray(1)):
        call(function, **{argument: value})
    with pytest.raises(TypeError, match=rf"{function.__name__}\({argument}=...\) .*make it a static argument of jit"):
        jax.jit(lambda count: call(function, **{argument: count}))(1)


@pytest.mark.parametrize("draw", [rademacher_probes, normal_probes])
def test_probes(draw):
    with pytest.raises(TypeError, match=rf"{draw.__name__}\(num_probes=...\) must be an integer"):
        draw(KEY, VECTOR, 2.0)
    with pytest.raises(TypeError, match=rf"{draw.__name__}\(like=...\) must have leaves of one real floating-point"):
        draw(KEY, jnp.arange(3), 2)


@pytest.mark.parametrize("caller", [matfun_lanczos, stochastic_lanczos_quadrature])
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (None, "must be a function, such as jnp.log; got NoneType"),
        (np.log, "must be made of functions that JAX can trace; .* use jax.numpy"),
        (lambda x: jnp.stack([x, x]), r"must take a scalar to one of the same dtype, float32\(\); got float32\(2,\)"),
        (lambda x: x + 1j, r"must take a scalar .* got complex64\(\)"),
        (lambda x: (x, x), "must take a scalar .* got tuple"),
        (lambda x: 1.0 if x > 0 else 0.0, "must be made of functions that JAX can trace"),
    ],
)
def test_functions_of_a_scalar(caller, function, message):
    vector = VECTOR[None] if caller is stochastic_lanczos_quadrature else VECTOR
    with pytest.raises(TypeError, match=rf"{caller.__name__}\(function=...\) {message}"):
        caller(function, lambda v: v, vector, num_matvecs=2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (3, "must be a function, such as jax.scipy.linalg.expm; got int"),
        (lambda m: m[0], r"must take a \d x \d matrix to one of the same dtype"),
        (lambda m: m.astype(complex), r"must take a \d x \d matrix .*; got complex64"),
        (np.linalg.inv, "must be made of functions that JAX can trace"),
    ],
)
def test_functions_of_a_matrix(function, message):
    with pytest.raises(TypeError, match=rf"matfun_arnoldi\(function=...\) {message}"):
        matfun_arnoldi(function, lambda v: v, VECTOR, num_matvecs=2)


@functions
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision(function, dtype):
    """The recurrences take it; what decomposes the small matrix does not."""
    vector = VECTOR.astype(dtype)
    vector = vector[None] if function is stochastic_lanczos_quadrature else vector
    if function in (lanczos, arnoldi, check_symmetric):
        call(function, vector=vector)
        return
    with pytest.raises(TypeError, match=rf"{function.__name__}\(.*must be float32 or float64.*; got .*float16"):
        call(function, vector=vector)


def test_check_symmetric_looks_at_numbers():
    for run in (
        jax.jit(lambda key: check_symmetric(lambda v: v, VECTOR, key)),
        jax.jit(lambda key: check_symmetric(lambda v: jax.random.key_data(key)[0] * v, VECTOR, KEY)),
        jax.jit(lambda key: check_symmetric(lambda v: v, VECTOR, KEY)),
    ):
        with pytest.raises(TypeError, match="check_symmetric.*known numbers.*outside of jit"):
            run(KEY)
    with pytest.raises(ValueError, match="check_symmetric\\(tolerance=...\\) must be a number, zero or more"):
        check_symmetric(lambda v: v, VECTOR, KEY, tolerance=-1.0)


@pytest.mark.parametrize("value", ["0.1", True, -0.1, 0.0, np.nan])
def test_relative_standard_error(value):
    with pytest.raises((TypeError, ValueError), match=r"quadrature\(relative_sem=...\) must be a positive number"):
        call(stochastic_lanczos_quadrature, relative_sem=value)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (doubled(x), None), lambda _, cotangent: (2 * cotangent,))


@pytest.mark.parametrize("function", [lanczos, arnoldi])
def test_forward_mode_of_a_custom_vjp_of_the_user(function):
    """A Hessian is forward over reverse, and fails where a product allows no forward mode: the message says so."""

    def loss(scale):
        matvec = lambda v, scale: doubled(scale * v * jnp.arange(1.0, 5))  # noqa: E731
        return jnp.sum(function(matvec, VECTOR, scale, num_matvecs=3).basis ** 3)

    with pytest.raises(TypeError, match=rf"{function.__name__}.*reverse mode only.*a function of yours .*custom_vjp"):
        jax.hessian(loss)(2.0)
    assert np.isfinite(jax.jacrev(jax.grad(loss))(2.0))
