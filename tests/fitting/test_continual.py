"""The posterior of earlier data as the prior of later ones, against dense algebra in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from cases import usual

import bnnlaplace
from bnnlaplace.core.tree import ravel
from bnnlaplace.structure import block_sum

pytestmark = pytest.mark.usefixtures("x64_module")

NOISE, PRECISION = 0.5, 2.0
STRUCTURES = ("diag", "kron", "full")


def outputs(weights, x):
    return x @ weights["kernel"] + weights["bias"]


def tasks(count, num_inputs=3):
    """Linear regressions with two outputs, whose inputs have other directions in every task."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        x = rng.normal(size=(6, num_inputs)) @ rng.normal(size=(num_inputs, num_inputs))
        yield x, rng.normal(size=(6, 2))


def laplace(network, structure, **options):
    return bnnlaplace.Laplace(network, "regression", hessian_structure=structure, sigma_noise=NOISE, **options)


def network(num_inputs=3):
    zeros = {"kernel": jnp.zeros((num_inputs, 2)), "bias": jnp.zeros(2)}
    return bnnlaplace.Network.from_function(outputs, zeros)


def one_after_another(structure, data, **options):
    """Laplace approximations of each task given those before, each at its mode."""
    first, *others = data
    found = [laplace(network(), structure, prior_precision=PRECISION, **options).fit(first, mean="linear")]
    for task in others:
        found.append(laplace(network(), structure).fit(task, mean="linear", prior=found[-1]))
    return found


def design(x):
    """The Jacobian (N C, P) of `outputs`, with the bias first, as leaves are sorted."""
    return np.concatenate([np.tile(np.eye(2), (len(x), 1)), np.kron(x, np.eye(2))], axis=1)


def dense(la):
    """The posterior precision as a matrix, from its products alone."""
    identity = np.eye(ravel(la.network.params).size)
    return np.stack([la.structure.product(row) for row in identity]) + PRECISION * identity


# --- the whole curvature ----------------------------------------------------------------------------------------


def test_evidences_of_tasks_add_up_to_the_exact_evidence_of_all_data():
    """With a linear Gaussian model "full" is Bayesian linear regression, one task after another."""
    data = list(tasks(3))
    found = one_after_another("full", data)
    rows, targets = np.concatenate([design(x) for x, _ in data]), np.concatenate([y.ravel() for _, y in data])
    for count in (1, 2, 3):
        some, seen = rows[: 12 * count], targets[: 12 * count]
        covariance = NOISE**2 * np.eye(len(some)) + some @ some.T / PRECISION
        exact = scipy.stats.multivariate_normal(np.zeros(len(some)), covariance).logpdf(seen)
        np.testing.assert_allclose(sum(la.log_marginal_likelihood().mean for la in found[:count]), exact, rtol=1e-9)
        precision = some.T @ some / NOISE**2 + PRECISION * np.eye(8)
        mean = np.linalg.solve(precision, some.T @ seen) / NOISE**2
        np.testing.assert_allclose(ravel(found[count - 1].network.params), mean, atol=1e-6)
        np.testing.assert_allclose(found[count - 1].structure.matrix + PRECISION * np.eye(8), precision, atol=1e-9)
        np.testing.assert_allclose(found[count - 1].mode_gradient(), 0, atol=1e-5)
    x = data[0][0]
    expected = (design(x) @ np.linalg.solve(precision, design(x).T)).reshape(6, 2, 6, 2)
    np.testing.assert_allclose(found[-1].functional_posterior(x).covariance, expected, atol=1e-9)
    np.testing.assert_allclose(found[-1].predictive(x)[1], np.einsum("ncnc->nc", expected), atol=1e-9)


def test_a_prior_with_several_precisions_passes_on():
    """The curvature of earlier tasks is kept in whitened weights, and so is the prior."""
    data = list(tasks(2))
    precisions = {"kernel": 0.3, "bias": 7.0}
    groups = {"prior_precision": precisions, "prior_groups": lambda path: path}
    first = laplace(network(), "full", **groups).fit(data[0], mean="linear")
    second = laplace(network(), "full").fit(data[1], mean="linear", prior=first)
    rows, targets = np.concatenate([design(x) for x, _ in data]), np.concatenate([y.ravel() for _, y in data])
    diagonal = np.repeat([7.0, 0.3], [2, 6])
    exact = scipy.stats.multivariate_normal(np.zeros(24), NOISE**2 * np.eye(24) + rows / diagonal @ rows.T).logpdf(
        targets
    )
    total = first.log_marginal_likelihood().mean + second.log_marginal_likelihood().mean
    np.testing.assert_allclose(total, exact, rtol=1e-9)
    assert second.prior_precision == precisions


# --- the diagonal -----------------------------------------------------------------------------------------------


def test_the_diagonal_of_a_posterior_is_a_prior_with_a_precision_for_each_weight():
    data = list(tasks(2))
    first, second = one_after_another("diag", data)
    stated = laplace(
        network(),
        "diag",
        prior_precision=np.asarray(first.structure.diagonal) + PRECISION,
        prior_mean=first.network.params,
    ).fit(data[1], mean="linear")
    np.testing.assert_allclose(ravel(second.network.params), ravel(stated.network.params), atol=1e-6)
    for method in (
        lambda la: la.log_marginal_likelihood().mean,
        lambda la: la.functional_variance(data[0][0]),
        lambda la: la.mode_decrement(),
        lambda la: la.mode_gradient(),
    ):
        np.testing.assert_allclose(method(second), method(stated), rtol=1e-6, atol=1e-8)


# --- all structures ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three_tasks():
    data = list(tasks(3))
    return data, {structure: one_after_another(structure, data) for structure in STRUCTURES}


@pytest.mark.parametrize("structure", STRUCTURES)
def test_log_density_is_that_of_a_normal_distribution(structure, three_tasks):
    """Its constant, and the precision of the next task's penalty: the sum over tasks, exactly."""
    _, found = three_tasks
    la = found[structure][1]
    precision = dense(la)
    normal = scipy.stats.multivariate_normal(ravel(la.network.params), np.linalg.inv(precision))
    rng = np.random.default_rng(1)
    point = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), la.network.params)
    np.testing.assert_allclose(la.log_density(point), normal.logpdf(ravel(point)), rtol=1e-6)
    np.testing.assert_allclose(jax.jit(la.log_density)(point), la.log_density(point), rtol=1e-12)
    gradient = ravel(jax.grad(la.log_density)(point))
    expected = -precision @ np.asarray(ravel(point) - ravel(la.network.params))
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)
    # The gradient of the log joint of the next task is that of its likelihood and this one.
    moved = found[structure][2].fitted
    moved = moved._replace(network=moved.network.with_params(point))
    np.testing.assert_allclose(moved.mode_gradient() - moved.log_likelihood.gradient, gradient, rtol=1e-6)
    form = -2 * (la.log_density(point) - la.log_density(la.network.params))
    np.testing.assert_allclose(moved.prior.quadratic_form(point), form, rtol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_variances_are_those_of_the_products(structure, three_tasks):
    """A sum of small blocks of a last layer is a matrix, of which the rows of a bias were taken."""
    data, found = three_tasks
    rows = design(data[0][0])
    expected = (rows @ np.linalg.solve(dense(found[structure][1]), rows.T)).reshape(6, 2, 6, 2)
    variance = found[structure][1].functional_variance(data[0][0])
    np.testing.assert_allclose(variance, np.einsum("ncnd->ncd", expected), rtol=1e-6, atol=1e-9)


def test_log_density_takes_all_weights_of_a_model_with_a_subset():
    weights = {"body": jnp.ones((3, 3)), "head": jnp.ones((3, 2))}
    whole = bnnlaplace.Network.from_function(lambda w, x: jnp.tanh(x @ w["body"]) @ w["head"], weights)
    (task,) = tasks(1)
    options = {"subset_of_weights": lambda path: path == "head"}
    la = laplace(whole, "full", **options).fit(task)
    np.testing.assert_allclose(la.log_density(weights), la.log_density({"body": None, "head": weights["head"]}))
    gradient = jax.grad(la.log_density)({**weights, "head": 2 * weights["head"]})
    assert (gradient["body"] == 0).all() and (gradient["head"] != 0).any()
    with pytest.raises(ValueError, match=r"log_density\(params=...\) must be weights like la.network.params"):
        la.log_density({"head": jnp.ones((4, 2))})
    with pytest.raises(TypeError, match="close over the Laplace"):
        jax.jit(lambda la: la.log_density(weights))(la)
    spectral = laplace(whole, "lanczos", **options).fit(task)
    with pytest.raises(ValueError, match="'diag', 'kron' or 'full'; got 'lanczos'"):
        spectral.log_density(weights)
    # The function of the head must be the same, and so the body.
    moved = whole.with_params({**weights, "body": 2 * weights["body"]})
    with pytest.raises(ValueError, match="same function of the weights.*'body'"):
        laplace(moved, "full", **options).fit(task, prior=la)
    with pytest.raises(ValueError, match="same weights of the same network; they differ in 'body'"):
        laplace(whole, "full").fit(task, prior=la)
    assert laplace(whole, "full", **options).fit(task, prior=la).structure is not None


@pytest.mark.parametrize("structure", usual(["full"], STRUCTURES))
def test_a_later_posterior_is_saved_and_goes_on(structure, three_tasks, tmp_path, monkeypatch):
    data, found = three_tasks
    if structure == "kron":
        monkeypatch.setattr(block_sum, "MAX_EXACT", 0)
        found = {"kron": one_after_another("kron", data)}
    _, second, third = found[structure]
    second.save(tmp_path / "la")
    loaded = bnnlaplace.Laplace.load(tmp_path / "la", network())
    x, key = data[0][0], jax.random.key(0)
    for method in (
        lambda la: la.log_marginal_likelihood().mean,
        lambda la: la.functional_variance(x),
        lambda la: la.predictive(x),
        lambda la: la.mode_gradient(),
        lambda la: la.sample(key, 2),
        lambda la: la.log_density(third.network.params),
    ):
        jax.tree.map(np.testing.assert_array_equal, method(loaded), method(second))
    again = laplace(third.network, structure).fit(data[2], prior=loaded)
    np.testing.assert_allclose(again.log_marginal_likelihood().mean, third.log_marginal_likelihood().mean, rtol=1e-6)
    # Fitted again, a Laplace keeps its prior.
    kept = loaded.fit(data[1])
    np.testing.assert_allclose(kept.log_marginal_likelihood().mean, second.log_marginal_likelihood().mean, rtol=1e-6)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_a_later_posterior_is_an_argument_of_jitted_functions(structure, three_tasks, monkeypatch):
    data, found = three_tasks
    if structure == "kron":
        monkeypatch.setattr(block_sum, "MAX_EXACT", 0)
        found = {"kron": one_after_another("kron", data[:2])}
    la, x = found[structure][1], jnp.asarray(data[0][0])

    def answers(la, x):
        return la.functional_variance(x), la.sample(jax.random.key(0), 2), la.mode_gradient()

    expected, inside = answers(la, x), jax.jit(answers)(la, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), inside, expected)


# --- what is refused --------------------------------------------------------------------------------------------


def test_what_has_no_meaning_after_the_first_task_is_refused(three_tasks):
    _, found = three_tasks
    la = found["full"][1]
    for ask in (
        la.optimize_prior_precision,
        la.evidence_curve,
        la.evidence_optimum,
        lambda: la.with_prior_precision(3.0),
        lambda: la.log_marginal_likelihood(3.0),
        lambda: la.mode_gradient(3.0),
        lambda: la.effective_parameters(3.0),
        lambda: la.with_sigma_noise(0.1),
    ):
        with pytest.raises(ValueError, match="must be asked of the first task.*prior=..."):
            ask()


def test_posteriors_that_do_not_fit_are_refused(three_tasks, unchecked_annotations):
    data, found = three_tasks
    full, task = found["full"][0], data[1]
    with pytest.raises(TypeError, match=r"fit\(prior=...\) must be the Laplace that was fitted.*got float"):
        laplace(network(), "full").fit(task, prior=2.0)
    with pytest.raises(ValueError, match="must be a fitted Laplace"):
        laplace(network(), "full").fit(task, prior=laplace(network(), "full"))
    with pytest.raises(ValueError, match="'diag', 'kron' or 'full'; got 'lanczos'"):
        laplace(network(), "lanczos").fit(task, prior=full, key=jax.random.key(0))
    with pytest.raises(ValueError, match="hessian_structure of the new fit, 'kron'; got 'full'"):
        laplace(network(), "kron").fit(task, prior=full)
    for options, what in (
        ({"prior_precision": 3.0}, "prior_precision=3.0"),
        ({"prior_precision": {"kernel": 1.0, "bias": 2.0}, "prior_groups": str}, "prior_precision=2 groups"),
        ({"prior_mean": 1.0}, "a prior_mean"),
    ):
        with pytest.raises(ValueError, match=f"must be the only prior; got {what}"):
            laplace(network(), "full", **options).fit(task, prior=full)
    wider = np.concatenate([task[0], task[0]], axis=1), task[1]
    with pytest.raises(ValueError, match=r"differ in 'kernel', which is of shape \(6, 2\) here.*shape \(3, 2\)"):
        laplace(network(6), "full").fit(wider, prior=full)
