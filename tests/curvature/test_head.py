"""Many outputs of few features: curvature and variances through a root, or derivatives, of the features alone."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import two_layers

import bnnlaplace
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.curvature import diagonal, head, kronecker, tapped
from bnnlaplace.curvature.direct import direct_leaves
from bnnlaplace.curvature.layers import find
from bnnlaplace.model.likelihoods import sites
from bnnlaplace.predictive import functional

RNG = np.random.default_rng(5)
COUNT, INPUTS, FEATURES, OUTPUTS = 6, 3, 2, 5
X, WEIGHTS = RNG.normal(size=(COUNT, INPUTS)), np.array([1.0, 0.5, 0, 2, 1, 1])
SHAPES = {"w1": (INPUTS, FEATURES), "b1": (FEATURES,), "w2": (FEATURES, OUTPUTS), "b2": (OUTPUTS,)}
PARAMS = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
with jax.enable_x64(True):
    NETWORK = bnnlaplace.Network.from_function(two_layers, PARAMS)
LABELS = np.arange(COUNT) % OUTPUTS
pytestmark = pytest.mark.usefixtures("x64")


def without_a_head(monkeypatch):
    """Take a pass for each output again. Programs that were compiled with a head must not be found."""
    monkeypatch.setattr(head, "OUTPUTS_FOR_FEATURE", np.inf)
    jax.clear_caches()
    from bnnlaplace.curvature import jacobian

    jacobian._size.cache_clear()


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (two_layers, "w2"),
        (lambda p, x: jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"], "w2"),
        (lambda p, x: two_layers(p, x) + jnp.sum(p["b1"]), None),
        (lambda p, x: two_layers(p, x) + jnp.tile(x @ p["w1"], (1, 3))[:, :OUTPUTS], None),
        (lambda p, x: jnp.tanh(x @ p["w1"]) @ (p["w2"] * p["b1"][:, None]), None),
    ],
)
def test_a_head_is_found_only_where_other_weights_have_no_other_way(function, expected):
    """A second way around the features would be missing from all derivatives."""
    net = bnnlaplace.Network.from_function(function, PARAMS)
    weights = find(net, X)
    found = head.head_layer(weights, direct_leaves(weights))
    assert (None if found is None else leaf_names(PARAMS)[found]) == expected


def curvatures_of(name):
    """A likelihood, its points, and Lambda or what stands in its place as matrices."""
    likelihood, outputs = bnnlaplace.categorical(), jnp.asarray(NETWORK(PARAMS, X))
    if name == "softmax":
        return likelihood, None, oracles.output_curvature(likelihood, np.asarray(outputs))
    if name == "factors":
        factors = jnp.asarray(RNG.normal(size=(COUNT, OUTPUTS, OUTPUTS)))
        return sites.by_factors(likelihood), factors, factors @ jnp.swapaxes(factors, 1, 2)
    samples = outputs[:, None] + jnp.asarray(RNG.normal(size=(COUNT, 3, OUTPUTS)))
    dense = sites.dense(likelihood, jnp.swapaxes(samples, 0, 1))
    return sites.by_samples(likelihood), samples, dense


@pytest.mark.parametrize("name", ["softmax", "factors", "samples"])
def test_curvature_by_features(name, monkeypatch):
    """The diagonal is that of dense algebra, and Kronecker factors are those of a pass for each output."""
    likelihood, points, dense = curvatures_of(name)
    assert tapped.forward(NETWORK, PARAMS, X).head.is_narrow
    matrix = oracles.ggn(oracles.jacobian(NETWORK, PARAMS, X), WEIGHTS[:, None, None] * np.asarray(dense))
    arguments, options = (NETWORK, likelihood, PARAMS, X), {"weights": WEIGHTS, "points": points, "microbatch": 4}
    found = jax.jit(lambda: diagonal.ggn_diagonal(*arguments, **options))()
    np.testing.assert_allclose(found, np.diag(matrix), rtol=1e-9)
    factors = jax.jit(lambda: kronecker.factors(*arguments, **options))()
    if name != "samples":  # a factor of whose columns is a random one
        without_a_head(monkeypatch)
        expected = jax.jit(lambda: kronecker.factors(*arguments, **options))()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), factors, expected)


def test_derivatives_of_the_curvature(monkeypatch):
    """Joint training differentiates the diagonal; the root's null space must not make that NaN."""
    confident = jax.tree.map(lambda leaf: 9 * leaf, PARAMS)

    def total(params):
        diagonals = diagonal.ggn_diagonal(NETWORK, bnnlaplace.categorical(), params, X)
        return jnp.sum(jnp.log1p(diagonals))

    for params in (PARAMS, confident):
        found = jax.jit(jax.grad(total))(params)
        with monkeypatch.context() as patch:
            without_a_head(patch)
            expected = jax.jit(jax.grad(total))(params)
        jax.clear_caches()
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-9), found, expected)


@pytest.mark.parametrize("structure", ["diag", "kron", "full"])
def test_variances_by_features(structure, monkeypatch):
    """J Sigma J' of dense algebra, from derivatives of the features."""
    counted = []
    count = functional.feature_derivatives
    monkeypatch.setattr(functional, "feature_derivatives", lambda *given: counted.append(1) or count(*given))
    jax.clear_caches()
    la = bnnlaplace.Laplace(NETWORK, hessian_structure=structure, prior_precision=0.7).fit((X, LABELS))
    found = la.functional_variance(X)
    inverse = np.stack(
        [la.fitted.structure.inverse_product(unit, 0.7) for unit in np.eye(sum(map(np.size, PARAMS.values())))]
    )
    rows = oracles.jacobian(NETWORK, PARAMS, X)
    np.testing.assert_allclose(found, np.einsum("ncp,pq,ndq->ncd", rows, inverse, rows), rtol=1e-8, atol=1e-10)
    scaled = NETWORK(PARAMS, X) / np.sqrt(1 + np.pi / 8 * np.diagonal(found, axis1=1, axis2=2))
    np.testing.assert_allclose(la.predictive(X), jax.nn.softmax(scaled), rtol=1e-8)
    assert len(counted) == 2


def test_equations_that_depend_on_the_number_of_examples():
    """A single input has other equations here, in which no layer is found."""
    first = {"token": RNG.normal(size=FEATURES), **PARAMS}

    def function(p, x):
        return (jnp.tanh(x @ p["w1"]) + jnp.broadcast_to(p["token"], (len(x), FEATURES))) @ p["w2"] + p["b2"]

    params = {name: first[name] for name in ("token", "w1", "w2", "b2")}
    network = bnnlaplace.Network.from_function(function, params)
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit((X, LABELS))
    np.testing.assert_allclose(la.predictive(X[:1]), la.predictive(X)[:1], rtol=1e-9)


def test_the_visual_attention_network_has_a_head():
    from training.models.van import VAN, VARIANTS

    module, image = VAN.from_variant(VARIANTS["digits"], 100), np.zeros((2, 8, 8, 1), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    network = bnnlaplace.Network.from_linen(module, jax.tree.map(lambda leaf: np.zeros(leaf.shape), variables))
    weights = find(network, image)
    assert head.num_narrow_features(weights, direct_leaves(weights)) == 32
