"""The diagonal beside the dense matrix, and the samples of both."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace.model import batched as forward


def test_diagonal_evidence_is_never_above(full, diagonal):
    grid = np.geomspace(1e-2, 1e4, 13)
    ours = diagonal.evidence_curve(grid).log_marginal_likelihood.mean
    assert np.all(ours <= full.evidence_curve(grid).log_marginal_likelihood.mean)
    assert diagonal.log_marginal_likelihood().mean < full.log_marginal_likelihood().mean - 10


@pytest.mark.parametrize("name", ["full", "diagonal"])
def test_samples_have_the_structured_variance(name, request, trained):
    la = request.getfixturevalue(name)
    _, x, _ = trained
    variance = np.asarray(jnp.trace(la.functional_variance(x[:10]), axis1=1, axis2=2))
    deviations = forward.pushforward(
        la.network, x[:10], la.structure.samples(jax.random.key(3), 400, la.prior_precision)
    )
    totals = (np.square(deviations).sum(axis=2) / variance).mean(axis=1)
    assert abs(totals.mean() - 1) <= 4 * totals.std(ddof=1) / np.sqrt(len(totals))
