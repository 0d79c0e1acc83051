"""The covariance outside a Krylov basis at inputs that the posterior was fitted to."""

import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace.structure.outside import with_own_curvature


@pytest.mark.parametrize("rank", [2, 4])
def test_the_share_of_others_is_found_by_the_trace(x64, rank):
    """Also if the curvature of an input does not see all its outputs, or if it has none."""
    rng = np.random.default_rng(0)
    roots, factors = (
        rng.normal(size=(3, 4, 6)),
        rng.normal(size=(3, 4, rank)) * np.array([3.0, 0.1, 0.0])[:, None, None],
    )
    prior = roots @ roots.swapaxes(1, 2)
    others = np.array([0.2, 0.7, 0.9])
    exact = np.linalg.inv(np.linalg.inv(prior) / others[:, None, None] + factors @ factors.swapaxes(1, 2))
    share = np.trace(exact, axis1=1, axis2=2) / np.trace(prior, axis1=1, axis2=2)
    found = with_own_curvature(jnp.asarray(prior), jnp.asarray(factors), jnp.asarray(share))
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-7)


def test_others_never_add_variance(x64):
    """A noisy share that is larger than what the own curvature alone leaves, and one of zero."""
    prior, factors = jnp.eye(2)[None] * 4, jnp.ones((1, 2, 1))
    most = with_own_curvature(prior, factors, jnp.ones(1))
    np.testing.assert_allclose(most[0], np.linalg.inv(np.eye(2) / 4 + np.ones((2, 2))), atol=1e-7)
    np.testing.assert_allclose(with_own_curvature(prior, factors, jnp.zeros(1)), 0, atol=1e-7)
