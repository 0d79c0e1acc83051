"""The search for the prior precision; tests/prior compares its optima with closed forms."""

import jax.numpy as jnp
import pytest

import bnnlaplace


def test_an_optimum_at_the_end_of_the_search_warns():
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((4, 3)))
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit((jnp.eye(4), jnp.arange(4) % 3))
    with pytest.warns(UserWarning, match="the optimum is not inside it"):
        la.optimize_prior_precision()
