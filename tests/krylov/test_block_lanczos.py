"""Block Lanczos and the bounds that come with it, against matrices whose functions are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

from bnnlaplace import krylov

# Outliers over a decaying bulk over a null space: the shape of a GGN's spectrum.
SPECTRUM = np.concatenate([np.geomspace(8e3, 1e-2, 150), np.zeros(250)])
SHIFT = 0.8


def decompositions(num_probes, max_vectors, dtype=jnp.float64, spectrum=SPECTRUM, seed=0):
    values = jnp.asarray(spectrum, dtype)
    probes = jax.random.normal(jax.random.key(seed), (num_probes, len(spectrum)), dtype)
    product = jax.jit(lambda rows: rows * values)
    return probes, list(krylov.block_lanczos(product, probes, max_vectors=max_vectors))


def test_decomposition(x64):
    probes, steps = decompositions(8, 64)
    assert [len(step.tridiagonal) for step in steps] == [8, 16, 24, 32, 40, 48, 56, 64]
    last = steps[-1]
    np.testing.assert_allclose(last.basis @ last.basis.T, np.eye(64), atol=1e-12)
    np.testing.assert_allclose(last.start @ last.basis[:8], probes, atol=1e-12)
    np.testing.assert_allclose((last.basis * SPECTRUM) @ last.basis.T, last.tridiagonal, atol=1e-9)
    residuals = np.asarray(last.basis * SPECTRUM - last.tridiagonal @ last.basis)
    np.testing.assert_allclose(residuals[:-8], 0, atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(residuals), np.linalg.norm(last.residual), rtol=1e-9)


def test_orthogonality_in_single_precision():
    _, steps = decompositions(8, 96, jnp.float32)
    basis = np.asarray(steps[-1].basis)
    np.testing.assert_allclose(basis @ basis.T, np.eye(96), atol=5e-6)


@pytest.mark.parametrize("shift", [SHIFT, 20.0])
def test_error_bound_holds_and_is_tight(x64, shift):
    probes, steps = decompositions(8, 120)
    exact = np.asarray(probes) / np.sqrt(SPECTRUM + shift)
    for step in steps[3:]:
        ritz = krylov.ritz(step)
        error = krylov.inverse_sqrt_coefficients(ritz, shift) @ np.asarray(step.basis) - exact
        energy = np.sqrt(np.sum((SPECTRUM + shift) * error**2, axis=1))
        bound = krylov.inverse_sqrt_error(ritz, shift)
        if energy.max() < 1e-9:
            continue  # rounding, which the bound does not include
        assert np.all(energy <= bound)
        if energy.max() < 0.2 * np.sqrt(np.sum(SPECTRUM / (SPECTRUM + shift))):  # small enough to think of stopping
            assert np.all(bound <= 3 * energy)


def test_gauss_and_gauss_radau_bracket_the_logarithm(x64):
    probes, steps = decompositions(8, 96)
    exact = np.square(probes) @ np.log1p(SPECTRUM / SHIFT)
    gaps = []
    for step in steps:
        ritz = krylov.ritz(step)
        nodes, weights = krylov.gauss_radau(step, ritz)
        upper = np.log1p(ritz.values / SHIFT) @ ritz.weights**2
        lower = np.log1p(nodes / SHIFT) @ weights**2
        assert np.all(lower <= exact * (1 + 1e-9)) and np.all(exact <= upper * (1 + 1e-9))
        gaps.append(np.mean(upper - lower))
    assert np.all(np.diff(gaps) < 0)
    assert gaps[-1] < 1e-3 * gaps[0]


@pytest.mark.parametrize("seed", usual([1], [1, 2, 3]))
def test_trace_within_four_standard_errors(x64, seed):
    _, steps = decompositions(16, 112, seed=seed)
    ritz = krylov.ritz(steps[-1])
    forms = krylov.trace_forms(ritz, lambda values: np.log1p(values / SHIFT))
    sem = forms.std(ddof=1) / np.sqrt(len(forms))
    plain = np.log1p(ritz.values / SHIFT) @ ritz.weights**2
    assert abs(forms.mean() - np.log1p(SPECTRUM / SHIFT).sum()) <= 4 * sem
    # Summing converged eigenpairs exactly is worth its name.
    assert sem < 0.5 * plain.std(ddof=1) / np.sqrt(len(plain))


@pytest.mark.parametrize("seed", usual([1], [1, 2, 3]))
@pytest.mark.parametrize("copies", [5, 8, 60])
def test_trace_of_an_eigenspace_larger_than_the_block(x64, seed, copies):
    """Eight probes find eight of its vectors, whose residuals vanish. They must not pass for the whole space."""
    spectrum = np.concatenate([np.full(copies, 3.0), [100.0, 40.0], np.zeros(40)])
    _, steps = decompositions(8, 64, spectrum=spectrum, seed=seed)
    forms = krylov.trace_forms(krylov.ritz(steps[-1]), lambda values: np.log1p(values / SHIFT))
    exact = np.log1p(spectrum / SHIFT).sum()
    if copies < 8:
        np.testing.assert_allclose(forms, exact, rtol=1e-10)
    else:
        assert 0 < abs(forms.mean() - exact) <= 4 * forms.std(ddof=1) / np.sqrt(len(forms))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_blocks_reach_a_dimension_that_they_do_not_divide(x64, dtype):
    spectrum = np.geomspace(100.0, 0.1, 50)
    probes, steps = decompositions(32, 512, dtype, spectrum)
    last = steps[-1]
    assert len(steps) == 2
    tolerance = 1e-9 if dtype == jnp.float64 else 1e-3
    forms = krylov.trace_forms(krylov.ritz(last), lambda values: np.log1p(values / SHIFT))
    np.testing.assert_allclose(forms, np.log1p(spectrum / SHIFT).sum(), rtol=tolerance)
    sample = krylov.inverse_sqrt_coefficients(krylov.ritz(last), SHIFT) @ np.asarray(last.basis)
    np.testing.assert_allclose(sample, np.asarray(probes) / np.sqrt(spectrum + SHIFT), atol=tolerance)


def test_growing_keeps_one_basis():
    count, dimension = 8, 397  # a length that no other array of the process has
    values, live = jnp.arange(float(dimension)), []

    def product(rows):
        live.append(sum(array.size for array in jax.live_arrays() if array.shape[-1:] == (dimension,)) // dimension)
        return rows * values

    probes = jax.random.normal(jax.random.key(0), (count, dimension))
    for decomposition in krylov.block_lanczos(product, probes, max_vectors=96):
        vectors = len(decomposition.basis)
        assert live[-1] <= vectors + 3 * count  # the basis, the probes, the newest block, `values`: no second basis
    assert vectors == 96


def test_exhausted_space_is_exact(x64):
    spectrum = np.concatenate([np.arange(1.0, 11.0), np.zeros(30)])
    probes, steps = decompositions(8, 40, spectrum=spectrum)
    last = steps[-1]
    assert len(last.tridiagonal) == 24  # the span of the probes and ten directions
    ritz = krylov.ritz(last)
    forms = krylov.trace_forms(ritz, lambda values: np.log1p(values / SHIFT))
    np.testing.assert_allclose(forms, np.log1p(spectrum / SHIFT).sum(), rtol=1e-10)
    sample = krylov.inverse_sqrt_coefficients(ritz, SHIFT) @ np.asarray(last.basis)
    np.testing.assert_allclose(sample, np.asarray(probes) / np.sqrt(spectrum + SHIFT), atol=1e-9)
    np.testing.assert_array_equal(krylov.inverse_sqrt_error(ritz, SHIFT), 0)


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2), (1, 2, 0)])
def test_dependent_probes_leave_no_spurious_direction(x64, order):
    probes = jnp.ones((3, 6)).at[0, 0].set(2.0)[jnp.array(order)]
    (first, *_) = krylov.block_lanczos(lambda rows: rows * jnp.arange(6.0), probes, max_vectors=6)
    gram = np.asarray(first.basis @ first.basis.T)
    np.testing.assert_allclose(np.sort(np.diagonal(gram)), [0, 1, 1], atol=1e-12)
    np.testing.assert_allclose(first.start @ first.basis, probes, atol=1e-12)


def factored(num_probes, max_vectors, dtype=jnp.float64, spectrum=SPECTRUM, seed=0):
    """Golub-Kahan steps for a matrix of that spectrum, with a factor that is not square."""
    values = np.asarray(spectrum)
    rotation, _ = np.linalg.qr(np.random.default_rng(7).normal(size=(len(values), len(values))))
    factor = jnp.asarray((np.sqrt(values)[:, None] * rotation)[values > 0], dtype)
    probes = jax.random.normal(jax.random.key(seed), (num_probes, len(values)), dtype)
    images = jax.jit(lambda rows: jnp.matmul(rows, factor.T, precision="highest"))
    back = jax.jit(lambda rows: jnp.matmul(rows, factor, precision="highest"))
    return factor, probes, images, back, list(krylov.block_golub_kahan(images, back, probes, max_vectors=max_vectors))


def test_golub_kahan_yields_what_lanczos_does(x64):
    """Until the space is exhausted: 150 directions and the probes, of which the last block has only a few."""
    _, probes, images, back, steps = factored(8, 400)
    lanczos = list(krylov.block_lanczos(lambda rows: back(images(rows)), probes, max_vectors=400))
    for step, other in zip(steps[:8], lanczos[:8], strict=True):
        np.testing.assert_allclose(
            np.linalg.eigvalsh(step.tridiagonal), np.linalg.eigvalsh(other.tridiagonal), atol=1e-8
        )
        np.testing.assert_allclose(np.linalg.norm(step.residual), np.linalg.norm(other.residual), rtol=1e-6)
        np.testing.assert_allclose(step.start @ step.basis[:8], probes, atol=1e-12)
    forms = krylov.trace_forms(krylov.ritz(steps[-1], rounding=1e-20), lambda values: np.log1p(values / SHIFT))
    np.testing.assert_allclose(forms, np.log1p(SPECTRUM / SHIFT).sum(), rtol=1e-10)


def test_golub_kahan_in_single_precision_knows_eigenvalues_below_the_rounding_of_products(x64):
    """A twentieth of the log-determinant and more is below eps theta_max. Products lose it, factors do not."""
    spectrum = np.concatenate([np.geomspace(1e5, 1e-5, 200), np.zeros(200)])
    shift, eps = 1e-4, float(jnp.finfo(jnp.float32).eps)
    factor, probes, images, back, steps = factored(8, 280, jnp.float32, spectrum)
    last = steps[-1]
    basis = np.asarray(last.basis, np.float64)
    np.testing.assert_allclose(basis @ basis.T, np.eye(len(basis)) * (np.diagonal(basis @ basis.T) > 0.5), atol=1e-5)
    along = np.asarray(probes, np.float64) @ np.linalg.svd(np.asarray(factor, np.float64), full_matrices=False)[2].T
    values = np.linalg.svd(np.asarray(factor, np.float64), compute_uv=False) ** 2
    exact = along**2 @ np.log1p(values / shift)
    ritz = krylov.ritz(last, rounding=eps**2)
    nodes, weights = krylov.gauss_radau(last, ritz)
    upper, lower = np.log1p(ritz.values / shift) @ ritz.weights**2, np.log1p(nodes / shift) @ weights**2
    assert (lower <= exact * (1 + 1e-5)).all() and (exact <= upper * (1 + 1e-5)).all()
    np.testing.assert_allclose(lower, upper, rtol=0.02)
    *_, by_products = krylov.block_lanczos(lambda rows: back(images(rows)), probes, max_vectors=280)
    plain = krylov.ritz(by_products)
    lost = 1 - np.log1p(plain.values / shift) @ plain.weights**2 / exact
    assert (lost > 0.05).all()


def test_golub_kahan_wants_no_more_probes_than_rows():
    with pytest.raises(ValueError, match=r"probes=...\) must have at most as many rows as R, 2; got 3; use fewer"):
        next(krylov.block_golub_kahan(lambda v: v[:, :2], lambda y: y, jnp.eye(4)[:3], max_vectors=4))
