"""The linearised network at its own mode, the warning if weights are not at a mode, and the memory estimate."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import random_problem, two_layers, usual

import bnnlaplace
from bnnlaplace import NotAModeWarning
from bnnlaplace.core import memory
from bnnlaplace.core.tree import ravel

STRUCTURES = ["full", "diag", "kron", "lanczos"]
PRECISION = {"b1": 0.3, "b2": 2.0, "w1": 0.7, "w2": 5.0}
DELTA = np.repeat(list(PRECISION.values()), [5, 3, 20, 15])
OPTIONS = {"key": jax.random.key(0), "num_probes": 8, "microbatch": 3}


@pytest.fixture(scope="module")
def problem():
    with jax.enable_x64(True):
        yield random_problem(bnnlaplace.categorical(), np.random.default_rng(1).integers(0, 3, size=11))


@pytest.fixture(scope="module")
def linear(problem):
    """Newton's method on a dense problem: the mode, the outputs there and the GGN."""
    start = ravel(problem.network.params)
    jacobian = np.asarray(oracles.jacobian(problem.network, problem.network.params, problem.inputs))
    outputs = np.asarray(problem.network(problem.network.params, problem.inputs))
    mean = 0.1
    theta = np.asarray(start)
    for _ in range(60):
        f = outputs + jacobian @ (theta - start)
        p = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
        residual = np.eye(3)[problem.targets] - p
        gradient = np.einsum("ncp,nc->p", jacobian, residual) - DELTA * (theta - mean)
        curved = np.einsum("nc,cd->ncd", p, np.eye(3)) - np.einsum("nc,nd->ncd", p, p)
        ggn = np.einsum("ncp,ncd,ndq->pq", jacobian, curved, jacobian)
        theta = theta + 0.5 * np.linalg.solve(ggn + np.diag(DELTA), gradient)
    log_prob = np.log(p[np.arange(11), problem.targets]).sum()
    deviation = theta - mean
    evidence = log_prob - 0.5 * deviation @ (DELTA * deviation)
    return theta, f, evidence - 0.5 * np.linalg.slogdet(np.eye(43) + ggn / DELTA)[1]


def fitted(problem, structure, **options):
    la = bnnlaplace.Laplace(problem.network, hessian_structure=structure, prior_precision=PRECISION, prior_mean=0.1)
    return la.fit((problem.inputs, problem.targets), mean="linear", **OPTIONS, **options)


@pytest.mark.parametrize("structure", usual(["full", "lanczos"], STRUCTURES))
def test_mode_and_evidence_of_the_linearised_network(problem, linear, structure, tmp_path):
    theta, outputs, evidence = linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        la = fitted(problem, structure)
    assert la.network.is_linearised
    np.testing.assert_allclose(ravel(la.network.params), theta, atol=1e-3)
    np.testing.assert_allclose(la.network(la.network.params, problem.inputs), outputs, atol=1e-3)
    assert la.mode_decrement() < 1e-2
    if structure in ("full", "lanczos"):
        np.testing.assert_allclose(la.log_marginal_likelihood().mean, evidence, atol=1e-2)
    # Further from the mode the evidence is lower, whatever weights the network had.
    again = la.fit((problem.inputs, problem.targets), mean="linear", **OPTIONS)
    np.testing.assert_allclose(ravel(again.network.params), theta, atol=1e-3)
    la.save(tmp_path / "la")
    loaded = bnnlaplace.Laplace.load(tmp_path / "la", problem.network)
    np.testing.assert_allclose(loaded.predictive(problem.inputs), la.predictive(problem.inputs), rtol=1e-9)
    assert jax.tree.structure(la.network.full_params(la.network.params)) == jax.tree.structure(problem.network.params)


def test_linear_mode_of_the_last_layer_is_that_of_the_network(problem):
    """A network is linear in its last layer: nothing changes but the weights."""
    options = {"subset_of_weights": lambda path: path in ("w2", "b2"), "hessian_structure": "full"}
    la = bnnlaplace.Laplace(problem.network, **options).fit((problem.inputs, problem.targets), mean="linear", **OPTIONS)
    params = la.network.full_params(la.network.params)
    outputs = two_layers(params, problem.inputs)
    np.testing.assert_allclose(la.network(la.network.params, problem.inputs), outputs, rtol=1e-9)

    def joint(head):
        log_prob = problem.likelihood.log_prob(two_layers({**params, **head}, problem.inputs), problem.targets)
        return log_prob.sum() - 0.5 * sum(jnp.sum(leaf**2) for leaf in head.values())

    gradient = jax.grad(joint)({name: params[name] for name in ("w2", "b2")})
    assert max(abs(leaf).max() for leaf in gradient.values()) < 0.05


def test_streamed_and_in_single_precision(problem, linear):
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), problem.network.params)
    x = problem.inputs.astype(np.float32)
    la = bnnlaplace.Laplace(
        problem.network.with_params(params), hessian_structure="full", prior_precision=PRECISION, prior_mean=0.1
    )
    la = la.fit([(x[:6], problem.targets[:6]), (x[6:], problem.targets[6:])], mean="linear", **OPTIONS)
    np.testing.assert_allclose(ravel(la.network.params), linear[0], atol=5e-3)


def test_weights_that_are_no_mode_are_named_with_their_distance(problem):
    la = bnnlaplace.Laplace(problem.network, hessian_structure="full")
    with pytest.warns(
        NotAModeWarning, match=r"not at a mode of the log joint for prior precision 1: .*nats and move .*mean='lin"
    ):
        la = la.fit((problem.inputs, problem.targets))
    assert la.mode_decrement() > 0.25 * la.effective_parameters()


def test_bad_mean(problem, unchecked_annotations):
    with pytest.raises(ValueError, match=r"fit\(mean=\.\.\.\) must be 'network' or 'linear'; got 'map'"):
        bnnlaplace.Laplace(problem.network).fit((problem.inputs, problem.targets), mean="map", **OPTIONS)


def test_memory_of_features_is_counted(problem):
    """The only weight with a posterior is a temperature; the features are the three outputs before it."""
    network = bnnlaplace.Network.from_function(
        lambda w, x: w["scale"] * problem.network(w["network"], x),
        {"scale": np.ones(1), "network": problem.network.params},
    )
    count = len(problem.inputs)
    for structure, fixed in (("diag", 2 * 8), ("lanczos", 2 * 8 * 20)):
        la = bnnlaplace.Laplace(
            network, hessian_structure=structure, subset_of_weights=lambda path: path.startswith("scale")
        )
        data = problem.inputs, problem.targets
        assert la.memory_estimate(data, max_vectors=20).needed == fixed + 8 * 3 * count
        batches = [(problem.inputs[:1], problem.targets[:1]), (problem.inputs[1:2], problem.targets[1:2])]
        assert la.memory_estimate(batches, max_vectors=20).needed == fixed  # however many follow the first one


@pytest.mark.parametrize("structure", STRUCTURES)
def test_memory_is_known_beforehand(problem, structure, monkeypatch):
    la = bnnlaplace.Laplace(problem.network, hessian_structure=structure)
    data = (problem.inputs, problem.targets)
    found = la.memory_estimate(data, max_vectors=20)
    largest = {"full": 43 * 43, "diag": 43, "kron": 4**2 + 5**2 + 5**2 + 3**2, "lanczos": 43 * 20}[structure]
    assert 8 * largest <= found.needed <= 6 * 8 * largest
    assert found.free is None or found.free > 2**20
    monkeypatch.setattr(memory, "free_bytes", lambda: 300)
    assert la.memory_estimate(data).free == 300
    hint = "max_vectors" if structure == "lanczos" else "subset_of_weights"
    with pytest.raises(MemoryError, match=f"needs about .* of memory and 300 bytes are free; .*{hint}"):
        la.fit(data, **OPTIONS)


def test_memory_in_words():
    assert [memory.in_words(n) for n in (12, 1500, 2.5e9, 3e15)] == ["12 bytes", "1.5 kB", "2.5 GB", "3e+03 TB"]
