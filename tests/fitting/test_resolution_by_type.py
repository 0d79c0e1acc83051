"""The resolution of a posterior is that of the type its network computes in: 16 bits, 32 or 64.

Before, every network was judged by the rounding of float32: Ritz values that 16-bit products make of zero counted as
curvature, without a warning, and a network in float64 was warned of rounding that it does not have.
"""

import warnings
from functools import lru_cache

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from jax import lax

import bnnlaplace
from bnnlaplace.core import rounding
from bnnlaplace.model.jaxpr import derivative_rounding
from bnnlaplace.model.spec import NetworkSpec
from bnnlaplace.structure import KrylovStructure, SpectralStructure

DISTINCT, COPIES, FEATURES, CLASSES = 8, 100, 12, 3
RANK = DISTINCT * (CLASSES - 1)
X = np.random.default_rng(3).normal(size=(DISTINCT, FEATURES)).astype(np.float32)
Y = np.arange(DISTINCT) % CLASSES
SHORT, SINGLE = ("bfloat16", "float16"), rounding.of_type(jnp.float32)


class Perceptron(nn.Module):
    dtype: str
    param_dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        options = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = nn.tanh(nn.Dense(8, **options)(x))
        return nn.Dense(CLASSES, **options)(x)


@lru_cache
def weights():
    """Weights that bfloat16 can hold, so that all networks are the same function but for rounding."""
    params = Perceptron("float32").init(jax.random.key(0), X)["params"]
    return jax.tree.map(lambda w: 2 * w.astype(jnp.bfloat16).astype(jnp.float32), params)


def network(dtype, param_dtype="float32"):
    params = jax.tree.map(lambda w: w.astype(param_dtype), weights())
    return bnnlaplace.Network.from_linen(Perceptron(dtype, param_dtype), {"params": params})


@lru_cache
def exact_rows():
    """B' J of the distinct inputs in float64, by hand: rows of weights in the order of the flat vector."""
    flat = jax.tree.map(lambda w: np.asarray(w, np.float64), weights())
    (b1, w1), (b2, w2) = ((layer["bias"], layer["kernel"]) for layer in (flat["Dense_0"], flat["Dense_1"]))
    rows = []
    for x in X.astype(np.float64):
        h = np.tanh(x @ w1 + b1)
        f = h @ w2 + b2
        p = np.exp(f - f.max()) / np.exp(f - f.max()).sum()
        d_hidden = (1 - h**2)[:, None] * w2  # d f_c / d (x w1)_j
        jacobian = np.concatenate(
            [d_hidden.T, np.einsum("i,jc->cij", x, d_hidden).reshape(CLASSES, -1), np.eye(CLASSES),
             np.einsum("j,cd->cjd", h, np.eye(CLASSES)).reshape(CLASSES, -1)], axis=1,
        )  # fmt: skip
        rows.append((np.diag(p**0.5) - np.outer(p**0.5, p)) @ jacobian)
    return np.concatenate(rows)


def eigenvalues(copies):
    return copies * np.linalg.svd(exact_rows())[1][:RANK] ** 2


@lru_cache
def fitted(name, dtype, param_dtype="float32"):
    structure, copies = ("lanczos", 2) if name == "spectral" else (name, COPIES)
    la = bnnlaplace.Laplace(network(dtype, param_dtype), hessian_structure=structure)
    data = np.tile(X, (copies, 1)), np.tile(Y, copies)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        la = la.fit(data, key=jax.random.key(0), num_probes=16, max_vectors=96)
    kind = {"spectral": SpectralStructure, "lanczos": KrylovStructure}.get(name)
    assert kind is None or isinstance(la.structure, kind)
    return la, copies


TYPES = [("bfloat16", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")]


@pytest.mark.parametrize(
    ("name", "types"),
    usual([("lanczos", TYPES[0]), ("spectral", TYPES[1]), ("full", TYPES[2])], ("lanczos", "spectral", "full"), TYPES),
)
def test_above_the_resolution_the_determinant_is_that_of_exact_derivatives(name, types):
    """Relative rounding of each of the eigenvalues is left, and the reported error of 'lanczos'."""
    dtype, param_dtype = types
    la, copies = fitted(name, dtype, param_dtype)
    values, resolution = eigenvalues(copies), la.structure.resolution()
    # A floor, and not one that hides what can be known.
    assert 0 < resolution < 0.01 * values.max()
    relative = rounding.of_type(dtype)
    for delta in resolution * np.array([1.0, 10.0, 100.0]):
        forms = la.structure.log_determinant(delta)
        exact = np.log1p(values / delta).sum()
        allowed = relative * (values / (values + delta)).sum() + 0.05
        if name == "lanczos":
            error = la.structure.error(delta)
            allowed += 4 * forms.std(ddof=1) / len(forms) ** 0.5
            assert forms.mean() - allowed < exact < forms.mean() + error.log_determinant + allowed
        else:
            assert abs(forms.mean() - exact) < allowed


@pytest.mark.parametrize(
    ("dtype", "name"),
    usual([("float16", "lanczos")], SHORT, ("lanczos", "spectral", "full")),
)
def test_variances_above_the_resolution(name, dtype):
    la, copies = fitted(name, dtype)
    delta = 10 * la.structure.resolution()
    jacobian = exact_rows()[:6]  # of two inputs, times B': the likelihood's curvature in the posterior's covariance
    _, singular, basis = np.linalg.svd(copies**0.5 * exact_rows())
    shrunk = (
        np.eye(len(basis)) / delta + basis[:RANK].T * (1 / (singular[:RANK] ** 2 + delta) - 1 / delta) @ basis[:RANK]
    )
    exact = np.trace(jacobian @ shrunk @ jacobian.T)
    covariance = np.asarray(la.with_prior_precision(delta).functional_variance(X[:2]), np.float64)
    probs = np.asarray(jax.nn.softmax(network("float32")(weights(), X[:2]), axis=-1), np.float64)
    roots = [np.diag(p**0.5) - np.outer(p**0.5, p) for p in probs]
    found = sum(np.trace(root @ part @ root.T) for root, part in zip(roots, covariance, strict=True))
    np.testing.assert_allclose(found, exact, rtol=0.02 if name != "lanczos" else 0.3)


@pytest.mark.parametrize(("dtype", "name"), usual([("bfloat16", "kron")], SHORT, ("diag", "kron")))
def test_approximate_structures_agree_with_those_of_float32(name, dtype):
    (short, _), (single, _) = fitted(name, dtype), fitted(name, "float32")
    resolution = short.structure.resolution()
    assert (resolution > 0) == (name == "kron")
    for delta in max(resolution, 1e-3) * np.array([1.0, 10.0, 100.0]):
        found, expected = (la.structure.log_determinant(delta)[0] for la in (short, single))
        effective = single.with_prior_precision(delta).effective_parameters()
        assert abs(found - expected) < rounding.of_type(dtype) * effective + 0.05


@pytest.mark.parametrize("name", ["lanczos", "spectral", "full", "kron"])
def test_below_the_resolution_there_is_a_warning(name):
    la, _ = fitted(name, "bfloat16")
    resolution = la.structure.resolution()
    with pytest.warns(UserWarning, match="the rounding of the curvature"):
        la.log_marginal_likelihood(0.5 * resolution)
    single, _ = fitted(name, "float32")
    assert 50 * single.structure.resolution() < resolution


def test_a_saved_posterior_keeps_its_resolution(tmp_path):
    for name in ("full", "kron", "spectral", "lanczos"):
        la, _ = fitted(name, "bfloat16")
        la.save(tmp_path / name)
        again = bnnlaplace.Laplace.load(tmp_path / name, network("bfloat16"))
        assert again.structure.resolution() == pytest.approx(la.structure.resolution(), rel=1e-6)


def test_a_network_in_float64_is_judged_by_float64(x64):
    """Curvature that float32 would hide: its eigenvalues are far apart."""
    scale = np.geomspace(1, 1e-7, 5)
    x = np.diag(scale)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((5, 1)))
    for structure in ("full", "kron", "lanczos"):
        la = bnnlaplace.Laplace(network, "regression", hessian_structure=structure, prior_precision=1e-14)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            la = la.fit((x, np.zeros((5, 1))), key=jax.random.key(0))
            found = la.structure.log_determinant(1e-14)
        np.testing.assert_allclose(found.mean(), np.log1p(scale**2 / 1e-14).sum(), rtol=1e-6)


def halves(w, x):
    return (x.astype(jnp.bfloat16) @ jnp.ones((4, 4), jnp.bfloat16)).astype(jnp.float32) @ w


def rounded_outputs(w, x):
    return (x @ w).astype(jnp.bfloat16)


def in_a_loop(w, x):
    def step(carry, _):
        return (carry.astype(jnp.float16) * 2).astype(jnp.float32), None

    return lax.scan(step, x @ w, None, length=2)[0]


def beside(w, x):
    _ = (x @ w).astype(jnp.bfloat16)
    return x @ w


def few_mantissa_bits(w, x):
    return lax.reduce_precision(x @ w, exponent_bits=8, mantissa_bits=10)


@pytest.mark.parametrize(
    "function, expected",
    [
        (halves, SINGLE),  # nothing behind the weights is short
        (beside, SINGLE),
        (rounded_outputs, rounding.of_type(jnp.bfloat16)),
        (in_a_loop, rounding.of_type(jnp.float16)),
        (few_mantissa_bits, 2.0**-10),
    ],
)
def test_the_type_between_weights_and_outputs(function, expected):
    network = bnnlaplace.Network.from_function(function, jnp.ones((4, 3)))
    assert derivative_rounding(NetworkSpec.of(network, np.ones((2, 4), np.float32))) == expected
