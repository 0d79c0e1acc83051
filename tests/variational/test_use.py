"""A variational posterior is used as any other one: on disk, in predictions and curves, under `jit`, fitted again."""

import jax
import jax.numpy as jnp
import numpy as np
import problems
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace import Estimate, Laplace, LowerBound, Variational
from bnnlaplace.checkpoint import CheckpointError, load_pytree, save_pytree

KEY = jax.random.key(6)
STRUCTURES = ("full", "diag", "kron", "lanczos")
CHOSEN = Variational(num_samples=64, tolerance=0.2)


@pytest.fixture(scope="module")
def drawn():
    """In single precision, as by default."""
    return problems.drawn_labels(30, dtype=np.float32)


def fit(la, drawn, **options):
    return la.fit(drawn.data, key=KEY, num_probes=16, max_vectors=64, **{"approximation": CHOSEN, **options})


@pytest.fixture(scope="module", params=usual(["diag", "lanczos"], STRUCTURES))
def la(request, drawn):
    return fit(Laplace(drawn.network, hessian_structure=request.param), drawn)


def test_a_checkpoint_gives_the_same_answers(la, drawn, tmp_path):
    la.save(tmp_path / "posterior")
    again = Laplace.load(tmp_path / "posterior", drawn.network)
    bound = again.log_marginal_likelihood()
    assert type(bound) is LowerBound and bound == la.log_marginal_likelihood()
    assert again.fitted.bound == la.fitted.bound
    np.testing.assert_array_equal(again.predictive(drawn.inputs), la.predictive(drawn.inputs))


def test_it_predicts_with_every_link_and_samples(la, drawn):
    x = drawn.inputs[:4]
    count = 16 if la.hessian_structure == "lanczos" else 2000  # one sample a probe
    monte_carlo = la.predictive(x, link_approx="mc", key=KEY, num_samples=count)
    # A standard deviation of probabilities is below a half; the approximation of the link is good to a few hundredths.
    assert np.abs(la.predictive(x, link_approx="probit") - monte_carlo).max() < 0.05 + 4 * 0.5 / np.sqrt(count)
    with pytest.warns(UserWarning, match="the Laplace bridge is outside of its domain"):  # whatever the posterior is
        assert la.predictive(x, link_approx="bridge").shape == (4, 3)
    samples = la.sample(KEY, 16)
    assert samples["w1"].shape == (16, 4, 5)
    marginal, joint = (la.functional_posterior(x, joint=joint) for joint in (False, True))
    np.testing.assert_allclose(marginal.mean, joint.mean, atol=1e-5)
    within = np.einsum("ncnd->ncd", joint.covariance)
    if la.hessian_structure != "lanczos":  # where variances are those of the probes
        np.testing.assert_allclose(within, la.functional_variance(x), rtol=1e-3, atol=1e-4)
    # The mean of the outputs is that at m, and not that of the network which was linearised.
    np.testing.assert_allclose(marginal.mean, la.network(la.network.params, x), atol=1e-5)
    assert np.abs(marginal.mean - drawn.network(drawn.network.params, x)).max() > 0.1


def test_curves_and_counts(la, drawn):
    grid = [0.5, 1.0, 2.0]
    curve = la.evidence_curve(grid)
    np.testing.assert_allclose(curve.log_marginal_likelihood.sem[1], la.log_marginal_likelihood().sem, rtol=1e-3)
    np.testing.assert_allclose(curve.log_marginal_likelihood.mean[1], la.log_marginal_likelihood().mean, atol=1e-3)
    # Away from the precision of the fit it is extrapolated, and no bound.
    assert type(la.log_marginal_likelihood(1.0)) is LowerBound and type(la.log_marginal_likelihood(2.0)) is Estimate
    np.testing.assert_allclose(la.log_marginal_likelihood(2.0).mean, curve.log_marginal_likelihood.mean[2], atol=1e-3)
    assert 0 < la.effective_parameters() < 43
    link = {"link_approx": "mc", "key": KEY, "num_samples": 16}
    nll = la.validation_curve(*drawn.data, grid, **link).negative_log_likelihood[1]
    # Knowing the examples cannot make them less probable than before.
    assert nll < -la.log_marginal_likelihood().mean / len(drawn.labels)
    # The mean is where the bound is stationary: Newton's method has less than a tenth of the tolerance to gain.
    assert 0.5 * la.mode_decrement() < 0.1 * CHOSEN.tolerance


def test_it_crosses_jit(la, drawn):
    expected = la.predictive(drawn.inputs)
    np.testing.assert_allclose(jax.jit(lambda x: la.predictive(x))(drawn.inputs), expected, atol=1e-5)
    leaves, structure = jax.tree.flatten(la)
    again = jax.tree.unflatten(structure, leaves)
    assert again.log_marginal_likelihood() == la.log_marginal_likelihood()
    if la.hessian_structure != "lanczos":
        np.testing.assert_allclose(jax.jit(Laplace.predictive)(la, drawn.inputs), expected, atol=1e-4)


def test_fitting_the_result_again_takes_few_iterations_and_stays(la, drawn):
    settled = fit(la, drawn)
    progress = []
    again = fit(settled, drawn, approximation=Variational(num_samples=64, tolerance=0.2, on_iteration=progress.append))
    assert len(progress) <= 3
    change = again.log_marginal_likelihood().mean - settled.log_marginal_likelihood().mean
    assert abs(change) < CHOSEN.tolerance


@pytest.mark.parametrize("structure", usual(["lanczos"], ["full", "lanczos"]))
def test_single_precision_has_the_bound_of_double_precision(drawn, structure):
    single = fit(Laplace(drawn.network, hessian_structure=structure), drawn).log_marginal_likelihood()
    with jax.enable_x64(True):
        network = bnnlaplace.Network.from_function(
            problems.cases.two_layers, jax.tree.map(lambda leaf: jnp.asarray(leaf, float), drawn.network.params)
        )
        double = Laplace(network, hessian_structure=structure)
        bound = fit(double, drawn).log_marginal_likelihood()
    assert abs(bound.mean - single.mean) < CHOSEN.tolerance + 4 * np.hypot(bound.sem, single.sem)


# --- damaged checkpoints --------------------------------------------------------------------------------------------

DAMAGED = {
    "a field is missing": lambda bound: bound.pop("sem"),
    "a field too many": lambda bound: bound.update(more=np.float64(1)),
    "not a number": lambda bound: bound.update(expected_log_likelihood=np.float64(np.nan)),
    "an array": lambda bound: bound.update(expected_log_likelihood=np.ones(2)),
    "a negative error": lambda bound: bound.update(sem=np.float64(-1)),
    "no iterations": lambda bound: bound.update(iterations=np.int64(0)),
    "half an iteration": lambda bound: bound.update(iterations=np.float64(1.5)),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_bound_is_refused_in_one_sentence(drawn, damage, tmp_path, damaged_source):
    tree, metadata = load_pytree(damaged_source)
    DAMAGED[damage](tree["bound"])
    save_pytree(tmp_path / "forged", tree, metadata)
    with pytest.raises(CheckpointError) as caught:
        Laplace.load(tmp_path / "forged", drawn.network)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


@pytest.fixture(scope="module")
def damaged_source(drawn, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved") / "posterior"
    fit(Laplace(drawn.network, hessian_structure="diag"), drawn).save(path)
    return path
