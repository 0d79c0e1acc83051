"""The memory of a fit is estimated before it is needed."""

import pytest

import bnnlaplace


def test_memory_is_not_estimated_at_the_cost_of_a_batch(trained):
    network, x, y = trained
    batches = iter([(x[:10], y[:10]), (x[10:20], y[10:20])])
    la = bnnlaplace.Laplace(network, hessian_structure="diag")
    with pytest.raises(ValueError, match="memory_estimate.*must be readable again"):
        la.memory_estimate(batches)
    with pytest.raises(ValueError, match="max_vectors=... must be an integer of at least 1; got -3"):
        la.memory_estimate((x, y), max_vectors=-3)


@pytest.mark.parametrize("microbatch", [None, "8", [8], 2.5, 0, True])
def test_a_microbatch_is_a_count(trained, microbatch, unchecked_annotations):
    network, x, y = trained
    with pytest.raises(ValueError, match="microbatch=... must be an integer of at least 1; got .*; try 64"):
        bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y), microbatch=microbatch)
