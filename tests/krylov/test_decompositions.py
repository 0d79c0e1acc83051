"""Promises of both Lanczos and Arnoldi, against dense algebra and against autodiff through the loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from cases import usual
from krylov.decompositions import (
    DECOMPOSITIONS,
    SIZE,
    assert_close,
    low_rank,
    random_cotangent,
    random_operator,
)

from bnnlaplace.krylov import gram_schmidt

both = pytest.mark.parametrize("name", DECOMPOSITIONS)
# What does not depend on the recurrence is tested with one of them.
lanczos_usually = pytest.mark.parametrize("name", usual(["lanczos"], DECOMPOSITIONS))
arnoldi_usually = pytest.mark.parametrize("name", usual(["arnoldi"], DECOMPOSITIONS))


def check_factorisation(method, result, start, params, depth):
    matrix, dense = method.matrix(result), method.dense(params)
    last = jnp.zeros((depth, SIZE)).at[-1].set(result.residual)
    np.testing.assert_allclose(result.basis @ dense.T, matrix.T @ result.basis + last, atol=1e-12)
    np.testing.assert_allclose(result.basis @ result.basis.T, np.eye(depth), atol=1e-13)
    np.testing.assert_allclose(result.basis @ result.residual, 0, atol=1e-12)
    np.testing.assert_allclose(result.start_norm * result.basis[0], start, atol=1e-13)
    assert result.breakdown_step == (SIZE if depth == SIZE else -1)


@pytest.mark.parametrize(
    ("name", "depth"),
    usual(
        [("lanczos", 1), ("lanczos", 7), ("lanczos", SIZE), ("arnoldi", SIZE)],
        DECOMPOSITIONS,
        (1, 2, 7, SIZE),
    ),
)
def test_factorisation(x64, name, depth):
    (start, params), method = random_operator(), DECOMPOSITIONS[name]
    check_factorisation(method, method.run(start, params, num_matvecs=depth), start, params, depth)


@both
def test_factorisation_in_blocks(x64, blocks, name):
    start, params = random_operator()
    method = DECOMPOSITIONS[name]
    assert len(gram_schmidt.split(jnp.zeros((7, SIZE)))) == gram_schmidt.MOST_BLOCKS
    check_factorisation(method, method.run(start, params, num_matvecs=7), start, params, 7)


def pullback(method, start, params, cotangent, **options):
    return jax.jit(lambda: jax.vjp(lambda s, p: method.run(s, p, **options), start, params)[1](cotangent))()


def check_adjoint(name, depth, reorthogonalise):
    start, params = random_operator()
    method, options = DECOMPOSITIONS[name], {"num_matvecs": depth, "reorthogonalise": reorthogonalise}
    cotangent = random_cotangent(jax.eval_shape(lambda: method.run(start, params, **options)))
    ours = pullback(method, start, params, cotangent, **options)
    reference = pullback(method, start, params, cotangent, gradient="autodiff", **options)
    assert_close(ours, reference, 1e-9)
    # The custom rule ran: its rounding differs from that of the loop.
    pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True)
    assert any(np.any(np.asarray(mine) != np.asarray(other)) for mine, other in pairs)


ADJOINTS = usual(
    [
        ("lanczos", "full", 7),
        ("lanczos", "none", 1),
        ("arnoldi", "full", 2),
        ("arnoldi", "none", SIZE),
    ],
    DECOMPOSITIONS,
    ("full", "none"),
    (1, 2, 7, SIZE),
)


@pytest.mark.parametrize(("name", "reorthogonalise", "depth"), ADJOINTS)
def test_adjoint_is_the_derivative_of_the_loop(x64, name, reorthogonalise, depth):
    check_adjoint(name, depth, reorthogonalise)


@arnoldi_usually
def test_adjoint_in_blocks_is_the_derivative_of_the_loop(x64, blocks, name):
    check_adjoint(name, 7, "full")


DTYPES_AND_GRADIENTS = DECOMPOSITIONS, (np.float32, np.float64), ("adjoint", "autodiff")


@pytest.mark.parametrize(
    ("name", "dtype", "gradient"),
    usual([("lanczos", np.float32, "autodiff"), ("arnoldi", np.float64, "autodiff")], *DTYPES_AND_GRADIENTS),
)
def test_full_depth_is_dense(name, dtype, gradient):
    """The logarithm of a determinant, whose gradient in the matrix is the transpose of the inverse."""
    method, tolerance = DECOMPOSITIONS[name], {np.float64: 1e-10, np.float32: 1e-4}[dtype]

    def log_determinant(start, params):
        result = method.run(start, params, num_matvecs=SIZE, gradient=gradient)
        return jnp.linalg.slogdet(method.matrix(result))[1]

    with jax.enable_x64(dtype == np.float64):
        start, params = random_operator(dtype, shift=8.0)
        value, (d_start, d_params) = jax.jit(jax.value_and_grad(log_determinant, (0, 1)))(start, params)
        assert value.dtype == d_start.dtype == dtype
    with jax.enable_x64(True):
        dense = np.asarray(method.dense(random_operator(shift=8.0)[1]))
    inverse = np.linalg.inv(dense)
    reference = {"half": 2 * inverse if name == "lanczos" else inverse.T, "shift": np.trace(inverse)}
    np.testing.assert_allclose(value, np.linalg.slogdet(dense)[1], rtol=tolerance)
    assert_close(d_params, reference, tolerance)
    # A determinant does not depend on where the recurrence starts.
    np.testing.assert_allclose(d_start, 0, atol=tolerance * np.abs(reference["half"]).max())


@pytest.mark.parametrize(
    ("name", "dtype", "gradient"),
    usual([("lanczos", np.float64, "adjoint"), ("arnoldi", np.float32, "adjoint")], *DTYPES_AND_GRADIENTS),
)
def test_gradient_past_a_breakdown_is_that_before_it(name, dtype, gradient):
    """An operator with four eigenvalues: twelve steps find a space of four dimensions, and so do their gradients."""
    method, rank = DECOMPOSITIONS[name], 4

    def matvec(vector, values):
        return jnp.repeat(values, SIZE // rank) * vector

    def everything(values, depth):
        result = method.decompose(matvec, start, values, num_matvecs=depth, gradient=gradient)
        weights = jnp.arange(SIZE, dtype=dtype)
        total = jnp.sum(method.matrix(result) ** 3) + jnp.sum(result.basis**2 @ weights) + jnp.sum(result.residual)
        return total, result

    with jax.enable_x64(dtype == np.float64):
        start, values = jnp.arange(1, SIZE + 1, dtype=dtype), jnp.asarray([5.0, 3.0, 2.0, 1.0], dtype)
        run = jax.jit(jax.value_and_grad(everything, has_aux=True), static_argnums=1)
        (value, result), ours = run(values, SIZE)
        (expected, _), reference = run(values, rank)
        assert result.breakdown_step == rank
        for leaf in (result.basis[rank:], method.matrix(result)[rank:], result.residual):
            np.testing.assert_array_equal(leaf, 0)
        np.testing.assert_array_equal(method.matrix(result)[:, rank:], 0)
        np.testing.assert_allclose(value, expected, rtol=100 * np.finfo(dtype).eps)
        assert_close(ours, reference, 1e3 * np.finfo(dtype).eps)


@both
def test_no_spurious_ritz_values(x64, name):
    start, params = random_operator()
    result = DECOMPOSITIONS[name].decompose(low_rank(4), start, params, num_matvecs=SIZE)
    assert result.breakdown_step == 5
    found = np.linalg.eigvals(DECOMPOSITIONS[name].matrix(result)[:5, :5])
    factor = params["half"][:, :4]
    np.testing.assert_allclose(sorted(found.real)[1:], jnp.linalg.eigvalsh(factor.T @ factor), rtol=1e-11)


@arnoldi_usually
def test_pytrees_are_flat_vectors_in_another_shape(x64, name):
    start, params = random_operator()
    method = DECOMPOSITIONS[name]

    def matvec(tree, params):
        image = method.matvec(jnp.concatenate([tree["a"].reshape(-1), tree["b"]]), params)
        return {"a": image[:6].reshape(2, 3), "b": image[6:]}

    def loss(decompose, start, params):
        result = decompose(start, params)
        parts = result.basis, result.residual, method.matrix(result)
        return sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(parts)), result

    tree = {"a": start[:6].reshape(2, 3), "b": start[6:]}
    run = jax.jit(jax.value_and_grad(loss, (1, 2), has_aux=True), static_argnums=0)
    (_, result), ours = run(lambda s, p: method.decompose(matvec, s, p, num_matvecs=4), tree, params)
    (_, flat), reference = run(lambda s, p: method.run(s, p, num_matvecs=4), start, params)
    assert result.basis["a"].shape == (4, 2, 3) and result.residual["b"].shape == (6,)
    np.testing.assert_allclose(result.basis["a"].reshape(4, 6), flat.basis[:, :6], atol=1e-13)
    np.testing.assert_allclose(ours[0]["b"], reference[0][6:], atol=1e-12)
    assert_close(ours[1], reference[1], 1e-12)


@pytest.mark.parametrize(
    ("name", "reorthogonalise"),
    usual([("lanczos", "full")], DECOMPOSITIONS, ("full", "none")),
)
def test_vmap_over_starts_and_parameters(x64, name, reorthogonalise):
    start, params = random_operator()
    starts = jnp.stack([start, jnp.roll(start, 1) + 1])
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.5 * leaf]), params)

    def loss(start, params):
        result = DECOMPOSITIONS[name].run(start, params, num_matvecs=5, reorthogonalise=reorthogonalise)
        return jnp.sum(result.basis**3) + jnp.sum(DECOMPOSITIONS[name].matrix(result) ** 2)

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    together = jax.jit(jax.vmap(run))(starts, many)
    one_by_one = [run(starts[i], jax.tree.map(lambda leaf, i=i: leaf[i], many)) for i in range(2)]
    assert_close(together, jax.tree.map(lambda *leaves: jnp.stack(leaves), *one_by_one), 1e-11)


@arnoldi_usually
def test_gradients_reach_parameters_of_any_kind(x64, name):
    """Passed or closed over, floating point among integers, in any structure."""
    start, params = random_operator()
    method = DECOMPOSITIONS[name]
    columns = jnp.arange(SIZE)

    def sparse(vector, values, structure):
        return values["rows"] @ vector[structure["columns"]] + values["shift"] * vector

    def loss(values, how, gradient="adjoint"):
        options = {"num_matvecs": 5, "gradient": gradient}
        if how == "passed":
            result = method.decompose(sparse, start, values, {"columns": columns, "unused": None}, **options)
        else:
            result = method.decompose(lambda v: sparse(v, values, {"columns": columns}), start, **options)
        return jnp.sum(method.matrix(result) ** 3)

    values = {"rows": method.dense(params), "shift": jnp.asarray(0.5)}
    run = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    passed = run(values, "passed")
    assert_close(passed, run(values, "closed over"), 1e-12)
    assert_close(passed, run(values, "passed", "autodiff"), 1e-9)


LOOPS = {
    "scan": lambda one: jax.lax.scan(lambda total, i: (total + one(i), None), 0.0, jnp.arange(2))[0],
    "vmap": lambda one: jax.vmap(one)(jnp.arange(2)).sum(),
    "vmap of masks": lambda one: jax.vmap(lambda mask: one(jnp.where(mask, 0, 1)))(jnp.array([True, False])).sum(),
    "vmap of keys": lambda one: jax.vmap(lambda key: one(jax.random.randint(key, (), 0, 2)))(
        jax.random.split(jax.random.key(0), 8)[jnp.array([0, 7])]
    ).sum(),
}


@pytest.mark.parametrize(
    ("name", "loop"),
    usual(
        [("lanczos", "scan")],
        DECOMPOSITIONS,
        LOOPS,
    ),
)
def test_what_is_closed_over_need_not_be_differentiable(x64, name, loop):
    """The index of a loop over layers or microbatches, a mask, a random key."""
    start, params = random_operator()
    method = DECOMPOSITIONS[name]

    def total(halves, gradient):
        def one(index):
            product = lambda v: method.matvec(v, {**params, "half": halves[index]})  # noqa: E731
            return jnp.sum(method.matrix(method.decompose(product, start, num_matvecs=3, gradient=gradient)) ** 3)

        return LOOPS[loop](one)

    run = jax.jit(jax.grad(total), static_argnums=1)
    halves = jnp.stack([params["half"], params["half"].T])
    assert_close(run(halves, "adjoint"), run(halves, "autodiff"), 1e-9)


@arnoldi_usually
def test_batches_of_vector_jacobian_products_change_nothing(x64, name):
    start, params = random_operator()

    def loss(params, size):
        result = DECOMPOSITIONS[name].run(start, params, num_matvecs=7, vjp_batch_size=size)
        return jnp.sum(DECOMPOSITIONS[name].matrix(result) ** 3) + jnp.sum(result.basis**3)

    run = jax.jit(jax.grad(loss), static_argnums=1)
    one_by_one = run(params, 1)
    for size in (3, 7, 100):
        assert_close(run(params, size), one_by_one, 1e-13)
    # Batches of two or three do not divide the seven rows: one row is left over.
    shapes = {2: "f64[2,12]", 3: "f64[3,12]"}
    for size in (1, 2, 3, 7):
        program = str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(params, size))
        assert [shape in program for shape in shapes.values()] == [size == batch for batch in shapes]


@lanczos_usually
def test_second_derivatives(x64, name):
    start, params = random_operator()
    method = DECOMPOSITIONS[name]

    def log_determinant(shift):
        result = method.run(start, {**params, "shift": shift}, num_matvecs=SIZE)
        return jnp.linalg.slogdet(method.matrix(result))[1]

    inverse = np.linalg.inv(method.dense({**params, "shift": 8.0}))
    expected = -np.trace(inverse @ inverse)
    for derivative in (jax.hessian(log_determinant), jax.grad(jax.grad(log_determinant))):
        np.testing.assert_allclose(jax.jit(derivative)(8.0), expected, rtol=1e-8)


@lanczos_usually
def test_only_reorthogonalisation_keeps_a_basis_orthogonal(name):
    """Float32 on a Hilbert matrix, whose eigenvalues fall below rounding within a few steps."""
    size = 40
    hilbert = jnp.asarray(scipy.linalg.hilbert(size), jnp.float32)
    start = jax.random.normal(jax.random.key(0), (size,))

    def loss_of_orthogonality(reorthogonalise):
        method = DECOMPOSITIONS[name].decompose
        options = {"num_matvecs": 20, "reorthogonalise": reorthogonalise}
        result = jax.jit(lambda: method(lambda v: hilbert @ v, start, **options))()
        alive = jnp.sum(jnp.any(result.basis != 0, axis=1))
        assert alive > 7
        return float(jnp.abs(result.basis[:alive] @ result.basis[:alive].T - jnp.eye(alive)).max())

    assert loss_of_orthogonality("full") < 20 * np.finfo(np.float32).eps
    assert loss_of_orthogonality("none") > 1e-3


@pytest.mark.parametrize(
    ("name", "reorthogonalise"),
    usual([("lanczos", "none"), ("arnoldi", "full")], DECOMPOSITIONS, ("full", "none")),
)
def test_adjoint_holds_without_orthogonality(x64, name, reorthogonalise):
    """Where "none" is losing orthogonality, its adjoint is still the derivative of its own loop."""
    size, depth = 30, 4
    method = DECOMPOSITIONS[name]
    options = {"num_matvecs": depth, "reorthogonalise": reorthogonalise}

    def loss(values, gradient):
        result = method.decompose(lambda v, d: d * v, jnp.ones(size), values, gradient=gradient, **options)
        lost = jnp.abs(result.basis @ result.basis.T - jnp.eye(depth)).max()
        return jnp.sum(method.matrix(result) ** 2) + jnp.sum(result.basis**3), lost

    # One eigenvalue far from the others converges at once, and with it orthogonality goes.
    values = jnp.append(jnp.linspace(0, 1, size - 1), 1e4)
    run = jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)
    (ours, lost), (reference, _) = run(values, "adjoint"), run(values, "autodiff")
    assert (lost > 1e-12) == (reorthogonalise == "none")
    assert_close(ours, reference, 1e-9)


@arnoldi_usually
def test_start_vector_is_checked_at_run_time_only_as_numbers(x64, name):
    """Inside jit a zero start is a breakdown at once, and NaN stays visible."""
    start, params = random_operator()
    method = DECOMPOSITIONS[name]

    @jax.jit
    def run(start):
        result = method.run(start, params, num_matvecs=3)
        return result, jax.grad(lambda s: jnp.sum(method.matrix(method.run(s, params, num_matvecs=3))))(start)

    result, gradient = run(jnp.zeros_like(start))
    assert result.breakdown_step == 0 and not result.basis.any() and not method.matrix(result).any()
    assert np.isfinite(gradient).all()
    result, _ = run(start.at[3].set(jnp.nan))
    assert np.isnan(result.start_norm) and np.isnan(method.matrix(result)).any()


FORWARD_MODE = {
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
    "jit of jvp": lambda f, x: jax.jit(lambda x: jax.jvp(f, (x,), (x,)))(x),
    "jvp of jit": lambda f, x: jax.jvp(jax.jit(f), (x,), (x,)),
    "jacfwd": lambda f, x: jax.jacfwd(f)(x),
    "jit of jacfwd": lambda f, x: jax.jit(jax.jacfwd(f))(x),
    "linearize": lambda f, x: jax.linearize(f, x)[1](x),
}


@pytest.mark.parametrize(
    ("name", "mode"),
    usual(
        [
            ("lanczos", "jvp"),
            ("lanczos", "jit of jvp"),
            ("lanczos", "jit of jacfwd"),
            ("arnoldi", "jvp of jit"),
            ("arnoldi", "linearize"),
        ],
        DECOMPOSITIONS,
        FORWARD_MODE,
    ),
)
def test_forward_mode_is_refused_by_the_adjoint_and_served_by_autodiff(x64, name, mode):
    start, params = random_operator()
    method = DECOMPOSITIONS[name]

    def matrix(gradient):
        return lambda start: method.matrix(method.run(start, params, num_matvecs=3, gradient=gradient))

    with pytest.raises(TypeError, match=rf"{name}\(gradient='adjoint'\) .*reverse mode.*gradient='autodiff'"):
        FORWARD_MODE[mode](matrix("adjoint"), start)
    if mode == "jacfwd":
        forward, reverse = jax.jit(jax.jacfwd(matrix("autodiff"))), jax.jit(jax.jacrev(matrix("adjoint")))
        assert_close(forward(start), reverse(start), 1e-10)
