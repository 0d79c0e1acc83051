"""Every arrangement of GGN products against the matrix in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import LIKELIHOODS, exhaustive, random_problem, usual

import bnnlaplace
from bnnlaplace.core.tree import ravel
from bnnlaplace.curvature import dense, diagonal, ggn, microbatch, streamed
from bnnlaplace.curvature.linearisation import linearise

SCALE = 2.5


# The others are in `test_streamed_products_of_both_sides`.
@pytest.fixture(params=usual(["classification"], LIKELIHOODS))
def problem(request, x64):
    make, targets = LIKELIHOODS[request.param]
    return random_problem(make(), targets(np.random.default_rng(2), 11))


@pytest.fixture
def classification(x64):
    """A problem for tests that do not depend on the likelihood."""
    make, targets = LIKELIHOODS["classification"]
    return random_problem(make(), targets(np.random.default_rng(2), 11))


def test_all_products_agree_with_the_matrix(problem):
    network, likelihood, inputs, _, matrix = problem
    params, vectors = network.params, np.random.default_rng(3).normal(size=(3, len(matrix)))

    # Microbatches of 4 pad eleven examples to twelve: the copy must not count.
    @jax.jit
    def everything(network, likelihood, inputs, vectors):
        arguments = network, likelihood, network.params, inputs
        products = {
            "dense": dense.ggn(*arguments, scale=SCALE),
            "diagonal": diagonal.ggn_diagonal(*arguments, microbatch=4, scale=SCALE),
            "block": ggn.block_product(*arguments, microbatch=4, scale=SCALE)(vectors),
        }
        for remat in (False, True):
            linearised = linearise(network, network.params, inputs, microbatch=4, remat=remat)
            operator = ggn.ggn_operator(linearised, likelihood, scale=SCALE)
            assert operator.size == len(matrix)
            products[f"outputs, remat={remat}"] = linearised.outputs[:11]
            products[f"operator, remat={remat}"] = operator.matvec(vectors[0])
        return products

    expected = {"dense": SCALE * matrix, "diagonal": SCALE * np.diagonal(matrix), "block": SCALE * vectors @ matrix}
    for remat in (False, True):
        expected[f"outputs, remat={remat}"] = network(params, inputs)
        expected[f"operator, remat={remat}"] = SCALE * matrix @ vectors[0]
    for name, product in everything(network, likelihood, inputs, vectors).items():
        np.testing.assert_allclose(product, expected[name], atol=1e-10, err_msg=name)


def test_wide_layers_are_not_packed(classification, monkeypatch):
    network, likelihood, inputs, _, matrix = classification
    monkeypatch.setattr(dense, "MOST_PACKED", 2)
    unpacked = jax.jit(dense.ggn)(network, likelihood, network.params, inputs)
    np.testing.assert_allclose(unpacked, matrix, atol=1e-10)


def test_dense_counts_examples_by_their_weights(problem):
    """Weight two counts an example twice and weight zero leaves it out, also with padding.

    The product is exactly symmetric.
    """
    network, likelihood, inputs, _, _ = problem
    weights = np.array([2.0, 0.0, *np.ones(9)])
    repeated = np.concatenate([inputs[:1], inputs[:1], inputs[2:]])
    compute = jax.jit(dense.ggn, static_argnames="microbatch")
    weighted = compute(network, likelihood, network.params, inputs, weights=weights, microbatch=4)
    outputs = network(network.params, repeated)
    curvatures = oracles.output_curvature(likelihood, outputs)
    expected = oracles.ggn(oracles.two_layers_jacobian(network.params, repeated), curvatures)
    np.testing.assert_allclose(weighted, expected, atol=1e-10)
    np.testing.assert_array_equal(weighted, weighted.T)


def test_dense_memory_does_not_grow_with_the_data():
    """XLA's temporaries hold the rows of one microbatch only."""
    network = bnnlaplace.Network.from_function(lambda w, x: jnp.tanh(x @ w), jnp.ones((40, 5), jnp.float32))

    def temporaries(count):
        arguments = network, bnnlaplace.gaussian(0.5), network.params, jnp.ones((count, 40), jnp.float32)
        return jax.jit(dense.ggn).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    data = 4 * 40 * (1280 - 640)  # the inputs, cut into microbatches, are the one thing that grows
    assert temporaries(1280) - temporaries(640) <= 1.1 * data


@pytest.mark.parametrize("side", usual(["primal"], ["primal", "dual"]))
def test_memory_of_a_rematerialised_linearisation_does_not_grow_with_the_data(side):
    """A derivative of the products also holds no more than one microbatch beside data, outputs and vectors."""
    network = bnnlaplace.Network.from_function(
        lambda w, x: jnp.tanh(jnp.tanh(x @ w["in"]) @ w["middle"]) @ w["out"],
        {"in": jnp.ones((4, 64)), "middle": jnp.ones((64, 64)), "out": jnp.ones((64, 2))},
    )

    def temporaries(count, remat):
        def derivative(params, inputs):
            def squares(params):
                linearised = linearise(network, params, inputs, microbatch=16, remat=remat)
                if side == "primal":
                    operator = ggn.ggn_operator(linearised, bnnlaplace.categorical())
                else:
                    operator = ggn.dual_operator(linearised, bnnlaplace.categorical())
                return jnp.sum(operator.matvec(jnp.ones(operator.size)) ** 2)

            return jax.grad(squares)(params)

        arguments = network.params, jnp.ones((count, 4))
        return jax.jit(derivative).lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    of_one_example = 4 * (64 + 64)  # activations
    grown = [(temporaries(640, remat) - temporaries(160, remat)) / 480 for remat in (True, False)]
    assert grown[0] < 0.5 * of_one_example < grown[1]


def test_diagonal_of_convolutions_and_of_examples_that_count(x64):
    def outputs(params, x):
        x = jnp.tanh(jax.lax.conv(x, params["first"], (2, 1), "SAME") + params["bias"][:, None, None])
        x = jnp.tanh(jax.lax.conv(x, params["second"], (1, 1), "VALID"))
        return x.reshape(len(x), -1) @ params["head"]

    rng = np.random.default_rng(4)
    shapes = {"first": (3, 2, 3, 2), "bias": (3,), "second": (2, 3, 2, 2), "head": (12, 3)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    network, inputs = bnnlaplace.Network.from_function(outputs, params), jnp.asarray(rng.normal(size=(5, 2, 5, 4)))
    counted = jnp.array([1.0, 0.0, 1.0, 1.0, 0.0])
    arguments = network, bnnlaplace.categorical(), params
    run = jax.jit(lambda w: diagonal.ggn_diagonal(*arguments, inputs, weights=w, scale=SCALE, microbatch=2))
    rows = oracles.jacobian(network, params, inputs[counted == 1])
    curvatures = oracles.output_curvature(arguments[1], network(params, inputs[counted == 1]))
    np.testing.assert_allclose(run(counted), SCALE * np.diagonal(oracles.ggn(rows, curvatures)), rtol=1e-10)


def test_dual_has_the_same_nonzero_spectrum(problem):
    network, likelihood, inputs, _, matrix = problem
    precision = np.linspace(0.5, 2.0, len(matrix))

    @jax.jit
    def grams(network, inputs):
        linearised = [linearise(network, network.params, inputs, microbatch=4, remat=remat) for remat in (False, True)]
        options = {"scale": SCALE, "prior_precision": precision}
        duals = [ggn.dual_operator(each, likelihood, **options) for each in linearised]
        return [jax.vmap(dual.matvec)(jnp.eye(dual.size)) for dual in duals]

    root = 1 / np.sqrt(precision)
    primal = SCALE * root[:, None] * matrix * root
    count = np.linalg.matrix_rank(primal)
    for gram in grams(network, inputs):
        np.testing.assert_allclose(gram, gram.T, atol=1e-10)
        np.testing.assert_allclose(np.linalg.eigvalsh(gram)[-count:], np.linalg.eigvalsh(primal)[-count:], atol=1e-9)


@pytest.mark.parametrize(
    ("name", "sizes"), [exhaustive("classification", (4, 4, 3)), ("regression", (11,)), ("binary", (4, 4, 3))]
)
def test_streamed_products_of_both_sides(name, sizes, x64):
    """The last batch is shorter and microbatches are padded. Takes one vector or several rows."""
    make, draw = LIKELIHOODS[name]
    likelihood = make()
    network, _, inputs, targets, matrix = random_problem(likelihood, draw(np.random.default_rng(2), 11))
    ends = np.cumsum(sizes)
    batches = [(inputs[end - size : end], targets[end - size : end]) for size, end in zip(sizes, ends, strict=True)]
    delta = np.linspace(0.5, 3.0, 43)
    options = {"prior_precision": delta, "scale": SCALE, "microbatch": 3}
    primal, dual = (
        streamed.operator(network, likelihood, batches, side=side, **options) for side in ("primal", "dual")
    )
    whitened = SCALE * matrix / np.sqrt(np.outer(delta, delta))
    assert (primal.size, dual.size) == (43, 33)
    np.testing.assert_allclose(primal.matvec(np.eye(43)), whitened, atol=1e-10)
    np.testing.assert_allclose(primal.matvec(np.eye(43)[4]), whitened[4], atol=1e-10)
    small = dual.matvec(np.eye(33))
    np.testing.assert_allclose(dual.matvec(np.eye(33)[4]), small[4], atol=1e-10)
    # On outputs one after another, as B' J has its rows.
    factors = jax.vmap(jax.vmap(likelihood.factor_transpose_mv, (None, 1), 1))
    jacobians = jnp.asarray(oracles.two_layers_jacobian(network.params, inputs))
    rows = np.asarray(factors(network(network.params, inputs), jacobians)).reshape(33, 43)
    rows = np.sqrt(SCALE) * rows / np.sqrt(delta)
    np.testing.assert_allclose(small, rows @ rows.T, atol=1e-10)
    np.testing.assert_allclose(rows.T @ rows, whitened, atol=1e-10)


def test_the_shorter_side_is_chosen(classification):
    network, likelihood, inputs, targets, _ = classification
    assert streamed.operator(network, likelihood, (inputs, targets)).size == 33
    assert streamed.operator(network, likelihood, [(inputs, targets), (inputs[:4], targets[:4])]).size == 43


def test_rows_of_the_factor(problem):
    """`factor_rows` has one row for each output of each example, and its square is the GGN."""
    network, likelihood, inputs, _, matrix = problem
    rows = jax.jit(dense.factor_rows)(network, likelihood, network.params, inputs, jnp.ones(11))
    assert rows.shape == (33, 43)
    np.testing.assert_allclose(rows.T @ rows, matrix, atol=1e-10)


class Shuffled:
    """Batches in another order at each pass."""

    def __init__(self, batches):
        self.batches, self.passes = batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches if self.passes % 2 else self.batches[::-1])


def test_the_dual_side_notices_another_order(classification):
    network, likelihood, inputs, targets, matrix = classification
    batches = [(inputs[:5], targets[:5]), (inputs[5:10], targets[5:10])]
    primal, dual = (streamed.operator(network, likelihood, Shuffled(batches), side=side) for side in ("primal", "dual"))
    curvatures = oracles.output_curvature(likelihood, network(network.params, inputs[:10]))
    expected = oracles.ggn(oracles.two_layers_jacobian(network.params, inputs[:10]), curvatures)
    np.testing.assert_allclose(primal.matvec(np.eye(len(matrix))), expected, atol=1e-10)  # a sum over all of them
    with pytest.raises(ValueError, match="batch 0 is another one than in the first pass; switch shuffling"):
        dual.matvec(np.ones(dual.size))


def test_bad_streams(problem, unchecked_annotations):
    network, likelihood, inputs, targets, _ = problem
    with pytest.raises(ValueError, match="'auto', 'primal' or 'dual'; got 'both'"):
        streamed.operator(network, likelihood, (inputs, targets), side="both")
    with pytest.raises(ValueError, match="readable several times"):
        streamed.operator(network, likelihood, ((inputs, targets) for _ in range(2)))
    with pytest.raises(ValueError, match="targets|labels"):
        streamed.operator(network, likelihood, (inputs, targets[:, None]))
    bad = [{"prior_precision": 0.0}, {"prior_precision": np.inf}, {"scale": -1.0}, {"scale": np.inf}, {"scale": "a"}]
    for options in bad:
        with pytest.raises(ValueError, match=r"operator\(.*=...\) must be .*positive.* finite.*; got"):
            streamed.operator(network, likelihood, (inputs, targets), **options)
    with pytest.raises(ValueError, match=r"takes a vector of 43 numbers, or rows of them; got shape \(3,\)"):
        streamed.operator(network, likelihood, (inputs, targets), side="primal").matvec(np.ones(3))


def test_microbatches_are_even_and_complete():
    inputs = jnp.arange(11.0)
    batches = microbatch.split(inputs, 4, jnp.float32)
    assert batches.inputs.shape == (3, 4)
    np.testing.assert_array_equal(batches.inputs.reshape(-1)[:11], inputs)
    np.testing.assert_array_equal(batches.weights.reshape(-1), [1.0] * 11 + [0.0])
    assert microbatch.split(jnp.arange(9.0), 8, jnp.float32).inputs.shape == (2, 5)


@pytest.mark.parametrize(
    ("count", "size", "message"), [(0, 4, "at least one example"), (3, 0, "at least 1; got 0; try 64")]
)
def test_bad_microbatches(count, size, message):
    with pytest.raises(ValueError, match=message):
        microbatch.split(jnp.zeros(count), size, jnp.float32)


def test_products_keep_single_precision():
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3), jnp.float32))

    def product(network, inputs):
        linearised = linearise(network, network.params, inputs)
        return ggn.ggn_operator(linearised, bnnlaplace.categorical()).matvec(ravel(network.params))

    assert jax.eval_shape(product, network, jnp.ones((4, 2), jnp.float32)).dtype == jnp.float32
