"""How the iteration goes on where a step was too long, and when it may end."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace import Laplace, Likelihood, Variational
from bnnlaplace.variational import iteration

KEY = jax.random.key(1)
DRAWN = problems.drawn_labels(40, dtype=np.float32)
# Six times the weights that made the labels, under hardly any prior: each full step of the sites goes too far.
SHARP = bnnlaplace.Network.from_function(
    problems.cases.two_layers, jax.tree.map(lambda leaf: 6 * leaf, DRAWN.network.params)
)


def fit(la, progress, **options):
    chosen = Variational(on_iteration=progress.append, **options)
    return la.fit(DRAWN.data, key=KEY, approximation=chosen)


def sharp():
    return Laplace(SHARP, hessian_structure="full", prior_precision=1e-3)


@pytest.fixture(scope="module")
def settled():
    """A fit that has converged to a fifth of the usual tolerance."""
    return fit(sharp(), [], tolerance=0.1, max_iterations=60)


@pytest.mark.parametrize("first_iterations", [3, 4])
@pytest.mark.filterwarnings("ignore:the variational posterior has not converged")
def test_a_fit_that_goes_on_shortens_steps_that_lower_the_bound(settled, first_iterations):
    """The sites of a fitted posterior are not known, so that its first step can only be a whole one."""
    progress = []
    again = fit(fit(sharp(), [], max_iterations=first_iterations), progress)
    bounds = [step.elbo for step in progress]
    assert progress[1].damping == 1
    assert min(np.diff(bounds)) < 0, "no step went too far: another problem is needed"
    expected, found = settled.log_marginal_likelihood(), again.log_marginal_likelihood()
    assert found.mean > expected.mean - 1 - 4 * np.hypot(found.sem, expected.sem)


def test_a_small_change_is_not_enough_to_end(settled, monkeypatch):
    """It may lead from one side of the maximum to the other: the next step must promise little, too."""
    promises = iter([100.0, 0.0])
    monkeypatch.setattr(iteration, "promised_gain", lambda *_, **__: next(promises))
    progress = []
    fit(settled.with_prior_precision(1.0), progress)
    changes = np.abs(np.diff([step.elbo for step in progress]))
    assert changes[-1] < Variational().tolerance and next(promises, None) is None


@pytest.mark.filterwarnings("ignore:the variational posterior")  # it is stopped
def test_a_mean_that_has_not_settled_warns():
    with pytest.warns(UserWarning, match=r"has not settled in 1 Newton steps; raise .*max_newton_steps"):
        fit(sharp(), [], max_newton_steps=1, max_iterations=2)


@pytest.mark.filterwarnings("ignore:the variational posterior")  # it need not converge
def test_a_mean_that_is_fitted_to_its_samples_warns():
    """It does well at those of the fit and not at others: a bound that is lower, and sites that lead elsewhere."""
    rng = np.random.default_rng(0)
    data = rng.normal(size=(64, 96)).astype(np.float32), rng.integers(3, size=64)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.asarray(rng.normal(size=(96, 3)), np.float32))
    la, progress = Laplace(network, hessian_structure="full", prior_precision=0.1), []
    chosen = Variational(num_samples=16, max_iterations=4, on_iteration=progress.append)
    with pytest.warns(UserWarning, match=r"fitted to its 16 samples .* lower by .*num_samples=64"):
        few = la.fit(data, key=KEY, approximation=chosen)
    bound = few.log_marginal_likelihood()
    assert bound.mean < max(step.elbo for step in progress) - 3 * bound.sem
    many = la.fit(data, key=KEY, approximation=Variational(max_iterations=4))  # and does not warn
    assert many.log_marginal_likelihood().mean > bound.mean + 3 * bound.sem


def fitted(la, data, **options):
    return la.fit(data, key=KEY, approximation=Variational(num_samples=128, **options))


@pytest.fixture(scope="module")
def scaled():
    """Three separable classes, and weights of a scale that evidence and bound have no reason to keep."""
    rng = np.random.default_rng(0)
    inputs, truth = (rng.normal(size=(40, 20)) + 1).astype(np.float32), rng.normal(size=(20, 3)).astype(np.float32)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.asarray(5 * truth))
    data = inputs, np.argmax(inputs @ truth, axis=1)
    start = fitted(Laplace(network, hessian_structure="full", prior_precision=3.0), data)
    return network, data, start.log_marginal_likelihood().mean


@pytest.mark.parametrize("way", ["along", "between fits"])
@pytest.mark.parametrize("start", usual([0.03], [0.03, 1.0, 100.0]))
def test_the_prior_is_that_of_the_largest_bound_wherever_it_begins(scaled, way, start):
    """The norm of the mean falls as its precision rises: one step of the fixed point goes a tenth of the way.

    The maximum is near 3; at .03 the bound is six nats below it.
    """
    network, data, largest = scaled
    la = Laplace(network, hessian_structure="full", prior_precision=start)
    if way == "along":
        la = fitted(la, data, prior_structure="scalar")
    else:
        la = fitted(la, data).optimize_prior_precision(refit=lambda la: fitted(la, data))
    assert la.log_marginal_likelihood().mean > largest - Variational().tolerance


def poisson(prior_precision):
    """Counts whose rates are tiny at the weights and overflow at samples of a wide posterior."""

    def log_prob(outputs, targets):
        return jnp.sum(targets * outputs - jnp.exp(outputs) - jax.scipy.special.gammaln(targets + 1), axis=-1)

    likelihood = Likelihood("poisson", "array", log_prob, lambda f, u: jnp.exp(f / 2) * u, mean=jnp.exp)
    rng = np.random.default_rng(0)
    inputs = np.concatenate([rng.normal(size=(12, 20)), np.ones((12, 1))], axis=1).astype(np.float32)
    counts = (np.arange(12)[:, None] < 2).astype(np.float32)
    weights = jnp.zeros((21, 1)).at[-1].set(-8.0)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, weights)
    return Laplace(network, likelihood, hessian_structure="full", prior_precision=prior_precision), (inputs, counts)


def test_samples_that_overflow_are_drawn_nearer_to_the_mean():
    la, data = poisson(1e-2)
    progress = []
    chosen = Variational(on_iteration=progress.append, max_iterations=12)
    with pytest.warns(UserWarning, match="has not converged in 12 iterations"):
        fitted = la.fit(data, key=KEY, approximation=chosen)
    bounds = np.array([step.elbo for step in progress])
    assert bounds[0] == -np.inf and np.isfinite(bounds).any()
    assert np.isfinite(fitted.log_marginal_likelihood().mean)
    assert np.isfinite(fitted.predictive(data[0], link_approx="mc", key=KEY)).all()


def test_a_bound_that_is_finite_nowhere_is_an_error():
    la, data = poisson(1e-2)
    with pytest.raises(ValueError, match="finite evidence lower bound.*'poisson' is not finite"):
        la.fit(data, key=KEY, approximation=Variational(max_iterations=1))


@pytest.mark.filterwarnings("ignore:the variational posterior was stopped after one iteration")
def test_the_stated_precision_is_that_of_the_posterior_from_the_first_iteration():
    """One precision for each weight becomes one for each layer before anything is fitted."""
    unequal = jax.tree.map(lambda leaf: np.linspace(0.1, 10, leaf.size).reshape(leaf.shape), DRAWN.network.params)
    la = Laplace(DRAWN.network, hessian_structure="full", prior_precision=unequal)
    chosen = Variational(prior_structure="layerwise", max_iterations=1)
    la = la.fit(DRAWN.data, key=KEY, approximation=chosen)
    np.testing.assert_allclose(
        la.log_marginal_likelihood(la.prior_precision).mean, la.log_marginal_likelihood().mean, atol=1e-3
    )
