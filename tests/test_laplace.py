"""The front object: every structure against the dense posterior, predictions, bad input, one compilation per shape."""

import dataclasses
import pickle
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from sklearn.datasets import load_digits

import bnnlaplace
from bnnlaplace import krylov, prior
from bnnlaplace.checkpoint.pytree import CheckpointError
from bnnlaplace.core.tree import ravel, squared_norm
from bnnlaplace.curvature import streamed
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.model import batched as forward
from bnnlaplace.predictive.validation import ValidationCurve
from bnnlaplace.structure import KrylovStructure
from bnnlaplace.structure import dense as structure_dense


def network_outputs(params, x):
    """One hidden layer over five features of an image; 10 classes."""
    return jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b2"]


@pytest.fixture(scope="module")
def trained():
    """400 digits, a network of 730 weights at a mode of its log joint, in single precision."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images[:400] / 16, jnp.float32), jnp.asarray(labels[:400])
    rng = np.random.default_rng(0)
    shapes = {"w1": (64, 8), "w2": (8, 10), "b2": (10,)}
    params = {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def negative_log_joint(vector):
        params = unravel(vector)
        log_probs = jax.nn.log_softmax(network_outputs(params, x))
        return -jnp.sum(log_probs[jnp.arange(len(y)), y]) + 0.5 * vector @ vector

    vector, unravel = jax.flatten_util.ravel_pytree(params)
    with jax.default_matmul_precision("highest"):  # that of accelerators would leave it beside the mode
        vector = jax.jit(lambda v: descend(negative_log_joint, v))(vector)
    network = bnnlaplace.Network.from_function(network_outputs, unravel(vector))
    return network, np.asarray(x), np.asarray(y)


def descend(loss, vector, steps=2000):
    """Gradient descent with momentum."""

    def step(carry, _):
        vector, velocity = carry
        velocity = 0.9 * velocity - 2e-3 * jax.grad(loss)(vector)
        return (vector + velocity, velocity), None

    return jax.lax.scan(step, (vector, jnp.zeros_like(vector)), length=steps)[0][0]


@pytest.fixture(scope="module")
def full(trained):
    network, x, y = trained
    return bnnlaplace.Laplace(network, hessian_structure="full").fit((x, y)).optimize_prior_precision()


@pytest.fixture(scope="module")
def diagonal(trained):
    network, x, y = trained
    return bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y)).optimize_prior_precision()


@pytest.fixture(scope="module", params=[1, 2, 3])
def lanczos(trained, request):
    network, x, y = trained
    la = bnnlaplace.Laplace(network, hessian_structure="lanczos")
    return la.fit((x, y), key=jax.random.key(request.param), num_probes=32, microbatch=64).optimize_prior_precision()


@pytest.fixture(scope="module")
def unconverged(trained):
    """A short decomposition, for tests of everything but its numbers."""
    network, x, y = trained
    with pytest.warns(UserWarning, match="not converged"):
        return bnnlaplace.Laplace(network).fit((x, y), key=jax.random.key(9), num_probes=8, max_vectors=24)


def test_weights_are_at_a_mode(full):
    prior_part = np.linalg.norm(ravel(full.network.params))
    assert np.linalg.norm(full.mode_gradient(1.0)) < 1e-2 * prior_part
    assert np.linalg.norm(full.mode_gradient(50.0)) > prior_part


def test_mode_decrement(full, diagonal, lanczos):
    gradient = np.asarray(full.mode_gradient(50.0), np.float64)
    values, vectors = np.linalg.eigh(np.asarray(full.structure.matrix, np.float64))
    exact = gradient @ (vectors @ ((vectors.T @ gradient) / (values + 50.0)))
    np.testing.assert_allclose(full.mode_decrement(50.0), exact, rtol=1e-6)
    assert exact <= lanczos.mode_decrement(50.0) * (1 + 1e-3) <= 2 * exact
    assert diagonal.mode_decrement(50.0) > 0
    assert full.mode_decrement(1.0) < 1e-2


def test_lanczos_evidence_is_the_exact_one(full, lanczos):
    error = lanczos.krylov_error()
    assert error.sample <= 0.05
    for delta in (float(full.prior_precision), 10.0):
        estimate = lanczos.log_marginal_likelihood(delta)
        exact = full.log_marginal_likelihood(delta)
        assert exact.sem == 0
        # truncation lifts the log-determinant, and so lowers the evidence, by no more than its bound
        truncation = 0.5 * lanczos.structure.error(delta).log_determinant
        assert -4 * estimate.sem - truncation <= estimate.mean - exact.mean <= 4 * estimate.sem
    found = lanczos.evidence_optimum()
    half_width = 2 * np.log(found.high / found.prior_precision)  # four standard errors
    assert abs(np.log(found.prior_precision / full.prior_precision)) <= half_width


def test_lanczos_samples_have_the_exact_functional_variance(full, lanczos, trained):
    """At the precision of the evidence, where G + delta I is badly conditioned."""
    _, x, _ = trained
    delta = full.prior_precision
    condition = float(jnp.linalg.norm(full.structure.matrix, 2) / delta)
    assert condition > 300
    exact = np.trace(full.functional_variance(x[:60]), axis1=1, axis2=2)
    ours = lanczos.with_prior_precision(delta)
    pushforward = forward.pushforward(ours.network, x[:60], ours.structure.samples(jax.random.key(0), 32, delta))
    squares = np.square(pushforward).sum(axis=2)  # (S, B)
    totals = (squares / exact).mean(axis=1)  # one per sample, with mean one
    sem = totals.std(ddof=1) / np.sqrt(len(totals))
    assert abs(totals.mean() - 1) <= 4 * sem + ours.krylov_error().sample
    np.testing.assert_allclose(np.trace(ours.functional_variance(x[:60]), axis1=1, axis2=2), squares.mean(0), rtol=1e-3)


def test_samples_in_the_leading_eigenspace_alone_would_fail(full, lanczos, trained):
    """The negative control: without the prior's complement most of the variance is gone."""
    _, x, _ = trained
    delta = float(full.prior_precision)
    ritz = lanczos.structure.ritz
    leading = ritz.values > 50 * delta
    coefficients = (
        ritz.vectors[:, leading] @ (ritz.weights[leading] / np.sqrt(ritz.values[leading] + delta)[:, None])
    ).T
    rows = jnp.asarray(coefficients, jnp.float32) @ lanczos.structure.decomposition.basis
    squares = np.square(forward.pushforward(lanczos.network, x[:60], rows)).sum(axis=2).mean(axis=0)
    exact = np.trace(full.functional_variance(x[:60]), axis1=1, axis2=2)
    assert (squares / exact).mean() < 0.5


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_interval_of_the_optimum_holds_truncation(full, trained, seed):
    """With half the vectors it needs, a decomposition puts the optimum 20 % too high; its probes know nothing of it."""
    network, x, y = trained
    with pytest.warns(UserWarning, match="not converged"):
        la = bnnlaplace.Laplace(network).fit((x, y), key=jax.random.key(seed), num_probes=32, max_vectors=64)
    exact = full.evidence_optimum().prior_precision
    found = la.evidence_optimum()
    assert found.low < exact < found.prior_precision < found.high
    terms = LogJoint(float(la.fitted.log_likelihood.value)), squared_norm(network.params)
    probes_only = prior.optimum(la.structure.log_determinant, *terms)
    assert probes_only.prior_precision == found.prior_precision and exact < probes_only.low


def test_quadratic_form_holds_one_block_of_the_basis(trained):
    rows = jax.random.normal(jax.random.key(0), (4, 20_000))
    *_, last = krylov.block_lanczos(lambda rows: rows * jnp.arange(20_000.0), rows, max_vectors=64)
    structure = KrylovStructure.from_decomposition(last)
    vector = np.ones(20_000)
    inside = np.asarray(last.basis, np.float64) @ vector
    dense = inside @ np.linalg.solve(last.tridiagonal + 2 * np.eye(64), inside) + (20_000 - inside @ inside) / 2
    tracemalloc.start()
    np.testing.assert_allclose(structure.inverse_quadratic_form(vector, 2.0), dense, rtol=1e-9)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 8 * 4 * 20_000  # the basis in double precision is sixteen blocks


def test_low_rank_plus_prior_would_overstate_the_variance(full, lanczos, trained):
    """Why samples: with the same basis, giving the complement its prior variance is biased where samples are not."""
    _, x, _ = trained
    delta, ritz = float(full.prior_precision), lanczos.structure.ritz
    jacobian = oracles.jacobian(lanczos.network, lanczos.network.params, x[:60])
    along = np.asarray(jacobian @ lanczos.structure.decomposition.basis.T) @ ritz.vectors
    outside = np.square(jacobian).sum(axis=2) - np.square(along).sum(axis=2)
    low_rank = np.sum(along**2 / (ritz.values + delta), axis=2) + outside / delta
    exact = np.diagonal(full.functional_variance(x[:60]), axis1=1, axis2=2)
    assert (low_rank / exact).mean() > 1.1


def test_diagonal_evidence_is_never_above(full, diagonal):
    grid = np.geomspace(1e-2, 1e4, 13)
    ours = diagonal.evidence_curve(grid).log_marginal_likelihood.mean
    assert np.all(ours <= full.evidence_curve(grid).log_marginal_likelihood.mean)
    assert diagonal.log_marginal_likelihood().mean < full.log_marginal_likelihood().mean - 10


@pytest.mark.parametrize("name", ["full", "diagonal"])
def test_samples_have_the_structured_variance(name, request, trained):
    la = request.getfixturevalue(name)
    _, x, _ = trained
    variance = np.asarray(jnp.trace(la.functional_variance(x[:10]), axis1=1, axis2=2))
    deviations = forward.pushforward(
        la.network, x[:10], la.structure.samples(jax.random.key(3), 400, la.prior_precision)
    )
    totals = (np.square(deviations).sum(axis=2) / variance).mean(axis=1)
    assert abs(totals.mean() - 1) <= 4 * totals.std(ddof=1) / np.sqrt(len(totals))


def test_sample_is_a_tree_of_weights(lanczos):
    samples = lanczos.sample(jax.random.key(0), 5)
    for sample, weight in zip(jax.tree.leaves(samples), jax.tree.leaves(lanczos.network.params), strict=True):
        assert sample.shape == (5, *weight.shape)
    first, second = (ravel(jax.tree.map(lambda leaf, i=i: leaf[i], samples)) for i in (0, 1))
    assert np.linalg.norm(first - second) > 1


@pytest.mark.parametrize("link", ["probit", "mc"])
def test_predictive_is_a_softer_distribution(full, trained, link):
    network, x, _ = trained
    probs = np.asarray(full.predictive(x[:50], link_approx=link, key=jax.random.key(0), num_samples=64))
    np.testing.assert_allclose(probs.sum(axis=1), 1, rtol=1e-5)
    at_mode = np.asarray(jax.nn.softmax(network(network.params, x[:50])))
    assert probs.max(axis=1).mean() < at_mode.max(axis=1).mean()


def test_predictive_tends_to_the_mode_as_the_prior_tightens(full, trained):
    network, x, _ = trained
    at_mode = jax.nn.softmax(network(network.params, x[:50]))
    tight = full.with_prior_precision(1e8)
    for link in ("probit", "mc"):
        np.testing.assert_allclose(
            tight.predictive(x[:50], link_approx=link, key=jax.random.key(0)), at_mode, atol=1e-3
        )


def test_gridsearch_takes_the_lowest_validation_nll(lanczos, trained):
    _, x, y = trained
    grid = [0.1, 1.0, 10.0, 100.0, 1000.0]
    key = jax.random.key(0)
    curve = lanczos.validation_curve(x[:80], y[:80], grid, key=key, num_samples=16)
    chosen = lanczos.optimize_prior_precision(
        "gridsearch", validation=(x[:80], y[:80]), precisions=grid, key=key, num_samples=16
    )
    assert chosen.prior_precision == grid[int(np.argmin(curve.negative_log_likelihood))]
    # the basis pushed through once gives what samples pushed one by one give
    at_one = lanczos.with_prior_precision(1.0).predictive(x[:80], link_approx="mc", key=key, num_samples=16)
    nll = -np.log(np.asarray(at_one)[np.arange(80), y[:80]]).mean()
    np.testing.assert_allclose(curve.negative_log_likelihood[1], nll, rtol=1e-3)


def test_a_validation_curve_of_nothing_but_nan_has_no_best_precision():
    grid, nan = np.array([1.0, 10.0]), np.full(2, np.nan)
    assert ValidationCurve(grid, np.array([np.nan, 2.0]), nan, np.array([True, True])).best_precision == 10.0
    with pytest.raises(ValueError, match="the validation NLL must be a number at one prior precision at least"):
        _ = ValidationCurve(grid, nan, nan, np.array([True, True])).best_precision


def test_a_subset_is_scaled_to_the_whole(trained, diagonal):
    network, x, y = trained
    twice = bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y), num_data=800)
    np.testing.assert_allclose(twice.structure.diagonal, 2 * diagonal.structure.diagonal, rtol=1e-5)
    np.testing.assert_allclose(twice.fitted.log_likelihood.value, 2 * diagonal.fitted.log_likelihood.value, rtol=1e-5)


def test_batches_are_the_same_data(trained, diagonal):
    network, x, y = trained
    batches = [(x[:150], y[:150]), (x[150:], y[150:])]
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit(batches)
    np.testing.assert_allclose(la.structure.diagonal, diagonal.structure.diagonal, rtol=1e-5)


def test_a_list_of_two_arrays_is_the_same_data(trained, diagonal):
    network, x, y = trained
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit([x, y])
    np.testing.assert_array_equal(la.structure.diagonal, diagonal.structure.diagonal)


@pytest.mark.parametrize("shape", [lambda x, y: [x, y, y], lambda x, y: {"x": x, "y": y}, lambda x, y: [(x, y, y)]])
def test_batches_are_pairs(trained, shape):
    network, x, y = trained
    with pytest.raises(ValueError, match=r"two arrays \(x, y\), or an iterable of batches, each such a pair; got"):
        bnnlaplace.Laplace(network, hessian_structure="diag").fit(shape(x, y))


@pytest.mark.parametrize("name", ["full", "diagonal", "unconverged"])
def test_save_and_load(name, request, tmp_path):
    la = request.getfixturevalue(name).with_prior_precision(1e6)
    la.save(tmp_path / "la")
    blank = la.network.with_params(jax.tree.map(jnp.zeros_like, la.network.params))
    again = bnnlaplace.Laplace.load(tmp_path / "la", blank)
    assert again.log_marginal_likelihood() == la.log_marginal_likelihood()
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(la), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = bnnlaplace.Network.from_function(network_outputs, {**la.network.params, "b2": jnp.zeros(7)})
    with pytest.raises(CheckpointError, match=r"params/b2"):
        bnnlaplace.Laplace.load(tmp_path / "la", other)


def test_compiles_once_per_shape(trained):
    network, x, y = trained
    products = streamed.batch_product._cache_size()
    for seed in (11, 12):
        la = bnnlaplace.Laplace(network.with_params(jax.tree.map(lambda leaf: leaf * 1.01, network.params)))
        with pytest.warns(UserWarning, match="not converged"):
            la.fit((x[:90], y[:90]), key=jax.random.key(seed), num_probes=4, max_vectors=12).predictive(x[:7])
    assert streamed.batch_product._cache_size() == products + 1


@pytest.mark.parametrize("enabled", [False, True])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_weights_keep_their_precision(enabled, dtype):
    with jax.enable_x64(enabled):
        params = {"w": jnp.ones((2, 3), dtype), "b": jnp.zeros(3, jnp.float32)}
        network = bnnlaplace.Network.from_function(lambda p, x: x @ p["w"] + p["b"], params)
        data = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32), np.arange(8) % 3
        la = bnnlaplace.Laplace(network).fit(data, key=jax.random.key(0), num_probes=9, max_vectors=9)
        assert np.isfinite(la.log_marginal_likelihood().mean)
        assert la.sample(jax.random.key(1), 2)["w"].dtype == dtype


def test_an_unconverged_decomposition_warns(trained):
    network, x, y = trained
    with pytest.warns(UserWarning, match="has not converged with 4 vectors.*raise max_vectors"):
        bnnlaplace.Laplace(network).fit((x, y), key=jax.random.key(0), num_probes=4, max_vectors=4)


def test_use_at_a_precision_without_convergence_warns(trained, unconverged):
    _, x, y = trained
    uses = [
        lambda la: la.log_marginal_likelihood(),
        lambda la: la.sample(jax.random.key(0), 2),
        lambda la: la.functional_variance(x[:2]),
        lambda la: la.predictive(x[:2]),
    ]
    for use in uses:
        with pytest.warns(UserWarning, match="prior precision 1 a posterior sample can be off by .*target_precision"):
            use(unconverged)
        use(unconverged.with_prior_precision(1e6))


def test_gridsearch_chooses_where_the_decomposition_has_converged(trained, unconverged):
    _, x, y = trained
    options = {"validation": (x, y), "key": jax.random.key(0), "num_samples": 8}
    chosen = unconverged.optimize_prior_precision("gridsearch", precisions=[1e-2, 1e6], **options)
    assert chosen.prior_precision == 1e6
    with pytest.raises(ValueError, match="must have converged at one prior precision"):
        unconverged.optimize_prior_precision("gridsearch", precisions=[1e-2, 1e-1], **options)


def test_an_optimum_at_the_end_of_the_search_warns():
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((4, 3)))
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit((jnp.eye(4), jnp.arange(4) % 3))
    with pytest.warns(UserWarning, match="the optimum is not inside it"):
        la.optimize_prior_precision()


def test_linen_batch_statistics_are_frozen():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            return nn.Dense(3)(nn.BatchNorm(use_running_average=not train)(x))

    module = Model()
    x, y = jax.random.normal(jax.random.key(0), (6, 2)), jnp.array([0, 1, 2, 0, 1, 2])
    variables = module.init(jax.random.key(1), x, train=False)
    network = bnnlaplace.Network.from_linen(module, variables, train=False)
    assert set(network.frozen) == {"batch_stats"}
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y))
    assert la.structure.diagonal.size == 2 * 3 + 3 + 2 * 2
    # two wrappings of one module share compiled code
    assert hash(network.forward) == hash(bnnlaplace.Network.from_linen(Model(), variables, train=False).forward)


def test_is_a_pytree(diagonal, trained):
    _, x, _ = trained
    inside = jax.jit(lambda la, x: la.predictive(x))(diagonal, x[:5])
    np.testing.assert_allclose(inside, diagonal.predictive(x[:5]), rtol=1e-5)
    assert dataclasses.is_dataclass(jax.tree.map(lambda leaf: leaf, diagonal))


@pytest.mark.parametrize("name", ["full", "diagonal"])
def test_is_an_argument_of_jitted_functions(name, request, trained):
    la, x = request.getfixturevalue(name), trained[1][:3]
    for method in (
        lambda la, x: la.predictive(x),
        lambda la, x: la.predictive(x, link_approx="mc", key=jax.random.key(0), num_samples=4),
        lambda la, x: la.functional_variance(x),
        lambda la, x: la.sample(jax.random.key(0), 2),
        lambda la, x: la.mode_gradient(),
    ):
        expected, found = method(la, x), jax.jit(method)(la, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, expected)


def test_lanczos_is_closed_over_and_not_traced(lanczos, trained):
    la, x = lanczos, jnp.asarray(trained[1][:3])
    for method in (
        lambda la: la.predictive(x),
        lambda la: la.functional_variance(x),
        lambda la: la.sample(jax.random.key(0), 2),
        lambda la: la.log_marginal_likelihood().mean,
    ):
        with pytest.raises(TypeError, match="hessian_structure='lanczos' must not be traced.*close over the object"):
            jax.jit(method)(la)
        with pytest.raises(TypeError, match="nor its prior precision"):
            jax.jit(lambda precision, method=method: method(la.with_prior_precision(precision)))(2.0)
    np.testing.assert_allclose(jax.jit(lambda x: la.predictive(x))(x), la.predictive(x), rtol=1e-5)
    np.testing.assert_allclose(jax.jit(lambda: la.predictive(x))(), la.predictive(x), rtol=1e-5)


def test_sigma_noise_is_read_from_the_likelihood(tmp_path):
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 1)))
    assert bnnlaplace.Laplace(network).sigma_noise is None
    la = bnnlaplace.Laplace(network, "regression", hessian_structure="full", sigma_noise=0.3).fit(
        (jnp.eye(2), jnp.ones((2, 1)))
    )
    la.save(tmp_path / "la")
    own = bnnlaplace.Laplace(network, bnnlaplace.gaussian(0.3))
    for each in (la, la.with_prior_precision(2.0), own, bnnlaplace.Laplace.load(tmp_path / "la", network)):
        np.testing.assert_allclose(each.sigma_noise, 0.3)
    noise = jax.jit(lambda sigma: bnnlaplace.Laplace(network, "regression", sigma_noise=sigma).sigma_noise)
    np.testing.assert_allclose(noise(0.2), 0.2)
    with pytest.raises(ValueError, match="sigma_noise.*left out unless likelihood='regression'"):
        bnnlaplace.Laplace(network, sigma_noise=0.3)
    with pytest.raises(ValueError, match="sigma_noise.*positive, finite number"):
        bnnlaplace.Laplace(network, "regression", sigma_noise=jnp.float32(-1.0))


def test_is_rebuilt_with_any_leaves(diagonal):
    # As vmap and sharding do: a scale per leaf, a batch of precisions.
    axes = jax.tree.map(lambda leaf: 0, diagonal)
    assert axes.prior_precision == 0
    batch = jax.vmap(diagonal.with_prior_precision)(jnp.array([1.0, 2.0]))
    np.testing.assert_array_equal(batch.prior_precision, [1.0, 2.0])
    paths = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(diagonal)}
    assert {".settings.prior_precision", ".state.structure.diagonal", ".state.network.params['w1']"} <= paths


@pytest.mark.parametrize("name", ["full", "diagonal", "unconverged"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_inputs_give_no_predictions(name, request, dtype):
    la = request.getfixturevalue(name).with_prior_precision(1e6)  # where even few vectors are enough
    none = np.empty((0, 64), dtype)
    assert la.predictive(none).shape == (0, 10)
    assert la.predictive(none, link_approx="mc", key=jax.random.key(0)).shape == (0, 10)
    assert la.functional_variance(none).shape == (0, 10, 10)
    (found,) = la.functional_posteriors(none, [1.0], key=jax.random.key(0), num_samples=3)
    assert [part.shape for part in found] == [(0, 10), (0, 10, 10), (3, 0, 10)]


def test_no_inputs_of_a_network_that_flattens_its_own():
    """JAX cannot find the -1 of a shape that holds a zero."""
    network = bnnlaplace.Network.from_function(lambda w, x: x.reshape(len(x), -1) @ w, jnp.zeros((8, 3)))
    x, y = np.random.default_rng(0).normal(size=(6, 2, 4)), np.arange(6) % 3
    la = bnnlaplace.Laplace(network, hessian_structure="diag", prior_precision=1e6).fit((x, y))
    assert la.predictive(x[:0]).shape == (0, 3)
    assert la.functional_variance(x[:0]).shape == (0, 3, 3)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("convert", [np.asarray, jnp.asarray])
def test_inputs_to_predict_at_must_be_finite(diagonal, trained, value, convert):
    _, x, y = trained
    spoilt = x[:6].copy()
    spoilt[2:4, 7] = value
    options = {"key": jax.random.key(0), "num_samples": 2}
    for predict in (
        lambda x: diagonal.predictive(x),
        lambda x: diagonal.predictive(x, link_approx="mc", **options),
        lambda x: diagonal.functional_variance(x),
        lambda x: diagonal.functional_posteriors(x, [1.0], **options),
        lambda x: diagonal.validation_curve(x, y[:6], [1.0], **options),
    ):
        with pytest.raises(ValueError, match="infinite values in 2 of 6 of them, first in number 2"):
            predict(convert(spoilt))


@pytest.mark.parametrize("precision", [0.0, np.nan, jnp.inf, -1, [1.0, 2.0], np.ones(3), {"w1": 1.0}, "1", None])
def test_the_prior_precision_fits_the_weights(trained, diagonal, precision):
    network, _, _ = trained
    with pytest.raises(ValueError, match=r"Laplace\(prior_precision=...\) must be one"):
        bnnlaplace.Laplace(network, prior_precision=precision)
    if precision is not None:
        for method in (diagonal.log_marginal_likelihood, diagonal.mode_gradient, diagonal.mode_decrement):
            with pytest.raises(ValueError, match=r"prior_precision=...\)? must be one"):
                method(precision)


@pytest.mark.parametrize("precision", [2, 2.0, np.float32(2), np.asarray(2.0), jnp.asarray(2.0)])
def test_a_prior_precision_of_any_numeric_type(diagonal, precision):
    assert diagonal.with_prior_precision(precision).log_marginal_likelihood() == diagonal.log_marginal_likelihood(2.0)


def test_bad_input(trained, diagonal, unchecked_annotations):
    network, x, y = trained
    la = bnnlaplace.Laplace(network)
    with pytest.raises(
        ValueError, match=r"hessian_structure=\.\.\.\) must be 'diag', 'full', 'kron' or 'lanczos'; got 'kfac'"
    ):
        bnnlaplace.Laplace(network, hessian_structure="kfac")
    with pytest.raises(ValueError, match="prior_precision.*one positive, finite number; got -1"):
        bnnlaplace.Laplace(network, prior_precision=-1)
    with pytest.raises(ValueError, match="call la = la.fit"):
        la.log_marginal_likelihood()
    for key in (None, 0, np.zeros(2)):
        with pytest.raises(ValueError, match=r"fit\(key=...\).* must be one random key; got .*; try jax.random.key"):
            la.fit((x, y), key=key)
    with pytest.raises(ValueError, match="must hold at least one batch"):
        la.fit([], key=jax.random.key(0))
    with pytest.raises(ValueError, match="as many targets as inputs"):
        la.fit((x, y[:5]), key=jax.random.key(0))
    for num_data in (0, -5, np.nan):
        with pytest.raises(ValueError, match=r"fit\(num_data=...\) must be one positive, finite number"):
            la.fit((x, y), key=jax.random.key(0), num_data=num_data)
    for tolerance in (0, -0.1, np.nan):
        with pytest.raises(ValueError, match=r"fit\(tolerance=...\) must be positive"):
            la.fit((x, y), key=jax.random.key(0), tolerance=tolerance)
    with pytest.raises(ValueError, match="labels must lie in 0..9"):
        la.fit((x, y + 5), key=jax.random.key(0))
    with pytest.raises(ValueError, match="not finite at these weights and data"):
        la.fit((x.copy() * np.nan, y), key=jax.random.key(0))
    with pytest.raises(ValueError, match="outputs must be one array of shape"):
        bnnlaplace.Laplace(bnnlaplace.Network.from_function(lambda w, x: x[:, 0] * w, jnp.ones(()))).fit((x, y))
    with pytest.raises(ValueError, match="collection 'params'"):
        bnnlaplace.Network.from_linen(nn.Dense(3), {"kernel": 1})
    with pytest.raises(ValueError, match="'marglik' or 'gridsearch'; got 'cv'"):
        diagonal.optimize_prior_precision("cv")
    with pytest.raises(ValueError, match="'probit', 'mc' or 'bridge'; got 'exact'"):
        diagonal.predictive(x[:3], link_approx="exact")
    with pytest.raises(ValueError, match="'glm' or 'nn'; got 'bnn'"):
        diagonal.predictive(x[:3], pred_type="bnn")
    for options in ({"link_approx": "mc"}, {"pred_type": "nn"}):
        for key in (None, 0):
            with pytest.raises(ValueError, match="key=...\\) must be one random key; got"):
                diagonal.predictive(x[:3], key=key, **options)
    with pytest.raises(ValueError, match=r"sample\(key=...\) must be one random key; got 1"):
        diagonal.sample(1, 2)
    with pytest.raises(ValueError, match=r"sample\(num_samples=...\) must be an integer of at least 0; got -1"):
        diagonal.sample(jax.random.key(0), -1)
    for inputs in (x[:3].tolist(), "abc", 1.0):
        with pytest.raises(ValueError, match="inputs to predict at must be arrays.*pass jnp.asarray"):
            diagonal.predictive(inputs)
    with pytest.raises(ValueError, match="inputs to predict at must be numbers; got an array of <U1"):
        diagonal.predictive(np.array([["a"]]))
    with pytest.raises(
        ValueError, match=r"shape of those of the data.*of float32\[B,63\] the network raised TypeError"
    ):
        diagonal.predictive(x[:3, 1:])
    with pytest.raises(ValueError, match=r"fit\(max_vectors=...\) must be at least num_probes, 32; got 31"):
        la.fit((x, y), key=jax.random.key(0), max_vectors=31)
    with pytest.raises(TypeError, match=r"must be a bnnlaplace.Network; got Dense; wrap a Flax model"):
        bnnlaplace.Laplace(nn.Dense(3))
    with pytest.raises(TypeError, match=r"must be a flax.nnx.Module; got Dense; .*from_linen"):
        bnnlaplace.Network.from_nnx(nn.Dense(3))
    with pytest.raises(ValueError, match="with_noise=True.*of a regression with sigma_noise; got 'classification'"):
        diagonal.predictive(x[:3], with_noise=True)
    with pytest.raises(ValueError, match=r"fit\(target_precision=...\) must be one positive, finite number; got 0"):
        la.fit((x, y), key=jax.random.key(0), target_precision=0)
    for grid in ([], [1.0, -1.0], [[1.0]], [np.nan]):
        with pytest.raises(ValueError, match="positive, finite numbers, at least one; got"):
            diagonal.evidence_curve(grid)


def test_more_samples_than_probes(lanczos):
    with pytest.raises(ValueError, match="num_samples must be at most 32; got 33; fit with num_probes=33"):
        lanczos.sample(jax.random.key(0), 33)


def test_a_short_description(diagonal, lanczos):
    assert repr(diagonal).startswith("Laplace('classification', 'diag', 602 weights, prior_precision=")
    assert repr(diagonal).endswith("fitted as DiagonalStructure)")
    assert "fitted as KrylovStructure" in repr(lanczos)
    groups = bnnlaplace.Laplace(diagonal.network, prior_precision={"w1": 1.0, "w2": 2.0, "b2": 3.0})
    assert repr(groups).endswith("prior_precision=3 groups, not fitted)")


def test_the_probit_link_is_for_what_it_approximates(diagonal, trained):
    own = dataclasses.replace(diagonal.likelihood, name="poisson")
    with pytest.raises(ValueError, match="made for softmax and sigmoid; got 'poisson'; use link_approx='mc'"):
        bnnlaplace.Laplace._of(diagonal.fitted._replace(likelihood=own), diagonal.settings).predictive(trained[1][:3])


def test_what_a_trace_asks_for_is_remembered_beyond_it(full, trained):
    """A dense structure decomposes itself when it is asked often; inside of a trace, too."""
    x = jnp.asarray(trained[1][:3])
    structure = bnnlaplace.structure.DenseStructure(full.structure.matrix)
    fresh = bnnlaplace.Laplace._of(full.fitted._replace(structure=structure), full.settings)
    expected = fresh.functional_variance(x)
    for _ in range(4):
        inside = jax.jit(lambda x: fresh.functional_variance(x))(x)
        np.testing.assert_allclose(inside, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(fresh.functional_variance(x), expected, rtol=1e-3, atol=1e-4)


def test_a_dense_matrix_that_rounding_made_indefinite():
    values = jnp.array([-1e-3, 0.0, 1.0, 1e4])
    structure = bnnlaplace.structure.DenseStructure(jnp.diag(values))
    expected = np.log1p(np.array([0.0, 0.0, 1.0, 1e4]) / 1e-4).sum()
    for _ in range(4):
        np.testing.assert_allclose(structure.log_determinant(1e-4), expected, rtol=1e-6)


def test_a_trace_of_a_dense_matrix_that_rounding_made_indefinite():
    x = (255 * np.random.default_rng(0).uniform(size=(10, 40))).astype(np.float32)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((40, 1)) / 40)
    options = {"hessian_structure": "full", "sigma_noise": 0.1, "prior_precision": 0.01}
    la = bnnlaplace.Laplace(network, "regression", **options).fit((x, x[:, :1]))
    traced = jax.jit(lambda la, x: la.predictive(x)[1])(la, x[:2])
    np.testing.assert_allclose(traced, la.predictive(x[:2])[1], rtol=0.05)
    assert np.isfinite(jax.jit(lambda la, key: la.sample(key, 2))(la, jax.random.key(0))).all()


def test_threads_at_different_precisions(full, trained):
    _, x, _ = trained
    expected = {delta: full.with_prior_precision(delta).functional_variance(x[:3]) for delta in (1.0, 100.0)}

    def ask(number):
        delta = (1.0, 100.0)[number % 2]
        return delta, full.with_prior_precision(delta).functional_variance(x[:3])

    with ThreadPoolExecutor(4) as pool:
        for delta, found in pool.map(ask, range(40)):
            np.testing.assert_allclose(found, expected[delta], rtol=1e-3)


def test_a_pickled_structure_holds_its_matrix_alone(full, trained):
    full.predictive(trained[1][:2])
    again = pickle.loads(pickle.dumps(full.structure))
    assert set(vars(again)) == {"matrix"}
    np.testing.assert_array_equal(again.matrix, full.structure.matrix)


def test_a_precision_that_float32_does_not_have_is_factorised_once(trained, monkeypatch):
    network, x, y = trained
    calls = []
    factorise = structure_dense._shifted_cholesky
    monkeypatch.setattr(structure_dense, "_shifted_cholesky", lambda *args: calls.append(args) or factorise(*args))
    la = bnnlaplace.Laplace(network, hessian_structure="full", prior_precision=0.1).fit((x, y))
    la.predictive(x[:3])
    la.log_marginal_likelihood()
    la.predictive(x[:3])
    assert len(calls) == 1


@pytest.mark.parametrize("num_samples", [0, -1])
def test_averages_need_a_sample(diagonal, trained, num_samples):
    _, x, y = trained
    options = {"key": jax.random.key(0), "num_samples": num_samples}
    for call in (
        lambda: diagonal.predictive(x[:2], link_approx="mc", **options),
        lambda: diagonal.predictive(x[:2], pred_type="nn", **options),
        lambda: diagonal.functional_posteriors(x[:2], [1.0], **options),
        lambda: diagonal.validation_curve(x[:2], y[:2], [1.0], **options),
    ):
        with pytest.raises(ValueError, match=r"num_samples=...\) must be an integer of at least 1; got"):
            call()


def test_the_whole_curve_of_the_evidence(full):
    curve = full.evidence_curve()
    best = curve.prior_precision[np.argmax(curve.log_marginal_likelihood.mean)]
    np.testing.assert_allclose(best, full.prior_precision, rtol=0.15)  # to the step of the grid
    assert curve.prior_precision[0] < 1e-2 * best < 1e2 * best < curve.prior_precision[-1]


def test_soft_targets_choose_by_their_cross_entropy(diagonal, trained):
    _, x, y = trained
    options = {"key": jax.random.key(0), "num_samples": 8}
    hard = diagonal.validation_curve(x[:20], y[:20], [1.0, 100.0], **options)
    soft = diagonal.validation_curve(x[:20], np.eye(10)[y[:20]], [1.0, 100.0], **options)
    np.testing.assert_allclose(soft.negative_log_likelihood, hard.negative_log_likelihood, rtol=1e-6)
    assert np.isnan(soft.expected_calibration_error).all()


def test_a_likelihood_of_ones_own_is_not_taken_for_the_package_s(trained, tmp_path, unchecked_annotations):
    network, x, y = trained
    tempered = dataclasses.replace(
        bnnlaplace.categorical(), mean=jax.tree_util.Partial(lambda f: jax.nn.softmax(f / 10, axis=-1))
    )
    la = bnnlaplace.Laplace(network, tempered, hessian_structure="diag").fit((x, y))
    la.save(tmp_path / "posterior")
    with pytest.raises(CheckpointError, match="with the likelihood 'classification' of your own; pass it"):
        bnnlaplace.Laplace.load(tmp_path / "posterior", network)
    again = bnnlaplace.Laplace.load(tmp_path / "posterior", network, tempered)
    np.testing.assert_array_equal(again.predictive(x[:3]), la.predictive(x[:3]))
    with pytest.raises(TypeError, match=r"load\(network=...\) must be a bnnlaplace.Network; got dict"):
        bnnlaplace.Laplace.load(tmp_path / "posterior", {"w": 1})


def test_a_likelihood_of_ones_own_may_hold_python_numbers(trained, tmp_path):
    network, x, y = trained

    def log_prob(factor, f, y):
        return bnnlaplace.categorical().log_prob(factor * f, y)

    likelihood = dataclasses.replace(
        bnnlaplace.categorical(), name="tempered", log_prob=jax.tree_util.Partial(log_prob, 0.5)
    )
    la = bnnlaplace.Laplace(network, likelihood, hessian_structure="diag").fit((x, y))
    la.save(tmp_path / "posterior")
    again = bnnlaplace.Laplace.load(tmp_path / "posterior", network, likelihood)
    assert again.likelihood.log_prob.args == (0.5,)
    np.testing.assert_array_equal(again.mode_gradient(), la.mode_gradient())


def test_one_weight_sample_has_no_variance():
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((2, 1)))
    la = bnnlaplace.Laplace(network, "regression", hessian_structure="diag").fit((np.eye(2), np.zeros((2, 1))))
    with pytest.raises(ValueError, match="of a regression must be an integer of at least 2; got 1"):
        la.predictive(np.eye(2), pred_type="nn", key=jax.random.key(0), num_samples=1)


def test_a_likelihood_of_another_kind_does_not_load(diagonal, trained, tmp_path):
    diagonal.save(tmp_path / "posterior")
    with pytest.raises(CheckpointError, match="'classification' of 0 parameters; got 'regression' of 4"):
        bnnlaplace.Laplace.load(tmp_path / "posterior", trained[0], bnnlaplace.gaussian(1.0))


def test_memory_is_not_estimated_at_the_cost_of_a_batch(trained):
    network, x, y = trained
    batches = iter([(x[:10], y[:10]), (x[10:20], y[10:20])])
    la = bnnlaplace.Laplace(network, hessian_structure="diag")
    with pytest.raises(ValueError, match="memory_estimate.*must be readable again"):
        la.memory_estimate(batches)
    with pytest.raises(ValueError, match="max_vectors=... must be an integer of at least 1; got -3"):
        la.memory_estimate((x, y), max_vectors=-3)


def test_gridsearch_with_fewer_probes_than_samples_by_default(unconverged, trained):
    _, x, y = trained
    chosen = unconverged.optimize_prior_precision(
        "gridsearch", validation=(x[:20], y[:20]), precisions=[1e5, 1e6], key=jax.random.key(0)
    )
    assert chosen.prior_precision in (pytest.approx(1e5), pytest.approx(1e6))


def test_bad_numbers(diagonal, trained, unchecked_annotations):
    _, x, y = trained
    key = jax.random.key(0)
    with pytest.raises(ValueError, match="evidence_curve.* must be positive, finite numbers, at least one; got 1.0"):
        diagonal.evidence_curve(1.0)
    with pytest.raises(ValueError, match="functional_posteriors.* must be positive, finite numbers"):
        diagonal.functional_posteriors(x[:2], [-1.0], key=key, num_samples=2)
    with pytest.raises(ValueError, match="must be an integer of at least 0; got 2.5"):
        diagonal.sample(key, 2.5)
    with pytest.raises(ValueError, match="validation_curve.*: soft targets must be probabilities"):
        diagonal.validation_curve(x[:2], np.full((2, 10), 0.2), [1.0], key=key, num_samples=2)
    with pytest.raises(ValueError, match="must be an integer of at least 2"):
        bnnlaplace.Laplace(trained[0]).fit((x, y), key=key, num_probes=4.0)


def test_the_training_set_is_no_smaller_than_what_is_seen_of_it(trained):
    network, x, y = trained
    with pytest.raises(ValueError, match=r"num_data=...\) must be the size .* at least that of data, 400; got 399"):
        bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y), num_data=399)
