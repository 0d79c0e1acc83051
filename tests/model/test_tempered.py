"""Likelihoods at a temperature: the posterior and evidence of examples that count 1 / T times; predictions."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import LIKELIHOODS, random_problem, usual

import bnnlaplace
from bnnlaplace import evidence

TEMPERATURE, PRECISION = 0.25, 0.7
OPTIONS = {"key": jax.random.key(0), "num_probes": 8, "max_vectors": 43, "microbatch": 3}
# The weights are random, so they are not at a mode.
pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("x64_module")]


@cache
def problem_of(name):
    make, targets = LIKELIHOODS[name]
    return random_problem(make(), targets(np.random.default_rng(3), 8))


def laplace(problem, likelihood, structure="full"):
    options = {"hessian_structure": structure, "prior_precision": PRECISION}
    return bnnlaplace.Laplace(problem.network, likelihood, **options)


def fitted(problem, structure="full"):
    """The posterior at the temperature, and the one of examples with the weight 1 / T."""
    cold = bnnlaplace.tempered(problem.likelihood, TEMPERATURE)
    data, weights = (problem.inputs, problem.targets), np.full(8, 1 / TEMPERATURE)
    weighted = laplace(problem, problem.likelihood, structure).fit((*data, weights), **OPTIONS)
    return laplace(problem, cold, structure).fit(data, **OPTIONS), weighted


def assert_same(found, expected, inputs):
    np.testing.assert_allclose(found.log_marginal_likelihood().mean, expected.log_marginal_likelihood().mean, rtol=1e-9)
    np.testing.assert_allclose(found.mode_gradient(), expected.mode_gradient(), atol=1e-9)
    for ours, theirs in zip(*(jax.tree.leaves(la.predictive(inputs)) for la in (found, expected)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "structure"),
    usual(
        [("classification", "lanczos"), ("regression", "full"), ("binary", "kron")],
        LIKELIHOODS,
        ("full", "diag", "kron", "lanczos"),
    ),
)
def test_examples_count_one_over_t_times(name, structure):
    problem = problem_of(name)
    cold, weighted = fitted(problem, structure)
    assert_same(cold, weighted, problem.inputs)
    plain = laplace(problem, problem.likelihood, structure).fit((problem.inputs, problem.targets), **OPTIONS)
    assert abs(plain.log_marginal_likelihood().mean - cold.log_marginal_likelihood().mean) > 1


@pytest.mark.parametrize("name", usual(["classification"], LIKELIHOODS))
def test_the_evidence_is_that_of_the_divided_matrix(name):
    problem = problem_of(name)
    # In NumPy, from the matrix without a temperature.
    cold, _ = fitted(problem)
    outputs = problem.network(problem.network.params, problem.inputs)
    log_likelihood = float(problem.likelihood.log_prob(outputs, jnp.asarray(problem.targets)).sum()) / TEMPERATURE
    squared_norm = sum(float(np.sum(np.asarray(leaf) ** 2)) for leaf in jax.tree.leaves(problem.network.params))
    determinant = np.linalg.slogdet(np.eye(43) + problem.ggn / TEMPERATURE / PRECISION)[1]
    expected = log_likelihood - 0.5 * PRECISION * squared_norm - 0.5 * determinant
    assert cold.log_marginal_likelihood().mean == pytest.approx(expected, rel=1e-10)
    options = {"network": problem.network, "likelihood": cold.likelihood, "num_matvecs": 25, "microbatch": 8}
    for side, length in (("primal", 43), ("dual", 24)):
        probes = jnp.sqrt(length) * jnp.eye(length)
        options |= {"num_matvecs": min(25, length), "side": side, "probe_batch_size": length}
        arguments = PRECISION, (problem.inputs, problem.targets), probes
        run = jax.jit(lambda params, a=arguments, o=options: evidence.log_marginal_likelihood(params, *a, **o))
        found = run(problem.network.params)
        assert found.mean == pytest.approx(expected, rel=1e-8)


def test_the_noise_of_a_regression_keeps_the_temperature():
    problem = random_problem(bnnlaplace.gaussian(0.4), np.random.default_rng(5).normal(size=(8, 3)))
    cold, weighted = fitted(problem)
    for change in (
        lambda la: la.with_sigma_noise(0.9),
        lambda la: la.optimize_prior_precision(optimize_sigma_noise=True),
    ):
        ours, theirs = change(cold), change(weighted)
        assert float(ours.likelihood.temperature) == TEMPERATURE
        assert float(ours.sigma_noise) == pytest.approx(float(theirs.sigma_noise), rel=1e-6)
        np.testing.assert_allclose(
            ours.log_marginal_likelihood().mean, theirs.log_marginal_likelihood().mean, rtol=1e-7
        )
    again = laplace(problem, bnnlaplace.tempered(bnnlaplace.gaussian(0.9), TEMPERATURE))
    again = again.fit((problem.inputs, problem.targets))
    assert_same(cold.with_sigma_noise(0.9), again, problem.inputs)
    found, expected = (la.predictive(problem.inputs, with_noise=True)[1] for la in (cold, weighted))
    np.testing.assert_allclose(found, expected, rtol=1e-8)  # the noise itself has no temperature


@pytest.mark.parametrize("name", usual(["regression"], LIKELIHOODS))
def test_saved_posteriors_keep_the_temperature(name, tmp_path):
    problem = problem_of(name)
    cold, _ = fitted(problem, "diag")
    cold.save(tmp_path / "la")
    loaded = bnnlaplace.Laplace.load(tmp_path / "la", problem.network)
    assert float(loaded.likelihood.temperature) == TEMPERATURE
    assert_same(loaded, cold, problem.inputs)
    assert_same(loaded.fit((problem.inputs, problem.targets)), cold, problem.inputs)


def test_temperatures_multiply_and_options_stay():
    twice = bnnlaplace.tempered(bnnlaplace.tempered(bnnlaplace.categorical(-100), 0.5), 3.0)
    assert float(twice.temperature) == 1.5 and twice.ignore_index == -100
    f, labels = jnp.array([[0.5, -1.2, 2.0]] * 2), jnp.array([1, -100])
    expected = bnnlaplace.categorical(-100).log_prob(f, labels) / 1.5
    np.testing.assert_allclose(twice.log_prob(f, labels), expected, rtol=1e-12)
    np.testing.assert_allclose(twice.mean(f), jax.nn.softmax(f), rtol=1e-12)
    assert bnnlaplace.categorical().temperature == 1.0


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf, "cold", None, [1.0, 2.0]])
def test_temperatures_that_cannot_be_used(value):
    with pytest.raises(ValueError, match=r"tempered\(temperature=...\) must be"):
        bnnlaplace.tempered(bnnlaplace.categorical(), value)
    with pytest.raises(TypeError, match="must be a Likelihood"):
        bnnlaplace.tempered("classification", 0.5)
