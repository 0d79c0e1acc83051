"""Weights of examples: the posterior and evidence of data in which an example counts as many times as its weight."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import LIKELIHOODS, random_problem, two_layers, usual

import bnnlaplace
from bnnlaplace import curvature, evidence

STRUCTURES = ["full", "diag", "kron", "lanczos"]
COUNTS = np.array([2, 0, 1, 3, 0, 1, 1, 2])
WEIGHTS = np.array([0.4, 1.7, 0.0, 2.5, 1.0, 0.3, 0.0, 3.1])
PRECISION = 0.7
OPTIONS = {"key": jax.random.key(0), "num_probes": 8, "max_vectors": 43, "tolerance": 1e-9, "microbatch": 3}


pytestmark = pytest.mark.usefixtures("x64_module")


@cache
def problem_of(name):
    make, targets = LIKELIHOODS[name]
    return random_problem(make(), targets(np.random.default_rng(3), len(COUNTS)))


def laplace(problem, structure):
    options = {"hessian_structure": structure, "prior_precision": PRECISION}
    return bnnlaplace.Laplace(problem.network, problem.likelihood, **options)


def assert_same(found, expected, problem):
    np.testing.assert_allclose(found.log_marginal_likelihood().mean, expected.log_marginal_likelihood().mean, rtol=1e-9)
    np.testing.assert_allclose(found.mode_gradient(), expected.mode_gradient(), atol=1e-9)
    variances = (la.functional_variance(problem.inputs) for la in (found, expected))
    np.testing.assert_allclose(*variances, rtol=1e-6, atol=1e-9)


@cache
def weighted(name, structure):
    """Fitted with integer weights."""
    problem = problem_of(name)
    return laplace(problem, structure).fit((problem.inputs, problem.targets, COUNTS), **OPTIONS)


@pytest.mark.filterwarnings("ignore")  # the weights are random, so they are not at a mode
@pytest.mark.parametrize(
    ("name", "structure"),
    usual([("classification", "lanczos"), ("regression", "full"), ("binary", "kron")], LIKELIHOODS, STRUCTURES),
)
def test_integer_weights_are_repeated_rows(name, structure):
    problem = problem_of(name)
    repeated = laplace(problem, structure).fit(
        (np.repeat(problem.inputs, COUNTS, axis=0), np.repeat(problem.targets, COUNTS, axis=0)), **OPTIONS
    )
    assert_same(weighted(name, structure), repeated, problem)
    unweighted = laplace(problem, structure).fit((problem.inputs, problem.targets), **OPTIONS)
    difference = unweighted.log_marginal_likelihood().mean - repeated.log_marginal_likelihood().mean
    assert abs(difference) > 0.01  # what the weights are for


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "structure"),
    usual([("classification", "lanczos"), ("regression", "full"), ("binary", "diag")], LIKELIHOODS, STRUCTURES),
)
def test_batches_have_weights_and_absent_examples_are_not_read(name, structure):
    problem = problem_of(name)
    inputs, targets = problem.inputs.copy(), problem.targets.copy()
    inputs[COUNTS == 0] = np.nan
    if targets.dtype == float:
        targets[COUNTS == 0] = np.nan
    order = np.array([1, 4, 0, 2, 3, 5, 6, 7])  # the first batch is absent as a whole
    batches = [(inputs[rows], targets[rows], COUNTS[rows]) for rows in np.split(order, [2, 6])]
    assert_same(laplace(problem, structure).fit(batches, **OPTIONS), weighted(name, structure), problem)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LIKELIHOODS)
def test_the_evidence_is_that_of_the_weighted_matrix(name):
    problem = problem_of(name)
    la = laplace(problem, "full").fit((problem.inputs, problem.targets, WEIGHTS), microbatch=3)
    assert la.log_marginal_likelihood().mean == pytest.approx(expected_evidence(problem, WEIGHTS), rel=1e-10)


def expected_evidence(problem, weights):
    """The evidence by NumPy alone, but for log p(y | f)."""
    params = {name: np.asarray(leaf) for name, leaf in problem.network.params.items()}
    outputs = np.asarray(two_layers(params, problem.inputs))
    curvatures = weights[:, None, None] * oracles.output_curvature(problem.likelihood, outputs)
    ggn = oracles.ggn(oracles.two_layers_jacobian(params, problem.inputs), curvatures)
    log_likelihood = weights @ np.asarray(problem.likelihood.log_prob(outputs, jnp.asarray(problem.targets)))
    squared_norm = sum(np.sum(leaf**2) for leaf in params.values())
    determinant = np.linalg.slogdet(np.eye(len(ggn)) + ggn / PRECISION)[1]
    return log_likelihood - 0.5 * PRECISION * squared_norm - 0.5 * determinant


SIDES = "primal", "dual"


@pytest.mark.parametrize(("name", "side"), usual([("regression", "primal"), ("binary", "dual")], LIKELIHOODS, SIDES))
def test_both_sides_of_the_traceable_evidence(name, side):
    problem = problem_of(name)
    length = {"primal": 43, "dual": 3 * 9}[side]  # three microbatches of three examples and three outputs
    options = {"network": problem.network, "likelihood": problem.likelihood, "num_matvecs": 25, "microbatch": 3}
    batch, probes = (problem.inputs, problem.targets, WEIGHTS), jnp.sqrt(length) * jnp.eye(length)
    found = evidence.log_marginal_likelihood(
        problem.network.params, PRECISION, batch, probes, side=side, probe_batch_size=length, **options
    )
    assert found.mean == pytest.approx(expected_evidence(problem, WEIGHTS), rel=1e-8)
    again = evidence.isotropic(problem.network.params, batch, probes, side=side, probe_batch_size=length, **options)
    assert again(PRECISION).mean == pytest.approx(float(found.mean), rel=1e-8)


@pytest.mark.parametrize(
    ("name", "side"), usual([("classification", "dual"), ("regression", "primal")], LIKELIHOODS, SIDES)
)
def test_both_sides_of_the_streamed_operator(name, side):
    problem = problem_of(name)
    batches = [(problem.inputs[rows], problem.targets[rows], WEIGHTS[rows]) for rows in (slice(5), slice(5, 8))]
    operator = curvature.streamed_operator(
        problem.network, problem.likelihood, batches, side=side, prior_precision=PRECISION, microbatch=3
    )
    matrix = np.asarray(operator.matvec(jnp.eye(operator.size)))
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-10)
    data = problem.inputs, problem.targets, WEIGHTS
    determinant = laplace(problem, "full").fit(data).structure.log_determinant(PRECISION)
    np.testing.assert_allclose(np.linalg.slogdet(np.eye(len(matrix)) + matrix)[1], determinant[0], rtol=1e-9)


def test_the_best_noise_counts_the_weights():
    problem = random_problem(bnnlaplace.gaussian(0.4), np.random.default_rng(5).normal(size=(8, 3)))
    repeated = np.repeat(problem.inputs, COUNTS, axis=0), np.repeat(problem.targets, COUNTS, axis=0)
    noises = []
    for data in (repeated, (problem.inputs, problem.targets, COUNTS)):
        la = laplace(problem, "full").fit(data, num_data=20)
        noises.append(float(la.optimize_prior_precision(optimize_sigma_noise=True).sigma_noise))
    assert noises[0] == pytest.approx(noises[1], rel=1e-6)


@pytest.mark.usefixtures("unchecked_annotations")
@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (-np.ones(8), "at least 0; got numbers from -1"),
        (np.full(8, np.nan), "must be finite"),
        (np.full(8, np.inf), "must be finite"),
        (np.ones(7), r"of shape \(8,\), one for each example"),
        (np.ones((8, 1)), r"of shape \(8,\), one for each example"),
        (np.ones(8) * 1j, "real numbers"),
        (np.zeros(8), "or all weights are 0"),
        (["a"] * 8, "must be numbers"),
    ],
)
def test_weights_that_cannot_be_used(weights, message):
    problem = random_problem(bnnlaplace.categorical(), np.arange(8) % 3)
    with pytest.raises(ValueError, match=message):
        laplace(problem, "diag").fit([(problem.inputs, problem.targets, weights)])
