"""Layers whose outputs are those of the network: found in the trace, and summed without a pass for each output."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import exhaustive, two_layers
from jax.tree_util import Partial

import bnnlaplace
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.curvature import diagonal, jacobian, kronecker, tapped
from bnnlaplace.curvature.direct import direct_leaves
from bnnlaplace.curvature.layers import find
from bnnlaplace.model.likelihoods.closed_forms import curvature_diagonal, curvature_sum
from bnnlaplace.structure import DiagonalStructure, KroneckerStructure

RNG = np.random.default_rng(2)
COUNT, INPUTS, OUTPUTS = 11, 5, 4
X, WEIGHTS = RNG.normal(size=(COUNT, INPUTS)), RNG.uniform(0, 2, COUNT) * (np.arange(COUNT) != 3)
PARAMS = {"b": RNG.normal(size=OUTPUTS), "w": RNG.normal(size=(INPUTS, OUTPUTS))}
ORDER = np.array([2, 0, 3, 1])
pytestmark = pytest.mark.usefixtures("x64")


def network(function=lambda p, x: x @ p["w"] + p["b"], params=PARAMS):
    return bnnlaplace.Network.from_function(function, params)


def deep():
    """A network whose first layer takes a pass for each output, and whose last one does not."""
    shapes = {"w1": (INPUTS, 3), "b1": (3,), "w2": (3, OUTPUTS), "b2": (OUTPUTS,)}
    return network(two_layers, {name: RNG.normal(size=shape) for name, shape in shapes.items()})


def twice(h):
    return h + jnp.tanh(h)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda p, x: x @ p["w"] + p["b"], "bw"),
        (lambda p, x: p["b"].reshape(1, -1) + jnp.einsum("ni,io->no", x, p["w"]), "bw"),
        (lambda p, x: (x @ p["w"] + p["b"]).astype(jnp.float32).astype(float) - jnp.tanh(x @ p["w"][:, ORDER]), "b"),
        (lambda p, x: x @ p["w"] - x[:, :OUTPUTS] - p["b"], "w"),
        (lambda p, x: x @ p["w"] + p["b"] + jnp.tanh(p["b"]), "w"),
        (lambda p, x: x @ p["w"][:, ORDER] + p["b"][ORDER], ""),
        (lambda p, x: twice(x @ p["w"] + p["b"]), ""),
        (lambda p, x: 2 * (x @ p["w"] + p["b"]), ""),
        (lambda p, x: (x @ p["w"] + p["b"]) * x[:, :1], ""),
        (lambda p, x: (lambda h: h + h)(x @ p["w"]) + p["b"], "b"),
        (lambda p, x: jnp.cumsum(x @ p["w"], axis=1) + p["b"], "b"),
        (lambda p, x: (p["w"].T @ x.T + p["b"][:, None]).T, ""),
        (lambda p, x: (x @ p["w"].reshape(INPUTS, 2, 2).transpose(0, 2, 1).reshape(INPUTS, 4)) + p["b"], "b"),
        (lambda p, x: x @ p["w"] + p["b"][0], "w"),
        (lambda p, x: x[:, None] @ p["w"] + p["b"], ""),  # several positions, if only one
    ],
)
def test_a_layer_is_found_only_where_its_outputs_leave_the_network(function, expected):
    """A factor, another order, or a second way to the outputs would make the closed forms wrong."""
    net = network(function)
    found = direct_leaves(find(net, X))
    assert "".join(leaf_names(net.params)[leaf] for leaf in sorted(found)) == expected
    if net(net.params, X).ndim == 2:
        passed = tapped.forward(net, net.params, X)
        rows = jacobian.jacobian(passed, np.arange(OUTPUTS)[None]).rows()[:, 0]
        np.testing.assert_allclose(rows, oracles.jacobian(net, net.params, X), rtol=1e-6, atol=1e-7)


def own(matrix):
    """Targets with correlated noise: a likelihood of which only the factor is known."""

    def log_prob(f, y):
        return -0.5 * jnp.sum(((y - f) @ matrix) ** 2, axis=-1)

    return bnnlaplace.Likelihood(
        "own", "array", Partial(log_prob), Partial(lambda f, u: u @ matrix.T), Partial(lambda f: f)
    )


CLASS_WEIGHTS = np.array([0.5, 2, 1, 0])
LIKELIHOODS = {
    "categorical": bnnlaplace.categorical,
    "weighted": partial(bnnlaplace.categorical, -1, CLASS_WEIGHTS),
    "tempered": lambda: bnnlaplace.tempered(bnnlaplace.categorical(), 0.3),
    "gaussian": lambda: bnnlaplace.gaussian(np.array([0.5, 1, 2, 0.1])),
    "bernoulli": bnnlaplace.bernoulli,
    "heteroscedastic": bnnlaplace.heteroscedastic,
    "own": lambda: own(np.arange(16).reshape(4, 4) / 7 - np.eye(4)),
}


def curvatures(name, likelihood, outputs):
    """Lambda_n times the weight of the target, (N, C, C), in closed form."""
    f, identity = np.asarray(outputs), np.eye(OUTPUTS)
    if name == "heteroscedastic":
        return identity * np.concatenate([np.exp(-f[:, 2:]), np.full((len(f), 2), 0.5)], axis=1)[:, None]
    if name == "own":
        matrix = np.arange(16).reshape(4, 4) / 7 - identity
        return np.broadcast_to(matrix @ matrix.T, (len(f), OUTPUTS, OUTPUTS))
    of_outputs = oracles.output_curvature(likelihood, f)
    return of_outputs / 0.3 if name == "tempered" else of_outputs


@pytest.mark.parametrize(
    ("name", "make"),
    [
        *((name, network) for name in ("weighted", "gaussian", "bernoulli", "heteroscedastic")),
        ("own", deep),
        exhaustive("categorical", network),
        exhaustive("tempered", network),
        exhaustive("own", network),
        exhaustive("categorical", deep),
    ],
)
def test_curvature_and_variances(name, make, monkeypatch):
    """Dense algebra in float64. None has noticed a layer of many outputs that takes a pass for each of them."""
    net = make()
    if len(net.params) == 2:
        for function in ("over_columns", "at_columns"):  # neither is called for a last layer
            monkeypatch.delattr(tapped, function)
    likelihood = LIKELIHOODS[name]()
    labels = np.arange(COUNT) % 5 - 1
    weights = likelihood.weights_of(labels, jnp.asarray(WEIGHTS))
    outputs = net(net.params, X)
    of_targets = np.where(labels < 0, 0, CLASS_WEIGHTS[labels]) if name == "weighted" else np.ones(COUNT)
    of_outputs = 1.7 * (WEIGHTS * of_targets)[:, None, None] * curvatures(name, likelihood, outputs)
    rows = oracles.jacobian(net, net.params, X)
    matrix = oracles.ggn(rows, of_outputs)
    options = {"weights": weights, "scale": 1.7, "microbatch": 4}
    arguments = (net, likelihood, net.params, X)
    found = jax.jit(lambda: diagonal.ggn_diagonal(*arguments, **options))()
    np.testing.assert_allclose(found, np.diag(matrix), rtol=1e-9)

    sums = jax.jit(lambda: kronecker.factors(*arguments, **options))()
    by_name = dict(zip(leaf_names(net.params), sums, strict=True))
    bias, kernel = (by_name[name] for name in (("b", "w") if "w" in by_name else ("b2", "w2")))
    features = X if "w" in by_name else np.tanh(X @ net.params["w1"] + net.params["b1"])
    present = WEIGHTS * of_targets
    np.testing.assert_allclose(kernel.inputs, features.T @ (present[:, None] * features), rtol=1e-9)
    np.testing.assert_allclose(kernel.outputs, of_outputs.sum(axis=0), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(kernel.count, present.sum(), rtol=1e-12)
    np.testing.assert_allclose(bias.blocks[0], of_outputs.sum(axis=0), rtol=1e-9, atol=1e-12)

    passed = tapped.forward(net, net.params, X)
    identity = np.eye(len(matrix))
    factored = KroneckerStructure.fit(sums)
    parts = [block.rotated_back(block.eigenvalues * block.rotated(part)) for block, part in factored._parts(identity)]
    for structure, dense in ((DiagonalStructure(found), np.diag(found)), (factored, np.concatenate(parts, axis=-1))):
        covariance = structure.output_covariance([0.5])
        for numbers in (np.array([[1, 3]]), np.array([[2], [0], [OUTPUTS]])):  # the last one stands for padding
            part = np.concatenate([rows, np.zeros_like(rows[:, :1])], axis=1)[:, numbers]
            expected = np.einsum("mucp,pq,mudq->mucd", part, np.linalg.inv(dense + 0.5 * identity), part)
            variances = covariance(jacobian.jacobian(passed, numbers))[0]
            np.testing.assert_allclose(variances, expected, rtol=1e-8, atol=1e-10)
            product = jacobian.jacobian(passed, numbers).times(identity[:-7, :3])
            np.testing.assert_allclose(product, part[..., :3], atol=1e-12)


def test_a_bias_alone_has_the_variance_of_each_example():
    """Derivatives that all examples share do not tell how many there are."""
    net = network(lambda p, x: x @ PARAMS["w"] + p["b"], {"b": PARAMS["b"]})
    assert direct_leaves(find(net, X)) == {0}
    la = bnnlaplace.Laplace(net, hessian_structure="kron").fit((X, np.arange(COUNT) % 4))
    covariance = la.functional_variance(X)
    assert covariance.shape == (COUNT, OUTPUTS, OUTPUTS)
    expected = np.linalg.inv(curvatures("", bnnlaplace.categorical(), net(net.params, X)).sum(axis=0) + np.eye(OUTPUTS))
    np.testing.assert_allclose(covariance, np.broadcast_to(expected, covariance.shape), rtol=1e-9, atol=1e-12)


def test_curvature_keeps_its_digits_where_the_network_is_sure():
    """p (1 - p) with 1 - p as a difference is zero in float32 from a logit of 17 on."""
    outputs = 40 * RNG.normal(size=(30, 6))
    outputs[:4, 1] = outputs[:4].max(axis=1)  # two classes, or one
    exact = oracles.output_curvature(bnnlaplace.categorical(), outputs)
    log_p = outputs - np.logaddexp.reduce(outputs, axis=1, keepdims=True)
    others = np.stack([np.logaddexp.reduce(np.delete(log_p, c, axis=1), axis=1) for c in range(6)], axis=1)
    variances = np.exp(log_p + others)
    with jax.enable_x64(False):
        single, weights = jnp.asarray(outputs, jnp.float32), jnp.ones(30)
        found = curvature_diagonal(bnnlaplace.categorical(), single)
        total = curvature_sum(bnnlaplace.categorical(), single, weights)
    normal = variances > 1e-30
    assert (variances[normal] < 1e-12).sum() > 10
    np.testing.assert_allclose(np.asarray(found)[normal], variances[normal], rtol=1e-4)  # of rounded logits near 100
    off = ~np.eye(6, dtype=bool)
    np.testing.assert_allclose(np.asarray(total)[off], exact.sum(axis=0)[off], rtol=1e-4, atol=1e-30)
    np.testing.assert_allclose(np.diag(total), variances.sum(axis=0), rtol=1e-4)


def test_a_likelihood_with_a_curvature_of_its_own_is_not_taken_for_the_one_it_was_made_of():
    doubled = dataclasses.replace(bnnlaplace.categorical(), hessian_mv=Partial(lambda f, v: 2 * v))
    outputs, weights = jnp.asarray(RNG.normal(size=(3, OUTPUTS))), jnp.ones(3)
    np.testing.assert_allclose(curvature_sum(doubled, outputs, weights), 6 * np.eye(OUTPUTS))
    np.testing.assert_allclose(curvature_diagonal(doubled, outputs), np.full((3, OUTPUTS), 2.0))
