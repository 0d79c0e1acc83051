"""How the data are handed over does not matter: batches, weights, repetitions, parts of a larger set."""

import jax
import numpy as np
import problems
import pytest
from cases import usual

from bnnlaplace import Laplace, Variational

KEY = jax.random.key(4)
CHOSEN = Variational(num_samples=512, tolerance=1e-2, max_iterations=40)


@pytest.fixture(scope="module")
def drawn(x64_module):
    return problems.drawn_labels(20)


def fitted(drawn, data, structure="lanczos", **options):
    la = Laplace(drawn.network, hessian_structure=structure)
    return la.fit(data, key=KEY, num_probes=8, max_vectors=43, approximation=CHOSEN, **options)


def assert_equal(one, other):
    """Within errors: examples have noise of their own, by their batch and place."""
    one, other = (la.log_marginal_likelihood() for la in (one, other))
    assert abs(one.mean - other.mean) < 4 * np.hypot(one.sem, other.sem)


@pytest.fixture(scope="module")
def whole(drawn):
    return fitted(drawn, drawn.data)


@pytest.mark.parametrize("structure", usual(["full"], ["lanczos", "full"]))
def test_arrays_are_batches_of_two_sizes(drawn, structure):
    """The last batch is padded to the length of the others."""
    x, y = drawn.data
    batches = [(x[start : start + 8], y[start : start + 8]) for start in (0, 8, 16)]
    assert_equal(fitted(drawn, batches, structure), fitted(drawn, drawn.data, structure))


def test_weights_repetitions_and_num_data_count_alike(drawn, whole):
    x, y = drawn.data
    weights = np.where(np.arange(20) < 5, 2.0, 1.0)
    repeated = fitted(drawn, (np.concatenate([x, x[:5]]), np.concatenate([y, y[:5]])))
    assert_equal(fitted(drawn, (x, y, weights)), repeated)
    twice = fitted(drawn, (x, y, np.full(20, 2.0)))
    assert_equal(fitted(drawn, drawn.data, num_data=40), twice)
    assert abs(twice.log_marginal_likelihood().mean - whole.log_marginal_likelihood().mean) > 1


@pytest.mark.parametrize("structure", usual(["full"], ["lanczos", "full"]))
def test_examples_of_weight_zero_are_absent(drawn, structure):
    x, y = drawn.data
    weights = np.where(np.arange(20) % 4 == 1, 0.0, 1.0)
    present = weights > 0
    one = fitted(drawn, (np.where(present[:, None], x, np.nan), y, weights), structure)
    other = fitted(drawn, (x[present], y[present]), structure)
    assert_equal(one, other)


class Changing:
    """A loader whose passes differ as `change` says: from the number of the pass and the batches to batches."""

    def __init__(self, data, change):
        x, y = data
        self.batches = [(x[:10], y[:10]), (x[10:], y[10:])]
        self.change, self.passes = change, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.change(self.passes, self.batches))


LOADERS = {
    "shuffled": (lambda number, batches: batches[:: (-1) ** number], "switch shuffling and augmentation off"),
    "longer in later passes": (lambda number, batches: batches + batches[: number > 1], "switch shuffling"),
    "shorter in later passes": (lambda number, batches: batches[: 2 - (number > 1)], "same batches in every pass"),
}


@pytest.mark.parametrize("loader", LOADERS)
def test_a_loader_whose_passes_differ_is_refused(drawn, loader):
    change, message = LOADERS[loader]
    with pytest.raises(ValueError, match=message):
        fitted(drawn, Changing(drawn.data, change), "diag")
