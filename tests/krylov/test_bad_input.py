"""Every public function refuses arguments that it cannot use, and names itself, the argument, and a way out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from krylov.decompositions import DECOMPOSITIONS, SIZE, Refusal, check_refusals

from bnnlaplace.krylov import (
    arnoldi,
    block_lanczos,
    check_symmetric,
    lanczos,
    leading_eigenpairs,
    matfun_arnoldi,
    matfun_lanczos,
    normal_probes,
    rademacher_probes,
    stochastic_lanczos_quadrature,
)

pytestmark = pytest.mark.usefixtures("unchecked_annotations")

VECTOR = jnp.ones(4)
KEY = jax.random.key(0)
expm = jax.scipy.linalg.expm

# What comes before the operator, the name of the vector, the options
CALLS = {
    lanczos: ((), "start", {"num_matvecs": 2}),
    arnoldi: ((), "start", {"num_matvecs": 2}),
    matfun_lanczos: ((jnp.exp,), "vector", {"num_matvecs": 2}),
    matfun_arnoldi: ((expm,), "vector", {"num_matvecs": 2}),
    stochastic_lanczos_quadrature: ((jnp.exp,), "probes", {"num_matvecs": 2}),
    leading_eigenpairs: ((), "start", {"num_matvecs": 2, "num_pairs": 1}),
    check_symmetric: ((), "vector", {}),
}


def call(function, matvec=lambda v: v, vector=VECTOR, **options):
    before, argument, good = CALLS[function]
    if argument == "probes" and vector is VECTOR:
        vector = VECTOR[None]
    after = (KEY,) if function is check_symmetric else ()
    return function(*before, matvec, vector, *after, **{**good, **options})


def trace(function, *arguments, **options):
    """Call it while JAX traces, which is when arguments are checked, without compiling anything."""
    if function is check_symmetric:  # refuses to be traced
        return call(function, *arguments, **options)
    return jax.eval_shape(lambda: call(function, *arguments, **options))


def test_good_input_is_good():
    """A negative control of the tables below."""
    for function in CALLS:
        trace(function)


def test_operators():
    cannot_be_traced = (lambda v: np.eye(4).dot(np.asarray(v)), lambda v: v if v[0] > 0 else -v)
    refusals = []
    wrong_size, broken = (lambda v: jnp.eye(7) @ v), (lambda v: v.no_such_attribute)
    for function in CALLS:
        name = function.__name__
        for matvec, message in (
            (wrong_size, "TypeError: dot_general"),
            (broken, "AttributeError: .*no_such_attribute"),
        ):
            pattern = rf"^{name}\(matvec=...\) must take a vector like the one given, shape \(4,\); got {message}"
            refusals.append(Refusal(f"{name} {message}", lambda f=function, m=matvec: call(f, m), TypeError, pattern))
        for matvec in (None, np.eye(4), "product"):
            pattern = rf"^{name}\(matvec=...\) must be a function, such as lambda v"
            refusals.append(Refusal(f"{name} {matvec}", lambda f=function, m=matvec: call(f, m), TypeError, pattern))
        for matvec in cannot_be_traced:
            pattern = rf"^{name}\(matvec=...\) must be made of functions that JAX can trace"
            refusals.append(Refusal(name, lambda f=function, m=matvec: call(f, m), TypeError, pattern))
    check_refusals(refusals)


def test_vectors_of_no_numbers():
    vectors = np.array(["a", "b"]), np.array([[object()]]), jnp.ones((2, 3), int), [KEY[None]]
    check_refusals(
        Refusal(
            f"{function.__name__} of {vector}",
            lambda f=function, v=vector: call(f, vector=v),
            TypeError,
            rf"^{function.__name__}\({argument}=...\) must .* floating-point dtype; got ",
        )
        for function, (_, argument, _) in CALLS.items()
        for vector in vectors
    )


COUNTS = {
    lanczos: ("num_matvecs", "vjp_batch_size"),
    arnoldi: ("num_matvecs", "vjp_batch_size"),
    matfun_lanczos: ("num_matvecs", "vjp_batch_size"),
    matfun_arnoldi: ("num_matvecs", "vjp_batch_size"),
    stochastic_lanczos_quadrature: ("num_matvecs", "vjp_batch_size", "probe_batch_size"),
    leading_eigenpairs: ("num_matvecs", "num_pairs"),
    check_symmetric: ("num_probes",),
}


def test_counts():
    refusals = []
    for function, argument in ((function, argument) for function, names in COUNTS.items() for argument in names):
        where = rf"^{function.__name__}\({argument}=...\)"
        for value in (2.0, True, "2", None, np.array([1, 2])):
            wrong = lambda f=function, a=argument, v=value: call(f, **{a: v})  # noqa: E731
            refusals.append(Refusal(f"{where} {value}", wrong, TypeError, rf"{where} must be an integer"))
        for value in (0, -1):
            outside = lambda f=function, a=argument, v=value: call(f, **{a: v})  # noqa: E731
            refusals.append(Refusal(f"{where} {value}", outside, ValueError, rf"{where} must .*got {value}"))
        traced = lambda f=function, a=argument: jax.jit(lambda count: call(f, **{a: count}))(1)  # noqa: E731
        refusals.append(Refusal(where, traced, TypeError, rf"{where} .*make it a static argument of jit"))
        for value in (np.int64(1), jnp.asarray(1)):
            trace(function, **{argument: value})
    check_refusals(refusals)


def test_numbers():
    """A tolerance is zero or more, a standard error is positive, and both are known while JAX traces."""
    refusals = []
    for value in ("small", b"a", 10**400, jnp.asarray(True), True, -1.0, np.nan, np.inf):
        error = ValueError if isinstance(value, float) else TypeError
        for function, argument in (
            (lanczos, "breakdown_tolerance"),
            (arnoldi, "breakdown_tolerance"),
            (leading_eigenpairs, "breakdown_tolerance"),
            (leading_eigenpairs, "tolerance"),
            (check_symmetric, "tolerance"),
        ):
            pattern = rf"^{function.__name__}\({argument}=.* must be a number, zero or more"
            wrong = lambda f=function, a=argument, v=value: call(f, **{a: v})  # noqa: E731
            refusals.append(Refusal(f"{function.__name__} {value}", wrong, error, pattern))
    for value in ("0.1", True, -0.1, 0.0, np.nan):
        error = ValueError if isinstance(value, float) else TypeError
        pattern = r"quadrature\(relative_sem=...\) must be (a positive number|one positive, finite number)"
        wrong = lambda v=value: call(stochastic_lanczos_quadrature, relative_sem=v)  # noqa: E731
        refusals.append(Refusal(f"relative_sem {value}", wrong, error, pattern))
    traced = lambda: jax.jit(lambda tolerance: call(lanczos, breakdown_tolerance=tolerance))(1e-3)  # noqa: E731
    pattern = "breakdown_tolerance=.*known while JAX traces.*static argument"
    check_refusals([*refusals, Refusal("traced", traced, TypeError, pattern)])


# Changes of a good call of a decomposition
BAD = {
    "depth 0": ({"num_matvecs": 0}, ValueError, "num_matvecs=.* between 1 and the dimension 12; got 0; raise it"),
    "depth 13": ({"num_matvecs": 13}, ValueError, "num_matvecs=.* between 1 and the dimension 12; got 13; lower it"),
    "gradient": ({"gradient": "magic"}, ValueError, "gradient=.* must be 'adjoint' or 'autodiff'; got 'magic'"),
    "option": ({"reorthogonalise": "half"}, ValueError, "reorthogonalise=.* must be 'full' or 'none'; got 'half'"),
    "batch": ({"vjp_batch_size": 0}, ValueError, "vjp_batch_size=.* at least 1; got 0"),
    "zero": ({"start": np.zeros(SIZE)}, ValueError, "start=.* must not be zero; .* jax.random.normal"),
    "NaN": ({"start": np.where(np.arange(SIZE) == 2, np.nan, 1.0)}, ValueError, "start=.* finite; got 1 of 12 entries"),
    "infinite": ({"start": np.full(SIZE, np.inf)}, ValueError, "start=.* finite; got 12 of 12 entries"),
    "empty": ({"start": np.ones(0)}, ValueError, "start=.* at least one entry"),
    "no leaves": ({"start": ()}, TypeError, "start=.* one real floating-point dtype; got no leaves"),
    "integers": ({"start": np.arange(SIZE)}, TypeError, "start=.* floating-point dtype; got int32; cast"),
    "complex": ({"start": np.ones(SIZE) * 1j}, TypeError, "start=.* real floating.*; got complex64; .* imaginary"),
    "mixed": (
        {"start": (np.ones(3), np.ones(3, np.float16))},
        TypeError,
        "start=.* one real floating-point dtype; got float16, float32",
    ),
    "structure": ({"matvec": lambda v: (v, v)}, TypeError, "matvec=.* must return the structure that it takes"),
    "shape": ({"matvec": lambda v: v[:-1]}, TypeError, r"matvec=.* float32\(12,\); got float32\(11,\)"),
    "dtype": ({"matvec": lambda v: v.astype(jnp.float16)}, TypeError, r"matvec=.*; got float16\(12,\); .*cast"),
}


def test_decompositions():
    good = {"matvec": lambda v: v, "start": np.ones(SIZE), "num_matvecs": 3}

    def run(name, changed):
        options = {**good, **changed}
        return DECOMPOSITIONS[name].decompose(options.pop("matvec"), options.pop("start"), **options)

    check_refusals(
        Refusal(f"{name} {case}", lambda n=name, c=changed: run(n, c), error, rf"^{name}\({message}")
        for name in DECOMPOSITIONS
        for case, (changed, error, message) in BAD.items()
    )


BAD_QUADRATURE = {
    "depth": ({"num_matvecs": 0}, ValueError, "num_matvecs=.* between 1 and the dimension 12; got 0"),
    "gradient": ({"gradient": "one"}, ValueError, "gradient=.* 'adjoint', 'quadrature' or 'autodiff'; got 'one'"),
    "reorthogonalise": ({"reorthogonalise": True}, ValueError, "reorthogonalise=.* got True"),
    "batch": ({"probe_batch_size": 0}, ValueError, "probe_batch_size=.* at least 1; got 0"),
    "relative": ({"relative_sem": 0.0}, ValueError, "relative_sem=.* must be one positive, finite number"),
    "autodiff": ({"relative_sem": 0.1, "gradient": "autodiff"}, ValueError, "relative_sem=.*gradient='autodiff'"),
    "semidefinite": ({"semidefinite": "yes"}, TypeError, "semidefinite=.* must be True or False; got 'yes'"),
    "no probes": ({"probes": np.ones((0, SIZE), np.float32)}, ValueError, "probes=.* at least one probe"),
    "scalar": ({"probes": np.float32(1)}, ValueError, "probes=.* one leading axis"),
    "uneven": ({"probes": (np.ones((2, 3)), np.ones((3, 3)))}, ValueError, "probes=.* one leading axis"),
    "zero": ({"probes": np.zeros((3, SIZE), np.float32)}, ValueError, "probes=.* not be zero; got 3 of 3"),
    "NaN": ({"probes": np.full((3, SIZE), np.nan, np.float32)}, ValueError, "probes=.* finite; got 36 of 36"),
    "structure": ({"matvec": lambda v: [v]}, TypeError, "matvec=.* must return the structure that it takes"),
}


def test_quadrature():
    good = {"matvec": lambda v: v, "probes": np.ones((3, SIZE), np.float32), "num_matvecs": 3}

    def run(changed):
        options = {**good, **changed}
        return stochastic_lanczos_quadrature(jnp.log1p, options.pop("matvec"), options.pop("probes"), **options)

    check_refusals(
        Refusal(case, lambda c=changed: run(c), error, rf"^stochastic_lanczos_quadrature\({message}")
        for case, (changed, error, message) in BAD_QUADRATURE.items()
    )


def test_functions_of_a_matrix_times_a_vector_and_eigenpairs():
    gradients = r"^matfun_arnoldi\(gradient=.* must be 'adjoint', 'frechet' or 'autodiff'"
    depth = r"^matfun_lanczos\(num_matvecs=.* between 1 and the dimension 4; got 5"
    pairs = r"num_pairs=.* between 1 and num_matvecs = 2; got 3"
    check_refusals(
        [
            Refusal("depth", lambda: call(matfun_lanczos, num_matvecs=5), ValueError, depth),
            Refusal("gradient", lambda: call(matfun_arnoldi, gradient="quadrature"), ValueError, gradients),
            Refusal("pairs", lambda: call(leading_eigenpairs, num_pairs=3), ValueError, pairs),
        ]
    )


def test_probes():
    check_refusals(
        refusal
        for draw in (rademacher_probes, normal_probes)
        for refusal in (
            Refusal("float", lambda d=draw: d(KEY, VECTOR, 2.0), TypeError, r"\(num_probes=...\) must be an integer"),
            Refusal(
                "key",
                lambda d=draw: d(3, VECTOR, 2),
                ValueError,
                rf"^{draw.__name__}\(key=...\) must be one random key",
            ),
            Refusal("none", lambda d=draw: d(KEY, VECTOR, 0), ValueError, "num_probes=.* at least 1; got 0"),
            Refusal(
                "integers",
                lambda d=draw: d(KEY, jnp.arange(3), 2),
                TypeError,
                rf"^{draw.__name__}\(like=...\) must have leaves of one real floating-point",
            ),
        )
    )


def test_functions_of_a_scalar():
    functions = [
        (None, "must be a function, such as jnp.log; got NoneType"),
        (np.log, "must be made of functions that JAX can trace; .* use jax.numpy"),
        (lambda x: jnp.stack([x, x]), r"must take a scalar to one of the same dtype, float32\(\); got float32\(2,\)"),
        (lambda x: x + 1j, r"must take a scalar .* got complex64\(\)"),
        (lambda x: x @ x, "must take a scalar; got ValueError: matmul"),
        (lambda x: (x, x), "must take a scalar .* got tuple"),
        (lambda x: 1.0 if x > 0 else 0.0, "must be made of functions that JAX can trace"),
    ]
    check_refusals(
        Refusal(
            message,
            lambda c=caller, f=function, v=vector: c(f, lambda v: v, v, num_matvecs=2),
            TypeError,
            rf"^{caller.__name__}\(function=...\) {message}",
        )
        for caller, vector in ((matfun_lanczos, VECTOR), (stochastic_lanczos_quadrature, VECTOR[None]))
        for function, message in functions
    )


def test_functions_of_a_matrix():
    functions = [
        (3, "must be a function, such as jax.scipy.linalg.expm; got int"),
        (lambda m: m[0], r"must take a \d x \d matrix to one of the same dtype"),
        (lambda m: m.astype(complex), r"must take a \d x \d matrix .*; got complex64"),
        (np.linalg.inv, "must be made of functions that JAX can trace"),
    ]
    check_refusals(
        Refusal(
            message,
            lambda f=function: matfun_arnoldi(f, lambda v: v, VECTOR, num_matvecs=2),
            TypeError,
            rf"^matfun_arnoldi\(function=...\) {message}",
        )
        for function, message in functions
    )


def test_half_precision():
    """The recurrences take it. What decomposes the small matrix does not."""
    refusals = []
    for function in CALLS:
        for dtype in (jnp.float16, jnp.bfloat16):
            vector = VECTOR.astype(dtype)
            vector = vector[None] if function is stochastic_lanczos_quadrature else vector
            if function in (lanczos, arnoldi, check_symmetric):
                trace(function, vector=vector)
            else:
                pattern = rf"^{function.__name__}\(.*must be float32 or float64.*; got .*float16"
                half = lambda f=function, v=vector: call(f, vector=v)  # noqa: E731
                refusals.append(Refusal(f"{function.__name__} {dtype}", half, TypeError, pattern))
    check_refusals(refusals)


def test_check_symmetric_looks_at_numbers():
    programs = [
        lambda key: check_symmetric(lambda v: v, VECTOR, key),
        lambda key: check_symmetric(lambda v: jax.random.key_data(key)[0] * v, VECTOR, KEY),
        lambda key: check_symmetric(lambda v: v, VECTOR, KEY),
    ]
    pattern = "^check_symmetric.*known numbers.*outside of jit"
    with pytest.raises(ValueError, match=r"^check_symmetric\(key=...\) must be one random key; got 3"):
        check_symmetric(lambda v: v, VECTOR, 3)
    check_refusals(Refusal(str(i), lambda p=p: jax.jit(p)(KEY), TypeError, pattern) for i, p in enumerate(programs))


def test_block_lanczos():
    probes = {
        "too many": (np.ones((5, 6)), 4, r"between 1 and min\(max_vectors, n\) = 4 rows; got 5"),
        "zero": (np.zeros((2, 6)), 6, "finite nonzero rows"),
        "NaN": (np.full((2, 6), np.nan), 6, "finite nonzero rows"),
    }
    infinite = lambda: next(block_lanczos(lambda rows: rows * jnp.nan, jnp.eye(3), max_vectors=3))  # noqa: E731
    pattern = r"block_lanczos\(product=...\) must return finite values; got a row of norm nan"
    check_refusals(
        [
            *(
                Refusal(
                    case,
                    lambda z=z, m=largest: next(block_lanczos(lambda rows: rows, jnp.asarray(z), max_vectors=m)),
                    ValueError,
                    rf"^block_lanczos\(probes=...\) must have .*{message}",
                )
                for case, (z, largest, message) in probes.items()
            ),
            Refusal("product", infinite, FloatingPointError, pattern),
        ]
    )


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (doubled(x), None), lambda _, cotangent: (2 * cotangent,))


@pytest.mark.parametrize("function", usual([arnoldi], [lanczos, arnoldi]))
def test_forward_mode_of_a_custom_vjp_of_the_user(function):
    """A Hessian is forward over reverse, and fails if a product allows no forward mode. The message says so."""

    def loss(scale):
        matvec = lambda v, scale: doubled(scale * v * jnp.arange(1.0, 5))  # noqa: E731
        return jnp.sum(function(matvec, VECTOR, scale, num_matvecs=3).basis ** 3)

    with pytest.raises(TypeError, match=rf"{function.__name__}.*reverse mode only.*a function of yours .*custom_vjp"):
        jax.hessian(loss)(2.0)
    assert np.isfinite(jax.jit(jax.jacrev(jax.grad(loss)))(2.0))
