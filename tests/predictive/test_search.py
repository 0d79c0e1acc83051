"""The search of the validation NLL from coarse to fine, on curves that are known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import exhaustive

import bnnlaplace
from bnnlaplace.predictive import ValidationCurve, search, searched_curves, validation_curves

RNG = np.random.default_rng(0)
GRID = np.geomspace(1e-2, 1e5, 29)


def curve_of(nll, converged, calls):
    def at(some):
        chosen = np.searchsorted(GRID, some)
        calls.extend(chosen)
        return ValidationCurve(some, nll[chosen], nll[chosen] / 2, converged[chosen])

    return at


@pytest.mark.parametrize("best", range(29))
def test_the_search_finds_the_minimum_of_the_grid_with_few_points(best):
    calls = []
    nll = np.log(np.abs(np.arange(29) - best + 0.1) + 1)
    found = search.coarse_to_fine(curve_of(nll, np.ones(29, bool), calls), GRID)
    assert found.best_precision == GRID[best]
    assert len(calls) == len(set(calls)) <= search.COARSE + search.FINER + search.FINEST
    tried = np.isin(np.arange(29), calls)
    np.testing.assert_array_equal(np.isnan(found.negative_log_likelihood), ~tried)
    np.testing.assert_array_equal(found.expected_calibration_error[tried], nll[tried] / 2)


def test_the_search_passes_over_what_has_not_converged():
    """The lowest scores are those of samples that have not converged."""
    nll, converged = np.abs(np.arange(29) - 20.0), np.arange(29) >= 15
    nll[:15] -= 100
    assert search.coarse_to_fine(curve_of(nll, converged, []), GRID).best_precision == GRID[20]


def test_the_whole_grid_is_evaluated_if_nothing_coarse_can_be_chosen():
    calls, nll = [], np.full(29, np.nan)
    nll[3] = 1.0
    assert search.coarse_to_fine(curve_of(nll, np.ones(29, bool), calls), GRID).best_precision == GRID[3]
    assert sorted(calls) == list(range(29))


@pytest.mark.filterwarnings("ignore:the Krylov decomposition has not converged")
@pytest.mark.parametrize(("vectors", "number"), [(40, 12), exhaustive(24, 29)])
def test_only_a_basis_larger_than_all_samples_of_a_search_is_searched(x64, vectors, number):
    """Two samples at twelve precisions are fewer than 40 vectors; 24 vectors serve the whole grid."""
    network = bnnlaplace.Network.from_function(lambda w, x: jnp.tanh(x @ w), jnp.asarray(RNG.normal(size=(20, 6))))
    x, y = RNG.normal(size=(40, 20)), RNG.integers(6, size=40)
    options = {"link_approx": "mc", "key": jax.random.key(1), "num_samples": 2}
    la = bnnlaplace.Laplace(network).fit(
        (x, y), key=jax.random.key(0), num_probes=2, max_vectors=vectors, tolerance=1e-9
    )
    (found,) = searched_curves([la.fitted], (x, y), GRID, **options)
    (expected,) = validation_curves([la.fitted], (x, y), GRID, **options)
    known = ~np.isnan(found.negative_log_likelihood)
    assert known.sum() <= number if number == 12 else known.all()
    for scores, all_scores in zip(found[1:3], expected[1:3], strict=True):
        np.testing.assert_allclose(scores[known], all_scores[known], rtol=1e-6)
    np.testing.assert_array_equal(found.converged, expected.converged)
