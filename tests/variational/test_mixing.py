"""Mixing solves a linear problem in about as many steps as it has directions, also where plain steps go away."""

import numpy as np
import pytest

from bnnlaplace.variational.mixing import Past
from bnnlaplace.variational.sites import Sites

FIXED = [np.full((2, 3, 3), 2.0), np.full((1, 3, 3), -1.0)]
# How much of a deviation from the fixed point comes back: the first one overshoots by half of itself.
FACTORS = (-1.5, 0.5)


def directions():
    """Two directions, each over both batches."""
    rng = np.random.default_rng(0)
    flat, _ = np.linalg.qr(rng.normal(size=(27, 2)))
    return [[column[:18].reshape(2, 3, 3), column[18:].reshape(1, 3, 3)] for column in flat.T]


def averages(batches):
    """A linear map with that fixed point."""
    result = [fixed.copy() for fixed in FIXED]
    for factor, direction in zip(FACTORS, directions(), strict=True):
        along = sum(np.vdot(by, at - fixed) for by, at, fixed in zip(direction, batches, FIXED, strict=True))
        result = [each + factor * along * by for each, by in zip(result, direction, strict=True)]
    return Sites(result, False)


def error_after(steps, past):
    first, second = directions()
    sites = Sites([fixed + a + 3 * b for fixed, a, b in zip(FIXED, first, second, strict=True)], False)
    for _ in range(steps):
        proposed = averages(sites.batches)
        past = past.with_step(sites, proposed)
        sites = past.next(sites, proposed, 1.0)
    return max(np.abs(at - fixed).max() for at, fixed in zip(sites.batches, FIXED, strict=True))


def test_it_solves_a_linear_problem_of_two_directions():
    assert error_after(4, Past()) < 1e-9
    assert error_after(4, Past().given_up()) > 0.5  # the control: plain steps


def test_after_it_was_forgotten_it_needs_as_many_steps_again():
    first, _ = directions()
    old = Sites([fixed + by for fixed, by in zip(FIXED, first, strict=True)], False)
    past = Past().with_step(old, averages(old.batches)).with_step(old, averages(old.batches))
    assert past.is_mixed and not past.forgotten().is_mixed
    assert error_after(4, past.forgotten()) < 1e-9


@pytest.mark.parametrize("by_samples", [False, True])
def test_the_first_step_goes_a_share_and_so_do_all_of_samples(by_samples):
    rng = np.random.default_rng(0)
    old, new = (Sites([rng.normal(size=(2, 4, 3))], by_samples) for _ in range(2))
    past = Past().with_step(old, new)
    if by_samples:
        past = past.with_step(new, old)
    assert not past.is_mixed
    np.testing.assert_array_equal(past.next(old, new, 0.7).batches[0], old.towards(new, 0.7).batches[0])
