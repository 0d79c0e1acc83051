"""Every matrix product and convolution asks for full precision, which accelerators give only on request."""

from functools import cache, partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import two_layers

import bnnlaplace
from bnnlaplace import evidence, krylov
from bnnlaplace.curvature import dense, diagonal, ggn, jacobian, kronecker, tapped
from bnnlaplace.model import batched
from bnnlaplace.predictive import functional
from bnnlaplace.structure import DenseStructure, DiagonalStructure, KrylovStructure, SpectralStructure
from bnnlaplace.structure.kronecker import KroneckerStructure

SHAPES = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}
RNG = np.random.default_rng(0)
PARAMS = {name: jnp.asarray(RNG.normal(size=shape), jnp.float32) for name, shape in SHAPES.items()}
NETWORK = bnnlaplace.Network.from_function(two_layers, PARAMS)
X, Y = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32), jnp.arange(6) % 3
ROWS = jnp.asarray(RNG.normal(size=(3, 43)), jnp.float32)
MODEL = NETWORK, bnnlaplace.categorical(), PARAMS, X


def log_evidence(params, precision=1.0, **options):
    length = 18 if options.get("side") == "dual" else 43
    probes = jnp.ones((2, length), jnp.float32)
    settings = {"network": NETWORK, "likelihood": bnnlaplace.categorical(), "num_matvecs": 3, **options}
    return evidence.log_marginal_likelihood(params, precision, (X, Y), probes, **settings).mean


def forward_gradient(side):
    return jax.value_and_grad(partial(log_evidence, PARAMS, gradient="forward", side=side))(jnp.ones(43, jnp.float32))


@cache
def structure():
    """A structure of three Krylov vectors. It must exist before a test traces what uses it."""
    return KrylovStructure.from_decomposition(next(krylov.block_lanczos(lambda v: v, ROWS, max_vectors=3)))


@cache
def kronecker_structure():
    return KroneckerStructure.fit(kronecker.factors(*MODEL))


def function_samples(num_precisions):
    push = partial(batched.pushforward, NETWORK, X)
    return list(structure().function_samples(push, jax.random.key(0), 2, [1.0, 2.0][:num_precisions]))


def gradient_of_basis(method):
    """Differentiate the first field of a Krylov result."""
    return jax.grad(lambda start: jnp.sum(method(lambda v: jnp.arange(43.0) * v, start, num_matvecs=3)[0]))(ROWS[0])


def gradient_of_convolution():
    kernel, images = jnp.ones((2, 2, 1, 3), jnp.float32), jnp.ones((2, 4, 4, 1), jnp.float32)
    network = bnnlaplace.Network.from_linen(nn.Conv(3, (2, 2), use_bias=False), {"params": {"kernel": kernel}})
    return jax.grad(lambda params: jnp.sum(network(params, images) ** 2))(network.params)


dense_structure = DenseStructure(jnp.eye(43))


def covariance(structure):
    passed = tapped.forward(NETWORK, PARAMS, X)
    return structure.output_covariance([1.0])(jacobian.jacobian(passed, np.arange(3)[None]))


CASES = {
    "block product": lambda: ggn.block_product(*MODEL)(ROWS),
    "diagonal": lambda: diagonal.ggn_diagonal(*MODEL),
    "dense": lambda: dense.ggn(*MODEL),
    "evidence, primal": lambda: jax.value_and_grad(log_evidence)(PARAMS),
    "evidence, dual": lambda: jax.value_and_grad(partial(log_evidence, side="dual"))(PARAMS),
    "evidence, autodiff": lambda: jax.value_and_grad(partial(log_evidence, gradient="autodiff"))(PARAMS),
    "evidence, quadrature": lambda: jax.value_and_grad(partial(log_evidence, gradient="quadrature"))(PARAMS),
    "evidence, forward": lambda: [forward_gradient(side) for side in ("primal", "dual")],
    "matrix function": lambda: gradient_of_basis(partial(krylov.matfun_lanczos, jnp.exp)),
    "Arnoldi": lambda: gradient_of_basis(krylov.arnoldi),
    "Arnoldi, single pass": lambda: gradient_of_basis(partial(krylov.arnoldi, reorthogonalise="none")),
    "Lanczos, recurrence only": lambda: gradient_of_basis(partial(krylov.lanczos, reorthogonalise="none")),
    "pushforward": lambda: batched.pushforward(NETWORK, X, ROWS),
    "samples at each input": lambda: functional.marginal_samples(jax.random.key(0), jnp.ones((2, 3, 3)), 4),
    "variance from samples": lambda: functional.sample_variance(jnp.ones((4, 2, 3))),
    "diagonal variance": lambda: covariance(DiagonalStructure(ROWS[0])),
    "dense variance at many precisions": lambda: [covariance(dense_structure) for _ in range(3)],
    "spectral variance": lambda: covariance(SpectralStructure(ROWS[0, :3], ROWS[:3])),
    "spectral samples": lambda: SpectralStructure(ROWS[0, :3], ROWS[:3]).samples(jax.random.key(0), 2, 1.0),
    "Krylov samples": lambda: structure().samples(jax.random.key(0), 2, 1.0),
    "Krylov outputs from the basis": lambda: function_samples(2),
    "Krylov outputs from samples": lambda: function_samples(1),
    "Kronecker factors": lambda: kronecker.factors(*MODEL),
    "Kronecker variance": lambda: covariance(kronecker_structure()),
    "Kronecker samples": lambda: kronecker_structure().samples(jax.random.key(0), 2, 1.0),
    "convolution": gradient_of_convolution,
}


def precisions(jaxpr):
    """Yield the precision that each product asks for, in a jaxpr and in those inside it."""
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.params["precision"]
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from precisions(inner)


@pytest.mark.parametrize("name", CASES)
def test_products_ask_for_full_precision(name):
    structure()
    kronecker_structure()
    highest = jax.lax.Precision.HIGHEST
    assert set(precisions(jax.make_jaxpr(CASES[name])().jaxpr)) == {(highest, highest)}


def test_a_precision_that_the_network_states_is_kept():
    network = bnnlaplace.Network.from_function(lambda p, x: jnp.matmul(x, p, precision="default"), X.T)
    assert set(precisions(jax.make_jaxpr(network)(X.T, X).jaxpr)) == {(jax.lax.Precision.DEFAULT,) * 2}


def test_a_plain_product_is_told_apart():
    assert set(precisions(jax.make_jaxpr(jnp.matmul)(ROWS.T, ROWS).jaxpr)) == {None}
