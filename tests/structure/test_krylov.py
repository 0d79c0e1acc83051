"""Krylov structures: evidence and samples against the dense posterior, and what truncation costs."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from cases import usual

import bnnlaplace
from bnnlaplace import krylov, prior
from bnnlaplace.core.tree import squared_norm
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.model import batched as forward
from bnnlaplace.structure import KrylovStructure


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


@pytest.mark.parametrize("seed", usual([1], [1, 2, 3]))
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
    assert probes_only.prior_precision == pytest.approx(found.prior_precision, rel=1e-5)  # of another range
    assert exact < probes_only.low


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


def test_more_samples_than_probes(lanczos):
    with pytest.raises(ValueError, match="num_samples must be at most 32; got 33; fit with num_probes=33"):
        lanczos.sample(jax.random.key(0), 33)
