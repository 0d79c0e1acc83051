"""A posterior over some of the weights: the same as that of a network that has no others."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace.checkpoint.pytree import CheckpointError
from bnnlaplace.core.tree import leaf_names, ravel
from bnnlaplace.model.data import as_data
from bnnlaplace.model.subset import last_layer

RNG = np.random.default_rng(0)
X = RNG.normal(size=(40, 4))
Y = RNG.integers(0, 3, size=40)
STRUCTURES = ["full", "diag", "lanczos"]
SUBSETS = {"last layer": "last_layer", "predicate": lambda path: path.startswith("head")}


def outputs(params, x):
    hidden = jnp.tanh(x @ params["trunk"]["w"] + params["trunk"]["b"])
    return hidden @ params["head"]["w"] + params["head"]["b"]


@pytest.fixture
def network(x64):
    shapes = {"trunk": {"w": (4, 6), "b": (6,)}, "head": {"w": (6, 3), "b": (3,)}}
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: np.random.default_rng(len(s)).normal(size=s), shapes, is_leaf=is_shape)
    return bnnlaplace.Network.from_function(outputs, params)


def fit(network, structure, subset):
    la = bnnlaplace.Laplace(network, hessian_structure=structure, subset_of_weights=subset, prior_precision=0.7)
    return la.fit((X, Y), key=jax.random.key(0), num_probes=8, tolerance=1e-6, microbatch=16)


@pytest.mark.parametrize(
    ("structure", "subset"),
    usual([("diag", "predicate"), ("lanczos", "last layer")], STRUCTURES, SUBSETS),
)
def test_last_layer_is_a_network_of_its_features(network, structure, subset):
    la = fit(network, structure, SUBSETS[subset])
    features = jnp.tanh(X @ network.params["trunk"]["w"] + network.params["trunk"]["b"])
    alone = bnnlaplace.Network.from_function(lambda p, phi: phi @ p["w"] + p["b"], network.params["head"])
    reference = bnnlaplace.Laplace(alone, hessian_structure=structure, prior_precision=0.7)
    reference = reference.fit((features, Y), key=jax.random.key(0), num_probes=8, tolerance=1e-6, microbatch=16)
    assert la.network.params == {"head": la.network.params["head"], "trunk": {"w": None, "b": None}}
    for found, expected in (
        (la.log_marginal_likelihood().mean, reference.log_marginal_likelihood().mean),
        (la.mode_gradient(), reference.mode_gradient()),
        (la.functional_variance(X[:3]), reference.functional_variance(features[:3])),
        (la.predictive(X[:3]), reference.predictive(features[:3])),
        (ravel(la.sample(jax.random.key(1), 2)), ravel(reference.sample(jax.random.key(1), 2))),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12)


def test_weights_in_the_middle_against_the_dense_posterior(network):
    la = fit(network, "full", lambda path: path == "trunk/w")
    rows = slice(6, 30)  # of trunk/b, trunk/w among all weights, head before them
    rows = slice(rows.start + 21, rows.stop + 21)
    jacobians = oracles.jacobian(network, network.params, X)
    curvatures = oracles.output_curvature(la.likelihood, network(network.params, X))
    curvature = oracles.ggn(jacobians, curvatures)[rows, rows]
    expected = np.linalg.slogdet(np.eye(24) + curvature / 0.7)[1]
    np.testing.assert_allclose(la.structure.log_determinant(0.7), expected, rtol=1e-10)
    sample = jax.tree.map(lambda leaf: leaf[0], la.sample(jax.random.key(0), 2))
    whole = la.network.full_params(sample)
    np.testing.assert_array_equal(whole["head"]["w"], network.params["head"]["w"])
    np.testing.assert_array_equal(network(whole, X), la.network(sample, X))


def test_features_are_computed_once(network):
    passes = []

    def counted(params, x):
        jax.debug.callback(lambda row: passes.append(row), x[0, 0])
        return outputs(params, x)

    counting = bnnlaplace.Network.from_function(counted, network.params)

    def passes_of(subset, max_vectors):
        passes.clear()
        la = bnnlaplace.Laplace(counting, subset_of_weights=subset)
        with pytest.warns(UserWarning, match="not converged"):
            la.fit((X, Y), key=jax.random.key(0), num_probes=2, max_vectors=max_vectors, tolerance=1e-9)
        jax.effects_barrier()
        return len(passes)

    passes_of("last_layer", 4)  # the first fit also calls the network to check it
    assert passes_of("last_layer", 4) == passes_of("last_layer", 8)
    assert passes_of("all", 4) < passes_of("all", 8)
    la = fit(counting, "diag", "last_layer")
    passes.clear()
    la.predictive(X, microbatch=10)
    jax.effects_barrier()
    assert len(passes) == 4  # for mean and variance together


@pytest.mark.parametrize("structure", STRUCTURES)
def test_saved_and_loaded_for_the_whole_network(network, structure, tmp_path):
    la = fit(network, structure, "last_layer")
    la.save(tmp_path / "posterior")
    elsewhere = network.with_params(jax.tree.map(jnp.zeros_like, network.params))
    again = bnnlaplace.Laplace.load(tmp_path / "posterior", elsewhere)
    np.testing.assert_array_equal(again.predictive(X), la.predictive(X))
    other = bnnlaplace.Network.from_function(outputs, {"head": network.params["head"]})
    with pytest.raises(CheckpointError, match="trunk"):
        bnnlaplace.Laplace.load(tmp_path / "posterior", other)


def test_what_is_refused(network, unchecked_annotations):
    with pytest.raises(ValueError, match="subset_of_weights=.* must be 'all', 'last_layer' or a function.*got 'first'"):
        bnnlaplace.Laplace(network, subset_of_weights="first")
    with pytest.raises(ValueError, match=r"must match at least one of the paths \['head/b', .*; it matches none"):
        fit(network, "diag", lambda path: "kernel" in path)


def test_last_layer_behind_rematerialisation():
    shapes = {"a": (4, 6), "b": (6, 3)}
    params = {name: np.random.default_rng(0).normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    remat = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"])
    plain = bnnlaplace.Network.from_function(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params)
    network = bnnlaplace.Network.from_function(lambda p, x: remat(p, x), params)
    assert last_layer(network, X) == {"b"}
    la, reference = (
        bnnlaplace.Laplace(n, hessian_structure="diag", subset_of_weights="last_layer").fit((X.astype(np.float32), Y))
        for n in (network, plain)
    )
    np.testing.assert_allclose(la.predictive(X[:3]), reference.predictive(X[:3]), rtol=1e-5)


FLAT = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}


def flat(params, x):
    """Weights without modules: the last layer is told by the order in which they enter alone."""
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


@pytest.mark.parametrize("structure", usual(["diag"], [*STRUCTURES, "kron"]))
def test_a_fit_of_a_fit_keeps_its_last_layer(x64, structure):
    """The second fit is given the linearised network of the first, which computes with its weights in another order."""
    network = bnnlaplace.Network.from_function(flat, nested(FLAT))
    la = bnnlaplace.Laplace(network, hessian_structure=structure, subset_of_weights="last_layer")

    def fitted(la, **options):
        return la.fit((X, Y), key=jax.random.key(0), **options)

    def variational(la):
        return fitted(la, approximation="variational")

    once = fitted(la, mean="linear")
    twice = fitted(once, mean="linear")
    assert leaf_names(twice.network.params) == ["b2", "w2"]
    np.testing.assert_allclose(twice.log_marginal_likelihood().mean, once.log_marginal_likelihood().mean, rtol=1e-4)
    bounds = [variational(start).log_marginal_likelihood().mean for start in (la, once, variational(la))]
    np.testing.assert_allclose(bounds, bounds[0], atol=0.05)
    with pytest.warns(UserWarning, match="have not settled after 1 fit"):
        chosen = variational(la).optimize_prior_precision(refit=variational, max_refits=1)
    assert leaf_names(chosen.network.params) == ["b2", "w2"]


def test_last_layer_of_a_loop_is_not_guessed():
    def scanned(params, x):
        step = lambda h, w: (jnp.tanh(h @ w["first"] @ w["second"]), None)  # noqa: E731
        return jax.lax.scan(step, x, params)[0]

    network = bnnlaplace.Network.from_function(scanned, {"first": jnp.ones((2, 4, 4)), "second": jnp.ones((2, 4, 4))})
    with pytest.raises(ValueError, match="'last_layer' cannot tell .* pass a predicate"):
        last_layer(network, X)


@pytest.mark.parametrize("max_bytes", [0, 10**6])
def test_features_of_a_stream_are_kept_if_they_are_small(max_bytes):
    calls = []

    def double(x):
        calls.append(len(x))
        return 2 * x

    pairs = [(X[:16], Y[:16]), (X[16:32], Y[16:32]), (X[32:], Y[32:])]
    mapped = as_data(pairs).mapped(double, max_bytes)
    for _ in range(2):
        found = list(mapped)
        assert [int(batch.weights.sum()) for batch in found] == [16, 16, 8]
        np.testing.assert_allclose(found[1].inputs, 2 * X[16:32], rtol=1e-6)
    assert len(calls) == 1 + (3 if max_bytes else 6)  # one for the shapes
    assert mapped.num_examples == 40


def test_a_precision_of_all_weights_serves_some(network):
    """Only the leaves with a posterior are taken from a precision of all weights, as from a prior mean."""
    precision = {"trunk": {"w": 1.0, "b": 2.0}, "head": {"w": 3.0, "b": np.array([4.0, 5.0, 6.0])}}
    found, expected = (
        bnnlaplace.Laplace(network, hessian_structure="diag", subset_of_weights="last_layer", prior_precision=each).fit(
            (X, Y)
        )
        for each in (precision, np.concatenate([[4.0, 5.0, 6.0], np.full(18, 3.0)]))
    )
    np.testing.assert_allclose(found.log_marginal_likelihood().mean, expected.log_marginal_likelihood().mean)


# --- heads side by side -----------------------------------------------------------------------------------------

SIDES = {"body/w": (4, 6), "left/w": (6, 2), "left/b": (2,), "right/w": (6, 1), "right/b": (1,), "log_scale": (1,)}


def nested(shapes):
    tree = {}
    for number, (path, shape) in enumerate(shapes.items()):
        *folder, name = path.split("/")
        leaf = np.random.default_rng(number).normal(size=shape)
        (tree.setdefault(folder[0], {}) if folder else tree)[name] = leaf
    return tree


def sides(params, x):
    """Three outputs: two of the left head, one of the right one, which enters the forward pass first."""
    hidden = jnp.tanh(x @ params["body"]["w"])
    right = hidden @ params["right"]["w"] + params["right"]["b"]
    return jnp.concatenate([hidden @ params["left"]["w"] + params["left"]["b"], right], axis=-1)


def with_scale(params, x):
    """The same and a number that no input enters, as a log variance is."""
    return jnp.concatenate([sides(params, x), jnp.broadcast_to(params["log_scale"], (len(x), 1))], axis=-1)


def with_skip(params, x):
    """The left head beside a linear map of the inputs, whose weights also enter the left head."""
    hidden = x @ params["body"]["w"]
    left = jnp.tanh(hidden) @ params["left"]["w"] + params["left"]["b"]
    return jnp.concatenate([left, hidden[:, :1]], axis=-1)


def network_of(function):
    shapes = {path: shape for path, shape in SIDES.items() if path != "log_scale" or function is with_scale}
    return bnnlaplace.Network.from_function(function, nested(shapes))


HEADS = {"left/w", "left/b", "right/w", "right/b"}


@pytest.mark.parametrize(("function", "structure"), usual([(with_scale, "lanczos")], (sides, with_scale), STRUCTURES))
def test_heads_side_by_side_are_last_layers_together(x64, function, structure):
    network = network_of(function)
    expected = HEADS | ({"log_scale"} if function is with_scale else set())
    for given in (network, network.linearised(), network.subset(expected.__contains__).linearised()):
        assert last_layer(given, X) == expected
    targets = np.random.default_rng(1).normal(size=(40, 3 + (function is with_scale)))
    for subset in ("last_layer", expected.__contains__):
        options = {"hessian_structure": structure, "subset_of_weights": subset, "sigma_noise": 0.5}
        la = bnnlaplace.Laplace(network, "regression", **options).fit((X, targets), key=jax.random.key(0))
        phi = np.concatenate([np.tanh(X @ network.params["body"]["w"]), np.ones((40, 1))], axis=1)
        precision = 4 * phi.T @ phi + np.eye(7)
        if structure == "diag":
            precision = np.diag(np.diag(precision))
        variance = np.einsum("np,pq,nq->n", phi, np.linalg.inv(precision), phi)
        scale = np.full(40, 1 / (4 * 40 + 1))
        columns = [variance] * 3 + [scale] * (function is with_scale)
        if structure != "lanczos" or la.krylov_error() is None:
            np.testing.assert_allclose(la.predictive(X)[1], np.stack(columns, axis=1), rtol=1e-6)
        else:
            assert (np.asarray(la.predictive(X)[1]) > 0).all()


def test_outputs_that_no_selected_weight_reaches(x64):
    network, targets = network_of(sides), np.zeros((40, 3))

    def fit_subset(network, subset):
        la = bnnlaplace.Laplace(network, "regression", hessian_structure="diag", subset_of_weights=subset)
        return la.fit((X, targets))

    message = r"must select weights that reach every output.*\['left/b', 'left/w'\].*output 2 of 3.*'right/w'"
    with pytest.raises(ValueError, match=message):
        fit_subset(network, lambda path: path.startswith("left"))
    with pytest.raises(
        ValueError, match=r"outputs 0, 1 of 3, whose variance would be 0.*\['body/w', 'left/b', 'left/w'\]"
    ):
        fit_subset(network.subset(lambda path: path.startswith("right")), "all")
    fit_subset(network, lambda path: path in ("left/b", "right/b"))
    with pytest.raises(ValueError, match=r"must find a layer for every output.*output 2 of 3.*one of \['body/w'\]"):
        fit_subset(network_of(with_skip), "last_layer")
    fit_subset(network_of(with_skip), lambda path: path in ("left/w", "body/w"))


MIXED = {
    "masks": lambda left, right: left * jnp.array([1.0, 0.0]) + right * jnp.array([0.0, 1.0]),
    "places": lambda left, right: left @ jnp.array([[1.0, 0.0]]) + right @ jnp.array([[0.0, 1.0]]),
    "a task": lambda left, right: left * jax.nn.one_hot(0, 2) + right * jax.nn.one_hot(1, 2),
    "units": lambda left, right: jnp.concatenate([left, right], axis=-1) @ jnp.diag(jnp.array([2.0, 3.0])),
}


@pytest.mark.parametrize("mix", MIXED)
def test_heads_that_meet_in_a_product_with_constants(x64, mix):
    """Zeros of a constant cut what a head reaches, so one head alone is refused and both are found."""

    def function(params, x):
        hidden = jnp.tanh(x @ params["body"]["w"])
        return MIXED[mix](hidden @ params["left"]["w"], hidden @ params["right"]["w"])

    shapes = {"body/w": (4, 6), "left/w": (6, 1), "right/w": (6, 1)}
    network = bnnlaplace.Network.from_function(function, nested(shapes))
    assert last_layer(network, X) == {"left/w", "right/w"}
    la = bnnlaplace.Laplace(network, "regression", lambda path: path == "left/w", hessian_structure="diag")
    with pytest.raises(ValueError, match=r"output 1 of 2, whose variance would be 0; select one of .*'right/w'"):
        la.fit((X, np.zeros((40, 2))))


def test_a_scale_after_the_heads_is_no_head(x64):
    network = bnnlaplace.Network.from_function(
        lambda params, x: sides(params, x) * params["scale"], nested({**SIDES, "scale": (3,)})
    )
    assert last_layer(network, X) == HEADS | {"scale"}


def test_an_output_that_no_weight_reaches_has_no_variance(x64):
    """As the logit of a class of reference, which is fixed at zero: that is the model, and not a choice of weights."""
    network = bnnlaplace.Network.from_function(
        lambda p, x: jnp.pad(jnp.tanh(x @ p["w"]) @ p["a"], ((0, 0), (0, 1))),
        {"w": np.ones((4, 5)), "a": np.ones((5, 2))},
    )
    assert last_layer(network, X) == {"a"}
    la = bnnlaplace.Laplace(network, hessian_structure="full", subset_of_weights="last_layer").fit((X, Y))
    variance = np.asarray(la.functional_variance(X[:2]))
    assert (variance[:, 2] == 0).all() and (variance[:, 0, 0] > 0).all()
