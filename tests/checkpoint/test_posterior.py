"""A fitted Laplace on disk: every structure, and likelihoods of the package and of the user."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trained import network_outputs

import bnnlaplace
from bnnlaplace.checkpoint.pytree import CheckpointError


@pytest.mark.parametrize("name", ["full", "diagonal", "unconverged"])
def test_save_and_load(name, request, tmp_path):
    la = request.getfixturevalue(name).with_prior_precision(1e6)
    la.save(tmp_path / "la")
    blank = la.network.with_params(jax.tree.map(jnp.zeros_like, la.network.params))
    again = bnnlaplace.Laplace.load(tmp_path / "la", blank)
    assert again.log_marginal_likelihood() == la.log_marginal_likelihood()
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(la), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    other = bnnlaplace.Network.from_function(network_outputs, {**la.network.params, "b2": jnp.zeros(7)})
    with pytest.raises(CheckpointError, match=r"params/b2"):
        bnnlaplace.Laplace.load(tmp_path / "la", other)


def test_a_likelihood_of_ones_own_is_not_taken_for_the_package_s(trained, tmp_path, unchecked_annotations):
    network, x, y = trained
    tempered = dataclasses.replace(
        bnnlaplace.categorical(), mean=jax.tree_util.Partial(lambda f: jax.nn.softmax(f / 10, axis=-1))
    )
    la = bnnlaplace.Laplace(network, tempered, hessian_structure="diag").fit((x, y))
    la.save(tmp_path / "posterior")
    with pytest.raises(CheckpointError, match="with the likelihood 'classification' of your own; pass it"):
        bnnlaplace.Laplace.load(tmp_path / "posterior", network)
    again = bnnlaplace.Laplace.load(tmp_path / "posterior", network, tempered)
    np.testing.assert_array_equal(again.predictive(x[:3]), la.predictive(x[:3]))
    with pytest.raises(TypeError, match=r"load\(network=...\) must be a bnnlaplace.Network; got dict"):
        bnnlaplace.Laplace.load(tmp_path / "posterior", {"w": 1})


def test_a_likelihood_of_ones_own_may_hold_python_numbers(trained, tmp_path):
    network, x, y = trained

    def log_prob(factor, f, y):
        return bnnlaplace.categorical().log_prob(factor * f, y)

    likelihood = dataclasses.replace(
        bnnlaplace.categorical(), name="tempered", log_prob=jax.tree_util.Partial(log_prob, 0.5)
    )
    la = bnnlaplace.Laplace(network, likelihood, hessian_structure="diag").fit((x, y))
    la.save(tmp_path / "posterior")
    again = bnnlaplace.Laplace.load(tmp_path / "posterior", network, likelihood)
    assert again.likelihood.log_prob.args == (0.5,)
    np.testing.assert_array_equal(again.mode_gradient(), la.mode_gradient())


def test_a_likelihood_of_another_kind_does_not_load(diagonal, trained, tmp_path):
    diagonal.save(tmp_path / "posterior")
    with pytest.raises(CheckpointError, match="'classification' of 0 parameters; got 'regression' of 4"):
        bnnlaplace.Laplace.load(tmp_path / "posterior", trained[0], bnnlaplace.gaussian(1.0))
