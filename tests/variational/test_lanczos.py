""" "lanczos" gives the bound and the predictions of "full", within standard errors of its probes."""

import warnings

import jax
import numpy as np
import problems
import pytest
from cases import usual

from bnnlaplace import Laplace, Variational
from bnnlaplace.structure import KrylovStructure

SEEDS = (1, 2, 3)
CHOSEN = Variational(num_samples=512, tolerance=0.05, max_iterations=40)
MODELS = {
    "all weights": {},
    "last layer": {"subset_of_weights": "last_layer"},
    "predicate": {"subset_of_weights": lambda path: path.startswith("w")},
    "layerwise": {"prior_precision": {"w1": 2.0, "b1": 0.5, "w2": 1.0, "b2": 4.0}, "prior_mean": 0.3},
    "per weight": {"prior_precision": np.random.default_rng(5).uniform(0.5, 2, size=43)},
}


@pytest.fixture(scope="module")
def drawn(x64_module):
    return problems.drawn_labels()


@pytest.mark.parametrize("model", usual(["layerwise"], MODELS))
def test_bound_and_predictions_are_those_of_full(drawn, model):
    num_probes = 12 if model == "last layer" else 32  # fewer than there are weights: the structure stays a Krylov one
    at = np.random.default_rng(7).normal(size=(5, 4))

    def fitted(structure, seed):
        la = Laplace(drawn.network, hessian_structure=structure, **MODELS[model])
        krylov = {"num_probes": num_probes, "max_vectors": 64}
        return la.fit(drawn.data, key=jax.random.key(seed), approximation=CHOSEN, **krylov)

    def mean_and_variance(la):
        variance = np.einsum("ncc->nc", la.functional_variance(at))
        return np.asarray(la.network(la.network.params, at)), variance

    full = fitted("full", 0)
    exact, (mean, variance) = full.log_marginal_likelihood(), mean_and_variance(full)
    for seed in SEEDS:
        la = fitted("lanczos", seed)
        assert isinstance(la.structure, KrylovStructure)
        bound = la.log_marginal_likelihood()
        assert abs(bound.mean - exact.mean) < 4 * np.hypot(bound.sem, exact.sem), (seed, bound, exact)
        found, spread = mean_and_variance(la)
        # The relative standard error of a variance from S normal samples is sqrt(2 / S), that of a mean sqrt(1 / S).
        assert (np.abs(spread / variance - 1) < 4 * np.sqrt(2 / num_probes)).all(), seed
        assert (np.abs(found - mean) < 4 * np.sqrt(variance / num_probes)).all(), seed


def test_no_prior_precision_is_chosen_at_which_the_vectors_have_not_converged(x64_module):
    # Enough vectors choose a precision far below the one that eight of them have converged at.
    drawn = problems.drawn_labels(count=60)

    def chosen(max_vectors):
        la = Laplace(drawn.network, hessian_structure="lanczos", prior_precision=30.0)
        options = Variational(num_samples=128, prior_structure="scalar", max_iterations=30)
        krylov = {"num_probes": 4, "max_vectors": max_vectors}
        return la.fit(drawn.data, key=jax.random.key(1), approximation=options, **krylov)

    free = chosen(40)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        held = chosen(8)
    assert any("the lower bound prefers a smaller prior precision" in str(warning.message) for warning in said)
    precision = float(held.prior.precision)
    assert held.structure.reservation(precision) is None
    assert float(free.prior.precision) < precision / 3
    assert held.structure.reservation(float(free.prior.precision)) is not None
