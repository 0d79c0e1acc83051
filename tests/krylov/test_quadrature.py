"""Stochastic Lanczos quadrature: its value, its errors and its gradients, against dense traces."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cases import exhaustive, usual
from krylov.decompositions import assert_close

from bnnlaplace.krylov import (
    leading_eigenpairs,
    normal_probes,
    rademacher_probes,
    stochastic_lanczos_quadrature,
)

SIZE, RANK = 14, 6
EXACT = np.sqrt(SIZE) * np.eye(SIZE)  # the mean over these probes is the exact trace


@pytest.fixture
def factor(x64):
    return jnp.asarray(np.random.default_rng(0).normal(size=(SIZE, RANK)))


def log_determinant(factor, delta):
    """log det(I + F F' / delta), in float64 by NumPy, and its gradients in F and delta."""
    factor = np.asarray(factor, np.float64)
    matrix = np.eye(SIZE) + factor @ factor.T / delta
    solved = np.linalg.solve(matrix, factor) / delta
    return np.linalg.slogdet(matrix)[1], (2 * solved, -np.sum(solved * factor) / delta)


def product(vector, factor):
    return factor @ (factor.T @ vector)


def quadrature(factor, delta, probes=EXACT, num_matvecs=RANK + 1, **options):
    return stochastic_lanczos_quadrature(
        lambda x: jnp.log1p(x / delta), product, jnp.asarray(probes), factor, num_matvecs=num_matvecs, **options
    )


def estimate(factor, delta, **options):
    return jax.jit(lambda f, d: quadrature(f, d, **options))(factor, delta)


def value_and_gradients(factor, delta, **options):
    return jax.jit(jax.value_and_grad(lambda f, d: quadrature(f, d, **options).mean, (0, 1)))(factor, delta)


# Depth 10 is beyond the rank, where the recurrence has broken down. Each gradient without further options is tested
# together with deflation, below.
@pytest.mark.parametrize(
    "options",
    [
        {"gradient": "adjoint", "probe_batch_size": 3, "vjp_batch_size": 4},
        {"gradient": "adjoint", "reorthogonalise": "none"},
        {"gradient": "quadrature", "num_matvecs": 10, "probe_batch_size": 3},
        exhaustive({"gradient": "adjoint"}),
        exhaustive({"gradient": "adjoint", "probe_batch_size": 50, "relative_sem": 1e-9}),
        exhaustive({"gradient": "adjoint", "num_matvecs": 10}),
        exhaustive({"gradient": "quadrature"}),
        exhaustive({"gradient": "autodiff"}),
        exhaustive({"gradient": "autodiff", "num_matvecs": 10, "probe_batch_size": 14}),
    ],
    ids=lambda options: " ".join(str(value) for value in options.values()),
)
def test_value_and_gradient_are_dense(factor, options):
    value, gradients = value_and_gradients(factor, 0.3, **options)
    expected, reference = log_determinant(factor, 0.3)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert_close(gradients, reference, 1e-10)


@pytest.mark.parametrize(
    ("gradient", "depth"),
    usual([("quadrature", RANK + 1)], ("adjoint", "quadrature"), (RANK + 1, 10)),
)
def test_single_precision(factor, gradient, depth):
    """A well-conditioned case: the eigenvalues of A / 3 + I lie between 1 and 13."""
    expected, (reference, _) = log_determinant(factor, 3.0)
    with jax.enable_x64(False):
        probes = jnp.asarray(EXACT, jnp.float32)
        single = jnp.asarray(np.asarray(factor), jnp.float32)
        value, (ours, _) = value_and_gradients(single, 3.0, probes=probes, num_matvecs=depth, gradient=gradient)
    assert value.dtype == np.float32
    np.testing.assert_allclose(np.asarray(value), expected, rtol=1e-5)
    assert_close(np.asarray(ours), reference, 1e-4)


@pytest.mark.parametrize(("depth", "batch_size"), usual([(3, 3)], (1, 3), (1, 3)))
def test_adjoint_is_the_gradient_of_the_truncated_quadrature(factor, depth, batch_size):
    """The gradient in the operator, in the number that the function closes over, and in the probes."""
    probes = jax.random.rademacher(jax.random.key(0), (4, SIZE), dtype=jnp.float64)

    def gradients(gradient, batch_size=1):
        def mean(factor, delta, probes):
            options = {"num_matvecs": depth, "gradient": gradient, "probe_batch_size": batch_size}
            return quadrature(factor, delta, probes, **options).mean

        return jax.jit(jax.grad(mean, (0, 1, 2)))(factor, 0.3, probes)

    assert_close(gradients("adjoint", batch_size), gradients("autodiff"), 1e-10)


def test_quadrature_gradient_in_the_probes(factor):
    probes = jax.random.normal(jax.random.key(0), (2, SIZE))

    def mean(probes):
        return stochastic_lanczos_quadrature(
            lambda x: jnp.exp(x / 20), product, probes, factor, num_matvecs=RANK + 1, gradient="quadrature"
        ).mean

    # The derivative of the mean of z' f(A) z over two probes is f(A) z.
    assert_close(jax.jit(jax.grad(mean))(probes), probes @ scipy.linalg.expm(factor @ factor.T / 20), 1e-10)


@pytest.mark.exhaustive  # a negative control
def test_quadrature_gradient_is_not_that_of_the_truncated_value(factor):
    """A negative control: it is another estimate of the derivative, equal at full depth only."""
    ours = value_and_gradients(factor, 0.3, num_matvecs=2, gradient="quadrature")[1][0]
    reference = value_and_gradients(factor, 0.3, num_matvecs=2)[1][0]
    assert jnp.abs(ours - reference).max() > 1e-3 * jnp.abs(reference).max()


@pytest.mark.parametrize("deflated", usual([True], [False, True]))
def test_trace_within_four_standard_errors(factor, deflated):
    deflation = pairs(factor) if deflated else None
    run = jax.jit(lambda probes: quadrature(factor, 1.0, probes, deflation=deflation))
    exact, _ = log_determinant(factor, 1.0)
    for draw in (rademacher_probes, normal_probes):
        for seed in (1, 2, 3):
            probes = draw(jax.random.key(seed), factor[:, 0], 200)
            assert probes.shape == (200, SIZE) and probes.dtype == factor.dtype
            trace = run(probes)
            assert trace.num_probes == 200 and trace.converged
            assert 0 < trace.sem < 2
            assert abs(trace.mean - exact) <= 4 * trace.sem


def pairs(factor, count=4, num_matvecs=RANK + 1):
    options = {"num_pairs": count, "num_matvecs": num_matvecs}
    return jax.jit(lambda f: leading_eigenpairs(product, jnp.ones(SIZE), f, **options))(factor)


@pytest.mark.parametrize("gradient", usual(["adjoint"], ["adjoint", "quadrature", "autodiff"]))
def test_deflation_is_exact_and_so_is_its_gradient(factor, gradient):
    deflation = pairs(factor)
    value, gradients = value_and_gradients(factor, 0.3, deflation=deflation, gradient=gradient)
    expected, reference = log_determinant(factor, 0.3)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert_close(gradients, reference, 1e-10)


def test_deflation_removes_variance(factor):
    probes = rademacher_probes(jax.random.key(0), factor[:, 0], 100)
    plain = estimate(factor, 0.3, probes=probes)
    deflated = estimate(factor, 0.3, probes=probes, deflation=pairs(factor, 6))
    assert deflated.sem < 0.05 * plain.sem


def test_pairs_that_were_not_found_are_left_to_the_probes(factor):
    few = pairs(factor, 3, num_matvecs=3)
    assert not few.values.all()
    trace = estimate(factor, 0.3, deflation=few)
    np.testing.assert_allclose(trace.mean, log_determinant(factor, 0.3)[0], rtol=1e-5)


def test_function_need_not_be_defined_at_the_zero_of_a_missing_pair(factor):
    def mean(shift):
        matvec = lambda v: product(v, factor) + shift * v  # noqa: E731
        deflation = leading_eigenpairs(matvec, jnp.ones(SIZE), num_pairs=3, num_matvecs=3)
        options = {"num_matvecs": RANK + 2, "deflation": deflation}
        return stochastic_lanczos_quadrature(jnp.log, matvec, jnp.asarray(EXACT), **options).mean, deflation.values

    (value, values), slope = jax.jit(jax.value_and_grad(mean, has_aux=True))(0.3)
    assert not values.all() and np.isfinite(slope)
    np.testing.assert_allclose(value, log_determinant(factor, 0.3)[0] + SIZE * np.log(0.3), rtol=1e-5)


def test_stop_counts_what_is_deflated(factor):
    """Nothing is left to the probes, so that an error relative to their own mean would be one of rounding."""
    probes = rademacher_probes(jax.random.key(0), factor[:, 0], 20)
    trace = estimate(factor, 0.3, probes=probes, deflation=pairs(factor, RANK), relative_sem=1e-6)
    assert trace.converged and trace.num_probes == 8


def test_eigenpairs_are_constants(factor):
    assert not jax.jit(jax.grad(lambda f: pairs(f).values.sum()))(factor).any()


def test_leading_eigenpairs(factor):
    values, vectors = np.linalg.eigh(-factor @ factor.T)
    options = {"num_pairs": 3, "num_matvecs": RANK + 1}
    leading = jax.jit(lambda: leading_eigenpairs(lambda v: -product(v, factor), jnp.ones(SIZE), **options))()
    np.testing.assert_allclose(leading.values, values[:3], rtol=1e-12)
    np.testing.assert_allclose(np.abs(np.sum(leading.vectors * vectors.T[:3], axis=1)), 1, rtol=1e-12)
    np.testing.assert_allclose(leading.residual_norms, 0, atol=1e-10)


def test_stops_once_the_relative_error_is_reached(factor):
    probes = rademacher_probes(jax.random.key(0), factor[:, 0], 400)

    def mean(factor):
        trace = quadrature(factor, 0.3, probes, relative_sem=0.05)
        return trace.mean, trace

    (value, trace), gradient = jax.jit(jax.value_and_grad(mean, has_aux=True))(factor)
    used = int(trace.num_probes)
    assert 8 <= used < 400 and trace.converged
    assert trace.sem <= 0.05 * trace.mean
    # It is the estimate from those probes alone, in value and gradient.
    expected, (reference, _) = value_and_gradients(factor, 0.3, probes=probes[:used])
    np.testing.assert_allclose([value, trace.mean], expected, rtol=1e-13)
    assert_close(gradient, reference, 1e-12)
    assert not estimate(factor, 0.3, probes=probes[:20], relative_sem=1e-6).converged


def test_truncation_is_reported(factor):
    short, long = estimate(factor, 0.3, num_matvecs=3), estimate(factor, 0.3, num_matvecs=10)
    error = abs(short.mean - log_determinant(factor, 0.3)[0])
    assert error / 3 < short.truncation < 30 * error
    assert long.truncation == 0


def test_one_probe_has_no_standard_error(factor):
    assert estimate(factor, 0.3, probes=EXACT[:1]).sem == np.inf


def test_function_need_not_be_defined_at_zero(x64):
    """A multiple of the identity breaks down after one step. What follows in T is zero, where log is infinite."""
    probes = rademacher_probes(jax.random.key(0), jnp.ones(SIZE), 3)

    def mean(scale):
        return stochastic_lanczos_quadrature(jnp.log, lambda v: scale * v, probes, num_matvecs=4).mean

    value, slope = jax.jit(jax.value_and_grad(mean))(2.0)
    np.testing.assert_allclose([value, slope], [SIZE * np.log(2), SIZE / 2], rtol=1e-13)


def test_pytrees(factor):
    like = {"a": jnp.ones((2, 3)), "b": jnp.ones(8)}
    probes = rademacher_probes(jax.random.key(0), like, 5)

    def matvec(tree, factor):
        image = product(jnp.concatenate([tree["a"].reshape(-1), tree["b"]]), factor)
        return {"a": image[:6].reshape(2, 3), "b": image[6:]}

    @jax.jit
    def of_pytrees(factor):
        deflation = leading_eigenpairs(matvec, like, factor, num_pairs=2, num_matvecs=RANK + 1)
        options = {"num_matvecs": RANK + 1, "deflation": deflation}
        return stochastic_lanczos_quadrature(jnp.log1p, matvec, probes, factor, **options)

    flat = jnp.concatenate([probes["a"].reshape(5, 6), probes["b"]], axis=1)
    reference = estimate(factor, 1.0, probes=flat, deflation=pairs(factor, 2))
    np.testing.assert_allclose(of_pytrees(factor).mean, reference.mean, rtol=1e-12)


@pytest.mark.parametrize("gradient", usual(["adjoint"], ["adjoint", "autodiff"]))  # the latter shows that it can tell
def test_no_decomposition_outlives_its_batch(gradient):
    """Memory for the gradient grows with the probes by the probes themselves, not by a basis for each."""

    def temporary_bytes(count):
        size, depth = 500, 20
        probes = jnp.ones((count, size))

        def mean(scale, probes):
            return stochastic_lanczos_quadrature(
                jnp.log1p, lambda v: scale * v, probes, num_matvecs=depth, gradient=gradient
            ).mean

        compiled = jax.jit(jax.grad(mean)).lower(jnp.ones(size), probes).compile()
        return compiled.memory_analysis().temp_size_in_bytes / (size * depth * 4)

    if gradient == "adjoint":
        assert temporary_bytes(32) - temporary_bytes(16) < 16 / 4
    else:
        assert temporary_bytes(8) - temporary_bytes(4) > 4


def test_every_option_reaches_the_program(factor):
    """A negative control for options that change nothing but rounding, time and memory."""

    def program(**options):
        run = jax.grad(lambda f: quadrature(f, 0.3, num_matvecs=3, **options).mean)
        return str(jax.make_jaxpr(run)(factor))

    default = program()
    assert program(reorthogonalise="none") != default
    for option, shape in {"vjp_batch_size": "f64[2,14]", "probe_batch_size": "f64[7,2,14]"}.items():
        assert shape in program(**{option: 2}) and shape not in default


@pytest.mark.exhaustive  # as in `test_decompositions.py`
def test_closed_over_index_of_a_loop(factor):
    factors = jnp.stack([factor, 2 * factor])

    def total(factors):
        def add(total, i):
            scaled = lambda v: product(v, factors[i])  # noqa: E731
            options = {"num_matvecs": RANK + 1}
            function = lambda x: jnp.log1p(x / (1 + i))  # noqa: E731
            return total + stochastic_lanczos_quadrature(function, scaled, jnp.asarray(EXACT), **options).mean, None

        return jax.lax.scan(add, 0.0, jnp.arange(2))[0]

    expected = np.stack([log_determinant(factors[0], 1.0)[1][0], log_determinant(factors[1], 2.0)[1][0]])
    assert_close(jax.jit(jax.grad(total))(factors), expected, 1e-10)


def test_forward_mode_names_the_option(factor):
    with pytest.raises(TypeError, match=r"quadrature\(gradient='quadrature'\) has derivatives in reverse mode only"):
        jax.jacfwd(lambda d: quadrature(factor, d, gradient="quadrature").mean)(0.3)
    slope = jax.jit(jax.jacfwd(lambda d: quadrature(factor, d, gradient="autodiff").mean))(0.3)
    np.testing.assert_allclose(slope, log_determinant(factor, 0.3)[1][1], rtol=1e-10)


@pytest.mark.exhaustive  # as in `test_deflation.py`
def test_hessian(factor):
    eigenvalues = np.linalg.eigvalsh(factor.T @ factor)
    # The second derivative of sum log(1 + x / delta)
    expected = np.sum(1 / 0.3**2 - 1 / (0.3 + eigenvalues) ** 2)
    ours = jax.jit(jax.hessian(lambda d: quadrature(factor, d).mean))(0.3)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
