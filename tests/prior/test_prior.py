"""Priors that are not isotropic: exact ones against dense algebra, choices by the evidence against its slope."""

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import random_problem, usual
from scipy import stats

import bnnlaplace
from bnnlaplace import fitted as fitted_module
from bnnlaplace import prior
from bnnlaplace.core.tree import ravel
from bnnlaplace.prior import gaussian

STRUCTURES = ["full", "diag", "lanczos"]
LAYERS = {"b1": 0.3, "b2": 2.0, "w1": 0.7, "w2": 5.0}
SIZES = {"b1": 5, "b2": 3, "w1": 20, "w2": 15}
DELTA = np.concatenate([np.full(SIZES[name], value) for name, value in LAYERS.items()])
MEAN = np.linspace(-0.5, 0.5, 43)


@pytest.fixture
def problem(x64):
    return random_problem(bnnlaplace.categorical(), np.random.default_rng(1).integers(0, 3, size=11))


def fitted(problem, structure, precision=LAYERS, mean=MEAN, **options):
    la = bnnlaplace.Laplace(
        problem.network, hessian_structure=structure, prior_precision=precision, prior_mean=mean, **options
    )
    return la.fit((problem.inputs, problem.targets), key=jax.random.key(0), num_probes=43, tolerance=1e-6)


def curvature(problem, structure):
    return np.diag(np.diagonal(problem.ggn)) if structure == "diag" else problem.ggn


def log_evidence(problem, structure, delta, mean):
    deviation = ravel(problem.network.params) - mean
    log_prob = problem.likelihood.log_prob(problem.network(problem.network.params, problem.inputs), problem.targets)
    determinant = np.linalg.slogdet(np.eye(43) + curvature(problem, structure) / delta)[1]
    return log_prob.sum() - 0.5 * deviation @ (delta * deviation) - 0.5 * determinant


@pytest.mark.parametrize("structure", usual(["lanczos"], STRUCTURES))
def test_everything_against_the_dense_posterior(problem, structure):
    la = fitted(problem, structure)
    np.testing.assert_allclose(la.log_marginal_likelihood().mean, log_evidence(problem, structure, DELTA, MEAN))
    precision = curvature(problem, structure) + np.diag(DELTA)
    gradient = np.asarray(la.fitted.log_likelihood.gradient) - DELTA * (ravel(problem.network.params) - MEAN)
    np.testing.assert_allclose(la.mode_gradient(), gradient, atol=1e-10)
    np.testing.assert_allclose(la.mode_decrement(), gradient @ np.linalg.solve(precision, gradient))
    effective = np.trace(np.linalg.solve(precision, curvature(problem, structure)))
    np.testing.assert_allclose(la.effective_parameters(), effective)
    covariance = np.linalg.inv(precision)
    jacobian = oracles.jacobian(problem.network, problem.network.params, problem.inputs)
    variance = np.einsum("ncp,pq,ndq->ncd", jacobian, covariance, jacobian)
    np.testing.assert_allclose(la.functional_variance(problem.inputs), variance, rtol=1e-6)
    samples = jax.vmap(ravel)(la.sample(jax.random.key(1), 4000)) - ravel(problem.network.params)
    # In coordinates in which samples are standard normal.
    white = np.asarray(samples) @ np.linalg.cholesky(precision)
    found = white.T @ white / 4000 - np.eye(43)
    assert abs(found).max() < 6 * np.sqrt(2 / 4000)


def test_a_krylov_decomposition_of_whitened_weights(problem):
    """The data have more outputs than vectors, so that products are needed."""
    la = bnnlaplace.Laplace(problem.network, prior_precision=LAYERS, prior_mean=MEAN)
    la = la.fit((problem.inputs, problem.targets), key=jax.random.key(0), num_probes=8, max_vectors=32, tolerance=1e-3)
    assert isinstance(la.structure, bnnlaplace.structure.KrylovStructure)
    exact = log_evidence(problem, "full", DELTA, MEAN)
    estimate = la.log_marginal_likelihood()
    assert abs(estimate.mean - exact) <= 4 * estimate.sem + 0.5 * la.krylov_error().log_determinant
    with pytest.raises(ValueError, match="fitted at the ratios of the prior precisions.*refit=lambda"):
        la.with_prior_precision(1.0)
    twice = la.with_prior_precision({name: 2 * value for name, value in LAYERS.items()})
    estimate = twice.log_marginal_likelihood()
    assert abs(estimate.mean - log_evidence(problem, "full", 2 * DELTA, MEAN)) <= 4 * estimate.sem + 1e-3


@pytest.mark.parametrize("structure", usual(["diag"], STRUCTURES))
def test_all_ways_to_state_a_prior(problem, structure):
    tree = jax.tree.map(lambda leaf, value: np.full(leaf.shape, value), problem.network.params, LAYERS)
    expected = fitted(problem, structure).log_marginal_likelihood().mean
    for precision in (DELTA, jnp.asarray(DELTA), tree, {name: jnp.asarray(value) for name, value in LAYERS.items()}):
        found = fitted(problem, structure, precision, mean=jax.tree.unflatten(jax.tree.structure(tree), SPLIT))
        np.testing.assert_allclose(found.log_marginal_likelihood().mean, expected, rtol=1e-8)
    isotropic = fitted(problem, structure, dict.fromkeys(LAYERS, 2.0))
    assert isotropic.prior.relative == 1.0
    np.testing.assert_allclose(
        isotropic.log_marginal_likelihood().mean, fitted(problem, structure, 2.0).log_marginal_likelihood().mean
    )


SHAPES = {"b1": (5,), "b2": (3,), "w1": (4, 5), "w2": (5, 3)}
SPLIT = [
    part.reshape(shape)
    for part, shape in zip(np.split(MEAN, np.cumsum(list(SIZES.values()))[:-1]), SHAPES.values(), strict=True)
]


def test_the_prior_is_resolved_once(problem, monkeypatch):
    """For a number at another prior precision; with a precision for each weight that would take most of the time."""
    calls = []
    resolve = gaussian.resolve
    for module in (gaussian, fitted_module):
        monkeypatch.setattr(module, "resolve", lambda *args, **options: calls.append(args) or resolve(*args, **options))
    la = fitted(problem, "diag", 1.0)
    for precision, expected in ((2.0, 1), (DELTA, 1), (None, 0)):
        calls.clear()
        la.log_marginal_likelihood(precision)
        assert len(calls) == expected
    calls.clear()
    fitted(problem, "diag", LAYERS)
    assert len(calls) == 1  # to construct, to fit


@pytest.mark.parametrize("structure", usual(["diag"], ["full", "diag"]))
def test_other_precisions_without_fitting_again(problem, structure):
    la = fitted(problem, structure, 1.0)
    for precision in (LAYERS, 3.0, DELTA):
        moved = la.with_prior_precision(precision)
        expected = fitted(problem, structure, precision)
        for ours, theirs in (
            (moved.log_marginal_likelihood().mean, expected.log_marginal_likelihood().mean),
            (moved.functional_variance(problem.inputs), expected.functional_variance(problem.inputs)),
            (la.log_marginal_likelihood(precision).mean, expected.log_marginal_likelihood().mean),
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
        la = moved


@pytest.mark.parametrize(
    ("prior_structure", "structure"),
    usual([("layerwise", "full"), ("diag", "lanczos")], ("layerwise", "diag"), STRUCTURES),
)
def test_no_slope_at_the_optimum(problem, structure, prior_structure):
    la = fitted(problem, structure, 1.0)
    numbers = np.arange(43) if prior_structure == "diag" else np.repeat(np.arange(4), list(SIZES.values()))
    best = la.optimize_prior_precision(prior_structure=prior_structure)
    found = best.prior_precision
    logs = np.log(np.array(list(found.values())) if prior_structure == "layerwise" else found)
    slope = jax.grad(lambda logs: dense_evidence(problem, structure, jnp.exp(logs)[numbers]))(jnp.asarray(logs))
    assert np.log(1e-4) < logs.min() and logs.max() < np.log(1e6)
    np.testing.assert_allclose(slope, 0, atol=2e-3)
    assert best.log_marginal_likelihood().mean > la.optimize_prior_precision().log_marginal_likelihood().mean
    scalar = best.optimize_prior_precision(prior_structure="scalar")
    np.testing.assert_allclose(scalar.prior_precision, la.optimize_prior_precision().prior_precision, rtol=1e-4)


def dense_evidence(problem, structure, delta):
    deviation = ravel(problem.network.params) - MEAN
    determinant = jnp.linalg.slogdet(jnp.eye(43) + curvature(problem, structure) / delta)[1]
    return -0.5 * deviation @ (delta * deviation) - 0.5 * determinant


def test_a_dead_group_is_stopped_and_named(problem):
    """Its weights are zero: nothing bounds its precision from above."""
    params = {**problem.network.params, "w1": jnp.zeros((4, 5))}
    la = bnnlaplace.Laplace(problem.network.with_params(params), hessian_structure="full")
    la = la.fit((problem.inputs, problem.targets))
    with pytest.warns(UserWarning, match=r"does not determine the prior precision of w1 at 1e\+06: it was stopped"):
        best = la.optimize_prior_precision(prior_structure="layerwise")
    assert best.prior_precision["w1"] == pytest.approx(1e6)


def test_groups_of_ones_own(problem):
    kind = lambda path: "biases" if path.startswith("b") else "weights"  # noqa: E731
    la = fitted(problem, "full", {"weights": 2.0, "biases": 0.1}, prior_groups=kind)
    delta = np.where(np.repeat([1, 1, 0, 0], list(SIZES.values())), 0.1, 2.0)
    np.testing.assert_allclose(la.log_marginal_likelihood().mean, log_evidence(problem, "full", delta, MEAN))
    assert set(la.optimize_prior_precision(prior_structure="layerwise").prior_precision) == {"weights", "biases"}
    assert prior.by_layer("Dense_0/kernel") == prior.by_layer("Dense_0/bias") == "Dense_0"


def test_ratios_are_kept(problem):
    la = fitted(problem, "full").optimize_prior_precision()
    np.testing.assert_allclose([la.prior_precision[n] / v for n, v in LAYERS.items()], la.prior_precision["w1"] / 0.7)
    slope = jax.grad(lambda log: dense_evidence(problem, "full", jnp.exp(log) * DELTA))(
        jnp.log(la.prior_precision["w1"] / 0.7)
    )
    np.testing.assert_allclose(slope, 0, atol=1e-4)


@pytest.mark.parametrize("seed", usual([1], [1, 2, 3]))
def test_lanczos_layers_by_fitting_again(problem, seed):
    exact = fitted(problem, "full", 1.0).optimize_prior_precision(prior_structure="layerwise")
    options = {"key": jax.random.key(seed), "num_probes": 16, "max_vectors": 32, "tolerance": 0.05}
    data = (problem.inputs, problem.targets)
    la = bnnlaplace.Laplace(problem.network, prior_mean=MEAN).fit(data, **options)
    with pytest.raises(ValueError, match=r"refit=\.\.\.\) must be given for 'lanczos'"):
        la.optimize_prior_precision(prior_structure="layerwise")
    best = la.optimize_prior_precision(prior_structure="layerwise", refit=lambda la: la.fit(data, **options))
    assert set(best.prior_precision) == set(LAYERS)
    delta = np.repeat(list(best.prior_precision.values()), list(SIZES.values()))
    # The evidence is flat at its maximum: that of the precisions found is close to the largest one.
    lost = exact.log_marginal_likelihood().mean - log_evidence(problem, "full", delta, MEAN)
    assert 0 <= lost < 0.2


@pytest.mark.parametrize("structure", usual(["diag", "lanczos"], STRUCTURES))
def test_saved_and_loaded(problem, structure, tmp_path):
    for number, precision in enumerate((LAYERS, DELTA, 2.0)):
        la = fitted(problem, structure, precision)
        la.save(tmp_path / f"{number}")
        again = bnnlaplace.Laplace.load(tmp_path / f"{number}", problem.network)
        np.testing.assert_allclose(again.log_marginal_likelihood().mean, la.log_marginal_likelihood().mean, rtol=1e-12)
        np.testing.assert_allclose(again.predictive(problem.inputs), la.predictive(problem.inputs), rtol=1e-6)
        assert type(again.prior_precision) is type(la.prior_precision)


def test_the_mean_of_a_subset_is_taken_from_that_of_all(problem):
    options = {"hessian_structure": "full", "subset_of_weights": lambda path: path in ("w2", "b2")}
    means = dict(zip(SIZES, SPLIT, strict=True))
    data = (problem.inputs, problem.targets)
    whole = bnnlaplace.Laplace(problem.network, prior_mean=means, **options).fit(data)
    part = {"b1": None, "b2": means["b2"], "w1": None, "w2": means["w2"]}
    same = bnnlaplace.Laplace(problem.network, prior_mean=part, **options).fit(data)
    assert whole.log_marginal_likelihood() == same.log_marginal_likelihood()


@pytest.mark.parametrize("structure", usual(["full"], ["full", "diag"]))
def test_vectors_that_a_trace_closes_over(problem, structure):
    la = fitted(problem, structure, jnp.asarray(DELTA), jnp.asarray(MEAN))
    x = problem.inputs[:3]
    np.testing.assert_allclose(jax.jit(lambda x: la.predictive(x))(x), la.predictive(x), rtol=1e-12)


def test_traced_precisions_of_groups(problem):
    la = fitted(problem, "diag")
    inside = jax.jit(lambda la, x: la.predictive(x))(la, problem.inputs)
    np.testing.assert_allclose(inside, la.predictive(problem.inputs), rtol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"prior_precision": {"w1": 1.0}},
            r"one for each of the groups \['b1', 'b2', 'w1', 'w2'\].*the names \['w1'\]",
        ),
        ({"prior_precision": np.ones(42)}, r"43 numbers.*got shape \(42,\)"),
        ({"prior_precision": np.linspace(0, 1, 43)}, "positive and finite; got numbers from 0 to 1"),
        ({"prior_mean": np.ones(4)}, r"prior_mean=\.\.\.\) must be one number, 43 numbers.*got shape \(4,\)"),
        ({"prior_mean": np.nan}, r"prior_mean=\.\.\.\) must be finite"),
        ({"prior_groups": "layer"}, r"prior_groups=\.\.\.\) must be a function"),
    ],
)
def test_bad_priors(problem, options, message, unchecked_annotations):
    with pytest.raises(ValueError, match=message):
        bnnlaplace.Laplace(problem.network, **options)


@pytest.mark.parametrize("structure", usual(["lanczos"], STRUCTURES))
def test_the_noise_of_a_regression_is_chosen_along(x64, structure):
    """Bayesian linear regression: the evidence in closed form, over noise and prior precision at once."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4))
    targets = features @ rng.normal(size=(4, 1)) + 0.3 * rng.normal(size=(30, 1))
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((4, 1)))

    def closed_form(sigma, delta):
        covariance = features @ features.T / delta + sigma**2 * np.eye(30)
        return stats.multivariate_normal.logpdf(targets[:, 0], np.zeros(30), covariance)

    la = bnnlaplace.Laplace(network, "regression", hessian_structure="full", sigma_noise=1.0)
    before = 0.0
    while abs(la.prior_precision - before) > 1e-9 * before:  # the mode moves with both
        before = la.prior_precision
        posterior = features.T @ features / la.sigma_noise**2 + la.prior_precision * np.eye(4)
        weights = np.linalg.solve(posterior, features.T @ targets / la.sigma_noise**2)
        la = bnnlaplace.Laplace(
            network.with_params(jnp.asarray(weights)),
            "regression",
            hessian_structure="full",
            prior_precision=la.prior_precision,
            sigma_noise=float(la.sigma_noise),
        )
        la = la.fit((features, targets)).optimize_prior_precision(optimize_sigma_noise=True)
    sigma, delta = float(la.sigma_noise), la.prior_precision
    np.testing.assert_allclose(la.log_marginal_likelihood().mean, closed_form(sigma, delta), rtol=1e-6)
    for other in ((1.02 * sigma, delta), (0.98 * sigma, delta), (sigma, 1.1 * delta), (sigma, 0.9 * delta)):
        assert closed_form(*other) < closed_form(sigma, delta)
    again = bnnlaplace.Laplace(
        la.network, "regression", hessian_structure=structure, prior_precision=delta, sigma_noise=1.0
    ).fit((features, targets), key=jax.random.key(0))
    moved = again.with_sigma_noise(sigma)
    if structure != "diag":
        np.testing.assert_allclose(moved.log_marginal_likelihood().mean, closed_form(sigma, delta), rtol=1e-6)
    expected = bnnlaplace.Laplace(
        la.network, "regression", hessian_structure=structure, prior_precision=delta, sigma_noise=sigma
    ).fit((features, targets), key=jax.random.key(0))
    np.testing.assert_allclose(moved.mode_gradient(), expected.mode_gradient(), atol=1e-8)
    np.testing.assert_allclose(moved.functional_variance(features), expected.functional_variance(features), rtol=1e-8)
    np.testing.assert_allclose(
        moved.log_marginal_likelihood().mean, expected.log_marginal_likelihood().mean, rtol=1e-10
    )


@pytest.mark.parametrize("noise", usual([1e-4], [1e-3, 1e-4]))
def test_a_small_noise_is_found_in_single_precision(noise):
    """The search starts at a noise so large that the log likelihood holds no digit of the residuals."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2000, 3)).astype(np.float32)
    weights = np.array([0.5, -0.2, 0.1], np.float32)[:, None]
    targets = (features @ weights + noise * rng.normal(size=(2000, 1))).astype(np.float32)
    best = np.linalg.lstsq(features, targets)[0]
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.asarray(best))
    la = bnnlaplace.Laplace(network, "regression", hessian_structure="full", sigma_noise=1.0)
    found = la.fit((features, targets)).optimize_prior_precision(optimize_sigma_noise=True).sigma_noise
    residuals = targets - features @ np.asarray(best)
    np.testing.assert_allclose(found, np.sqrt(np.mean(residuals.astype(np.float64) ** 2)), rtol=5e-3)


def test_options_of_the_other_method_are_refused(problem):
    la = fitted(problem, "diag")
    with pytest.raises(ValueError, match=r"\('gridsearch'\) must not be given prior_structure=..., .* other method"):
        la.optimize_prior_precision("gridsearch", prior_structure="layerwise")
    with pytest.raises(ValueError, match=r"\('gridsearch'\) must not be given optimize_sigma_noise=..."):
        la.optimize_prior_precision("gridsearch", optimize_sigma_noise=True)
    with pytest.raises(ValueError, match=r"\('marglik'\) must not be given validation=..."):
        la.optimize_prior_precision(validation=(problem.inputs, problem.targets))
    with pytest.raises(ValueError, match=r"max_refits=...\) must be an integer of at least 1; got 0"):
        la.optimize_prior_precision(prior_structure="layerwise", max_refits=0)


def test_groups_have_names(problem):
    for names in (lambda path: len(path), lambda path: None):
        la = bnnlaplace.Laplace(problem.network, hessian_structure="diag", prior_groups=names)
        with pytest.raises(ValueError, match=r"prior_groups=...\) must return the name of a group, a string; got "):
            la.fit((problem.inputs, problem.targets)).optimize_prior_precision(prior_structure="layerwise")


def test_refit_returns_a_fitted_laplace(problem):
    data, options = (problem.inputs, problem.targets), {"num_probes": 4, "max_vectors": 12, "tolerance": 1.0}
    options["key"] = jax.random.key(0)
    la = bnnlaplace.Laplace(problem.network).fit(data, **options)
    for refit in (lambda la: None, lambda la: la):
        with pytest.raises(ValueError, match=r"refit=...\) must return the fitted Laplace"):
            la.optimize_prior_precision(prior_structure="layerwise", refit=refit)


def test_refit_fits_the_same_model_to_the_same_data(problem):
    """Another fit gave precisions that are no maximum of anything, silently."""
    data, options = (problem.inputs, problem.targets), {"num_probes": 4, "max_vectors": 12, "tolerance": 1.0}
    options["key"] = jax.random.key(0)
    first = bnnlaplace.Laplace(problem.network).fit(data, **options)
    moved = problem.network.with_params(jax.tree.map(lambda weight: 2 * weight, problem.network.params))
    wrong = {
        "hessian_structure='diag'": lambda la: bnnlaplace.Laplace(la.network, hessian_structure="diag").fit(data),
        "other weights": lambda la: bnnlaplace.Laplace(moved).fit(data, **options),
        "24 targets for 33": lambda la: la.fit((problem.inputs[:8], problem.targets[:8]), **options),
        "data with log likelihood": lambda la: la.fit((problem.inputs, 2 - problem.targets), **options),
        "prior precisions with other ratios": lambda la: first,
    }
    for words, refit in wrong.items():
        with pytest.raises(ValueError, match=rf"\(refit=...\) must fit the Laplace that it is given, .*; got {words}"):
            first.optimize_prior_precision(prior_structure="layerwise", refit=refit)


def test_the_prior_that_refit_returns_is_the_one_that_is_stated(problem, tmp_path):
    """A user's refit may move the prior again. What is saved states the prior that the evidence was computed with."""
    options = {"key": jax.random.key(0), "num_probes": 8, "max_vectors": 24, "tolerance": 0.5}
    data = (problem.inputs, problem.targets)
    la = bnnlaplace.Laplace(problem.network).fit(data, **options)
    refit = lambda la: la.fit(data, **options).optimize_prior_precision()  # noqa: E731
    la = la.optimize_prior_precision(prior_structure="layerwise", refit=refit)
    stated = la.log_marginal_likelihood(la.prior_precision)
    np.testing.assert_allclose(stated.mean, la.log_marginal_likelihood().mean, rtol=1e-12)
    la.save(tmp_path / "posterior")
    again = bnnlaplace.Laplace.load(tmp_path / "posterior", problem.network)
    np.testing.assert_allclose(again.log_marginal_likelihood().mean, la.log_marginal_likelihood().mean, rtol=1e-12)


def test_ratios_that_stay_keep_what_a_structure_remembers(problem):
    la = fitted(problem, "full", LAYERS)
    assert la.with_prior_precision({name: 3 * value for name, value in LAYERS.items()}).structure is la.structure
    assert la.with_prior_precision(1.0).structure is not la.structure


def test_noise_needs_a_regression(problem):
    with pytest.raises(ValueError, match="must be asked of a regression; got 'classification'"):
        fitted(problem, "diag").optimize_prior_precision(optimize_sigma_noise=True)


def test_unknown_prior_structure(problem, unchecked_annotations):
    with pytest.raises(ValueError, match="must be 'scalar', 'layerwise', 'diag'"):
        fitted(problem, "diag").optimize_prior_precision(prior_structure="global")
