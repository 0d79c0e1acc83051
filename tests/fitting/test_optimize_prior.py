"""The search for the prior precision; tests/prior compares its optima with closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace


def test_an_optimum_at_the_end_of_the_search_warns():
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((4, 3)))
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit((jnp.eye(4), jnp.arange(4) % 3))
    with pytest.warns(UserWarning, match="the optimum is not inside it"):
        la.optimize_prior_precision()


@pytest.mark.parametrize("structure", usual(["full"], ["full", "diag", "kron"]))
def test_derivatives_of_the_evidence_are_those_of_another_function(structure):
    """The front object answers in float64 on the host, where JAX cannot trace it; the message says what can be."""
    rng = np.random.default_rng(0)
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.zeros((2, 2)))
    x, y = rng.normal(size=(6, 2)), np.arange(6) % 2
    la = bnnlaplace.Laplace(network, hessian_structure=structure).fit((x, y))
    for answer in (
        lambda delta: la.log_marginal_likelihood(delta).mean,
        lambda delta: la.with_prior_precision(delta).log_marginal_likelihood().mean,
        lambda delta: la.with_prior_precision(delta).evidence_optimum().prior_precision,
        lambda delta: la.with_prior_precision(delta).optimize_prior_precision().prior_precision,
        la.effective_parameters,
        la.mode_decrement,
    ):
        with pytest.raises(TypeError, match="outside of jit, grad and vmap.*evidence.log_marginal_likelihood"):
            jax.grad(answer)(1.0)
