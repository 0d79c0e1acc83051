"""The evidence against dense determinants, and their gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import exhaustive, usual

import bnnlaplace
from bnnlaplace import evidence, krylov, prior
from bnnlaplace.core.tree import ravel
from bnnlaplace.curvature import dense
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.structure import DenseStructure

PROBES = {"primal": np.sqrt(43) * np.eye(43), "dual": np.sqrt(36) * np.eye(36)}


def exact(params, precision, problem, mean=0.0, scale=1.5):
    """The evidence through a dense matrix, differentiable by autodiff."""
    network, likelihood = problem.network, problem.likelihood
    matrix = dense.ggn(network, likelihood, params, problem.inputs, scale=scale)
    delta = jnp.broadcast_to(precision, len(matrix))
    log_likelihood = scale * jnp.sum(likelihood.log_prob(network(params, problem.inputs), problem.targets))
    deviation = ravel(params) - mean
    determinant = jnp.linalg.slogdet(jnp.eye(len(matrix)) + matrix / jnp.sqrt(jnp.outer(delta, delta)))[1]
    return log_likelihood - 0.5 * jnp.sum(delta * deviation**2) - 0.5 * determinant


def settings(problem, depth, **options):
    model = {"network": problem.network, "likelihood": problem.likelihood, "num_matvecs": depth}
    return model | {"scale": 1.5, "microbatch": 4} | options


def by_quadrature(params, precision, problem, side, depth, mean=0.0, **options):
    return evidence.log_marginal_likelihood(
        params,
        precision,
        (problem.inputs, problem.targets),
        options.pop("probes") if "probes" in options else jnp.asarray(PROBES[side]),
        **settings(problem, depth, prior_mean=mean, side=side, **options),
    )


SIDES = "primal", "dual"


# Each side with residuals that are kept and that are computed again.
@pytest.mark.parametrize(("side", "remat"), usual([("primal", True), ("dual", False)], SIDES, (True, False)))
def test_value_and_all_gradients_at_full_depth(classification, side, remat):
    # The rows of sqrt(n) I give the exact trace, and depth 30 exceeds the rank 22 of the GGN.
    precision = jnp.linspace(0.5, 3.0, 43)
    params, mean = classification.network.params, 0.1

    def ours(params, precision, mean):
        return by_quadrature(params, precision, classification, side, 30, mean, remat=remat).mean

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(params, precision, mean)
    reference = jax.jit(lambda *at: jax.value_and_grad(exact, (0, 1, 3))(*at[:2], classification, at[2]))
    expected, expected_gradients = reference(params, precision, mean)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    for got, wanted in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-8)


def test_wrong_likelihood_changes_the_evidence(classification):
    def value(problem):
        return jax.jit(lambda params: by_quadrature(params, 1.0, problem, "primal", 30).mean)(problem.network.params)

    wrong = classification._replace(likelihood=bnnlaplace.gaussian(), targets=np.eye(3)[classification.targets])
    assert abs(value(classification) - value(wrong)) > 1


def test_unknown_names_and_probes_of_another_type(classification, unchecked_annotations):
    PROBES["both"] = PROBES["primal"]
    with pytest.raises(ValueError, match="'primal', 'dual' or 'auto'; got 'both'"):
        by_quadrature(classification.network.params, 1.0, classification, "both", 3)
    with pytest.raises(ValueError, match="'adjoint', 'forward', 'quadrature' or 'autodiff'; got 'backward'"):
        by_quadrature(classification.network.params, 0.7, classification, "primal", 3, gradient="backward")
    with pytest.raises(ValueError, match=r"must be a random key or have rows .*; got int 0"):
        by_quadrature(classification.network.params, 0.7, classification, "auto", 2, probes=0)


@pytest.mark.parametrize("precision", [-1.0, 0.0, np.nan, np.linspace(-1, 2, 43)])
def test_the_precision_is_positive(classification, precision):
    with pytest.raises(ValueError, match=r"prior_precision=...\) must be positive and finite; got"):
        by_quadrature(classification.network.params, precision, classification, "primal", 3)


@pytest.mark.parametrize("side", ["primal", "dual"])
def test_the_linearisation_is_the_only_forward_pass(classification, side):
    # The hidden layer has five units: microbatches pass through it, and never all eleven examples once more.
    params = classification.network.params
    jaxpr = str(jax.make_jaxpr(lambda params: by_quadrature(params, 1.0, classification, side, 3).mean)(params))
    assert "f64[4,5]" in jaxpr and "f64[11,5]" not in jaxpr


@pytest.mark.exhaustive  # as in `test_linear_regression.py`
def test_scalar_gradient_in_the_precision(classification):
    def ours(precision):
        return by_quadrature(classification.network.params, precision, classification, "primal", 30).mean

    expected = jax.grad(exact, 1)(classification.network.params, 0.7, classification)
    np.testing.assert_allclose(jax.jit(jax.grad(ours))(0.7), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "side"),
    usual([("scalar", "dual"), ("each weight", "primal")], ("scalar", "each weight"), SIDES),
)
def test_gradient_from_the_forward_pass_at_full_depth(classification, kind, side):
    params, precision = classification.network.params, 0.7 if kind == "scalar" else np.linspace(0.5, 3.0, 43)

    def ours(precision, mean):
        return by_quadrature(params, precision, classification, side, 30, mean, gradient="forward").mean

    value, gradients = jax.jit(jax.value_and_grad(ours, (0, 1)))(precision, 0.1)
    reference = jax.jit(lambda precision, mean: exact(params, precision, classification, mean))
    expected, expected_gradients = jax.value_and_grad(reference, (0, 1))(precision, 0.1)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    for got, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.exhaustive  # at full depth above, and truncated in `tests/krylov/test_quadrature.py`
@pytest.mark.parametrize("side", SIDES)
def test_truncated_derivative_in_a_common_factor_is_that_of_the_value(classification, side):
    # Depth 4 is far from converged; the adjoint and the shift differentiate what was computed, and so must this.
    params, precision, probes = classification.network.params, jnp.linspace(0.5, 3.0, 43), jax.random.key(2)

    def ours(factor, gradient):
        delta = factor * precision
        options = {"gradient": gradient, "probes": probes, "num_probes": 2}
        return by_quadrature(params, delta, classification, side, 4, **options).mean

    def slope(gradient):
        return jax.jit(jax.value_and_grad(lambda factor: ours(factor, gradient)))(1.0)

    np.testing.assert_allclose(slope("forward"), slope("adjoint"), rtol=1e-9)
    converged = jax.jit(lambda: exact(params, precision, classification))()
    assert abs(slope("adjoint")[0] - converged) > 1e-3


def test_forward_gradient_refuses_weights_and_second_derivatives(classification):
    params = classification.network.params
    for precision in (0.7, np.linspace(0.5, 3.0, 43)):

        def ours(params, precision):
            return by_quadrature(params, precision, classification, "primal", 3, gradient="forward").mean

        with pytest.raises(TypeError, match=r"gradient='forward'\) has derivatives in prior_precision and prior_mean"):
            jax.jit(jax.grad(ours))(params, precision)
    with pytest.raises(TypeError, match="first derivatives only"):
        jax.jit(jax.grad(lambda d: jnp.sum(jax.grad(ours, 1)(params, d))))(precision)


@pytest.mark.parametrize("gradient", usual(["forward"], ["adjoint", "forward"]))
def test_derivative_in_the_prior_needs_no_product(classification, gradient):
    # "adjoint" for a scalar, "forward" for one number per weight; of a loop the compiler counts one turn.
    precision = 0.7 if gradient == "adjoint" else jnp.linspace(0.5, 3.0, 43)

    def flops(transform, argument):
        def ours(params, precision):
            return by_quadrature(params, precision, classification, "primal", 9, gradient=gradient).mean

        compiled = jax.jit(transform(ours, *argument)).lower(classification.network.params, precision).compile()
        return compiled.cost_analysis()["flops"]

    value = flops(lambda ours: ours, ())
    assert flops(jax.value_and_grad, (1,)) < 1.25 * value
    if gradient == "adjoint":
        assert flops(jax.value_and_grad, (0,)) > 1.5 * value


def test_probes_from_a_key(classification):
    params, key = classification.network.params, jax.random.key(1)

    def ours(side, probes, **options):
        run = jax.jit(lambda probes: by_quadrature(params, 0.7, classification, side, 2, probes=probes, **options))
        return run(probes)

    rows = {"primal": krylov.rademacher_probes(key, jnp.ones(43), 3), "dual": jax.random.normal(key, (3, 36))}
    np.testing.assert_allclose(ours("primal", key, num_probes=3), ours("auto", rows["primal"]), rtol=1e-12)
    dual = ours("dual", key, num_probes=3)
    np.testing.assert_array_equal(ours("auto", key, num_probes=3), dual)  # 36 < 43
    np.testing.assert_array_equal(ours("auto", rows["dual"]), ours("dual", rows["dual"]))
    np.testing.assert_array_equal(ours("dual", jax.random.PRNGKey(1), num_probes=3), dual)
    with pytest.raises(ValueError, match=r"num_probes=...\) must be given if probes is a random key"):
        ours("auto", key)
    with pytest.raises(ValueError, match=r"rows of probes, 3, or left out; got 4"):
        ours("auto", rows["dual"], num_probes=4)
    with pytest.raises(ValueError, match=r"rows of 43 \(primal\) or 36 \(dual\) numbers; got shape \(3, 35\)"):
        ours("auto", rows["dual"][:, :35])


@pytest.mark.parametrize("side", usual(["primal"], SIDES))
def test_isotropic_evidence_at_every_precision(classification, side):
    batch, params = (classification.inputs, classification.targets), classification.network.params
    build = jax.jit(
        lambda probes: evidence.isotropic(params, batch, probes, **settings(classification, 30, prior_mean=0.1))
    )
    found = build(jnp.asarray(PROBES[side]))
    precisions = jnp.array([0.1, 1.0, 10.0])
    at = jax.jit(lambda d: exact(params, d, classification, 0.1))
    np.testing.assert_allclose(found(precisions).mean, [at(d) for d in precisions], rtol=1e-10)
    for order in (jax.grad, lambda f: jax.grad(jax.grad(f))):
        got = order(lambda d: found(d).mean)(1.3)
        np.testing.assert_allclose(got, jax.jit(order(at))(1.3), rtol=1e-8)
    one = by_quadrature(params, 1.0, classification, side, 30, 0.1)
    np.testing.assert_allclose(found(1.0).sem, one.sem, rtol=1e-8)


def test_isotropic_evidence_is_not_differentiated_in_the_weights(classification):
    def ours(params):
        batch = classification.inputs, classification.targets
        options = settings(classification, 3, num_probes=2)
        return evidence.isotropic(params, batch, jax.random.key(0), **options)(1.0).mean

    with pytest.raises(TypeError, match="isotropic has derivatives in the prior precision only"):
        jax.jit(jax.grad(ours))(classification.network.params)


@pytest.fixture
def determinant(classification):
    return DenseStructure.fit(jnp.asarray(classification.ggn)).log_determinant


def test_curve_is_the_evidence_at_each_precision(classification, determinant):
    network, likelihood, inputs, targets, _ = classification
    log_likelihood = float(jnp.sum(likelihood.log_prob(network(network.params, inputs), targets)))
    norm = float(ravel(network.params) @ ravel(network.params))
    curve = evidence.curve(determinant, LogJoint(log_likelihood), norm, np.array([0.1, 1.0, 10.0]))
    at = jax.jit(lambda delta: exact(network.params, delta, classification, scale=1.0))
    expected = [at(delta) for delta in (0.1, 1.0, 10.0)]
    np.testing.assert_allclose(curve.log_marginal_likelihood.mean, expected, rtol=1e-10)
    np.testing.assert_array_equal(curve.log_marginal_likelihood.sem, 0)


def test_optimum_has_no_slope(classification, determinant):
    found = prior.optimum(determinant, LogJoint(-3.0), 40.0)
    slope = jax.grad(lambda d: -20.0 * d - 0.5 * jnp.linalg.slogdet(jnp.eye(43) + classification.ggn / d)[1])
    assert abs(slope(found.prior_precision) * found.prior_precision) < 1e-4
    assert found.low == found.prior_precision == found.high
    assert not found.at_bound


def test_optimum_of_a_truncated_determinant_reaches_to_the_other_end_of_its_bracket(determinant):
    lifted = prior.optimum(
        lambda d: determinant(d) + 5 / d, LogJoint(-3.0), 40.0, truncation=lambda d: np.array([5 / d])
    )
    exact = prior.maximiser(determinant, LogJoint(-3.0), 40.0)
    assert lifted.low == pytest.approx(exact, rel=1e-5)
    assert lifted.low < lifted.prior_precision == lifted.high


def test_interval_is_cut_at_the_search_range():
    # Probes that disagree about the slope of an evidence without curvature: nothing is known.
    found = prior.optimum(lambda d: np.array([-0.5, -1.5]) * np.log(d), LogJoint(0.0), 0.0, search_range=(1e-2, 1e2))
    assert (found.low, found.high) == pytest.approx((1e-2, 1e2)) and found.at_bound


def test_optimum_passes_over_what_is_no_number():
    found = prior.maximiser(lambda d: np.array([np.nan if d < 1e-2 else 43 * np.log1p(1 / d)]), LogJoint(0.0), 40.0)
    assert found == pytest.approx(
        prior.maximiser(lambda d: np.array([43 * np.log1p(1 / d)]), LogJoint(0.0), 40.0), rel=1e-6
    )
    with pytest.raises(ValueError, match="the evidence must be a number at one prior precision at least; got NaN at"):
        prior.maximiser(lambda d: np.array([np.nan]), LogJoint(0.0), 40.0)


def test_optimum_outside_the_range_says_so():
    # Weights at zero: the evidence rises with the precision without end.
    found = prior.optimum(lambda delta: np.array([1 / delta]), LogJoint(0.0), 0.0)
    assert found.at_bound


def test_targets_of_another_shape_do_not_broadcast(x64):
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 1)))
    x, y = jnp.ones((3, 2)), jnp.ones(3)
    options = {"network": network, "likelihood": bnnlaplace.gaussian(0.5), "num_matvecs": 2, "num_probes": 2}
    with pytest.raises(
        ValueError, match=r"targets of 'regression' must have the shape \(3, 1\) of the outputs; got \(3,\)"
    ):
        evidence.log_marginal_likelihood(network.params, 1.0, (x, y), jax.random.key(0), **options)


@pytest.mark.parametrize("jitted", usual([True], [False, True]))
def test_labels_that_are_known_lie_in_the_classes(jitted):
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))
    batch = jnp.ones((3, 2)), jnp.array([0, 3, 1])
    options = {"network": network, "likelihood": bnnlaplace.categorical(), "num_matvecs": 2, "num_probes": 2}
    for function in (
        evidence.isotropic,
        lambda *given, **by_name: evidence.log_marginal_likelihood(given[0], 1.0, *given[1:], **by_name),
    ):
        run = lambda params: function(params, batch, jax.random.key(0), **options)  # noqa: E731, B023
        with pytest.raises(ValueError, match=r"\(batch=\(x, y\)\): labels must lie in 0..2.* from 0 to 3"):
            (jax.jit(run) if jitted else run)(network.params)


@pytest.mark.parametrize("gradient", usual(["adjoint"], ["adjoint", "forward", "quadrature", "autodiff"]))
def test_eigenvalues_that_rounding_made_negative_count_as_zero(gradient):
    """Single precision, a depth past the rank, and null-space eigenvalues far below minus the prior precision."""
    rng = np.random.default_rng(1)
    params = {"in": jnp.asarray(rng.normal(size=(10, 30)), jnp.float32), "out": jnp.ones((30, 1), jnp.float32)}
    network = bnnlaplace.Network.from_function(lambda p, x: jnp.tanh(x @ p["in"]) @ p["out"], params)
    x = jnp.asarray(rng.normal(size=(20, 10)), jnp.float32)
    options = {"network": network, "likelihood": bnnlaplace.gaussian(0.01), "num_matvecs": 25, "num_probes": 16}

    def value(precision, which):
        batch, key = (x, network(params, x)), jax.random.key(0)
        return evidence.log_marginal_likelihood(
            params, precision, batch, key, side="primal", gradient=which, **options
        ).mean

    batch = x, network(params, x)
    expected = jax.jit(lambda: evidence.isotropic(params, batch, jax.random.key(0), side="primal", **options))()
    for precision in (0.1, 0.001):
        found, slope = jax.jit(jax.value_and_grad(lambda delta: value(delta, gradient)))(jnp.float32(precision))
        np.testing.assert_allclose(found, expected(precision).mean, rtol=1e-3)
        assert np.isfinite(slope)


def test_bad_numbers():
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))
    batch, key = (jnp.ones((4, 2)), jnp.arange(4) % 3), jax.random.key(0)
    options = {"network": network, "likelihood": bnnlaplace.categorical(), "num_matvecs": 2, "num_probes": 2}

    def run(probes=key, **changes):
        return evidence.isotropic(network.params, batch, probes, **options | changes)

    with pytest.raises(ValueError, match=r"num_matvecs=...\) must be an integer from 1 to 6; got 7; .*side='primal'"):
        run(num_matvecs=7)
    with pytest.raises(ValueError, match=r"isotropic\(scale=...\) must be one positive, finite number; got -1"):
        run(scale=-1)
    with pytest.raises(ValueError, match="probe_batch_size=... must be an integer of at least 1; got 0"):
        run(probe_batch_size=0)
    with pytest.raises(ValueError, match=r"isotropic\(probes=...\) must have at least one row"):
        run(jnp.zeros((0, 6)), num_probes=None)
    with pytest.raises(ValueError, match="prior precision of an IsotropicEvidence must be positive and finite; got -1"):
        run()(-1.0)


def test_whole_numbers_are_precisions():
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))
    batch, key = (jnp.ones((4, 2)), jnp.arange(4) % 3), jax.random.key(0)
    options = {"network": network, "likelihood": bnnlaplace.categorical(), "num_matvecs": 2, "num_probes": 2}

    def run(precision):
        arguments = network.params, precision, batch, key
        return evidence.log_marginal_likelihood(*arguments, gradient="forward", **options).mean

    np.testing.assert_allclose(run(np.array([1, 2, 3, 1, 2, 3])), run(np.array([1.0, 2, 3, 1, 2, 3])), rtol=1e-6)


@pytest.mark.parametrize("sigma", [-1.0, 0.0, np.nan, [1.0, np.inf]])
def test_the_noise_is_positive(sigma):
    with pytest.raises(ValueError, match=r"gaussian\(sigma_noise=\.\.\.\) must be positive and finite"):
        bnnlaplace.gaussian(jnp.asarray(sigma))


@pytest.mark.parametrize(
    "precision", [jnp.arange(1.0, 7.0), exhaustive(np.arange(1.0, 7.0)), np.arange(1.0, 7.0).reshape(2, 3)]
)
def test_precisions_of_weights_in_one_array_that_a_trace_closes_over(precision):
    x, y = np.eye(4, 2, dtype=np.float32), np.arange(4) % 3
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))

    def ours(weights):
        options = {"network": network, "likelihood": bnnlaplace.categorical(), "num_matvecs": 6, "side": "primal"}
        return evidence.log_marginal_likelihood(weights, precision, (x, y), jnp.sqrt(6.0) * jnp.eye(6), **options).mean

    la = bnnlaplace.Laplace(network, hessian_structure="full", prior_precision=precision).fit((x, y))
    np.testing.assert_allclose(jax.jit(ours)(network.params), la.log_marginal_likelihood().mean, rtol=1e-5)


@pytest.mark.parametrize("size", [1.0, 1e4])
def test_curvature_that_is_hidden_by_rounding_is_bounded(size):
    """Features of size 1e4 hide the curvature of a bias in float32: ten nats, of which nothing said a word."""
    rng, noise = np.random.default_rng(0), 0.3
    x, weights = size * rng.normal(size=(60, 6)), rng.normal(size=(6, 3)) / size
    y = x @ weights + noise * rng.normal(size=(60, 3))
    arrays = tuple(jnp.asarray(array, jnp.float32) for array in (x, y, weights))
    network = bnnlaplace.Network.from_function(lambda p, x: x @ p["w"] + p["b"], {"b": jnp.zeros(3), "w": arrays[2]})
    model = {"network": network, "likelihood": bnnlaplace.gaussian(noise), "num_matvecs": 21, "microbatch": 60}
    probes = jnp.asarray(np.sqrt(21) * np.eye(21), jnp.float32)
    found = jax.jit(lambda: evidence.isotropic(network.params, arrays[:2], probes, side="primal", **model))()
    inputs = np.concatenate([np.ones((60, 1)), np.asarray(arrays[0], float)], axis=1)
    grid = np.array([0.1, 1.0, 1e3])
    values = np.linalg.eigvalsh(inputs.T @ inputs / noise**2)
    determinants = 3 * np.log1p(values / grid[:, None]).sum(axis=1)
    residuals = np.asarray(y - inputs[:, 1:] @ np.asarray(arrays[2], float), float) / noise
    log_likelihood = -0.5 * (residuals**2).sum() - residuals.size * np.log(noise * np.sqrt(2 * np.pi))
    exact = log_likelihood - 0.5 * grid * (np.asarray(arrays[2], float) ** 2).sum() - 0.5 * determinants
    excess, bound = np.asarray(found(grid).mean, float) - exact, np.asarray(found.rounding(grid))
    assert bound.shape == (3,) and ((excess > -0.01) & (excess < bound + 0.01)).all()
    if size == 1:
        assert (bound == 0).all()
    else:  # the three eigenvalues of the bias, and no other
        hidden = 1.5 * np.log1p(values[0] / grid)
        np.testing.assert_allclose(excess, hidden, atol=0.02)
        cut = 4 * np.finfo(np.float32).eps * values.max()
        np.testing.assert_allclose(bound, 1.5 * np.log1p(cut / grid), rtol=1e-3)
