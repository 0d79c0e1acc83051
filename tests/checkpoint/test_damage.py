"""Every way to damage or forge a checkpoint ends in one sentence. `make test-campaign` takes all structures through."""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from campaign import damage

import bnnlaplace
from bnnlaplace.checkpoint import CheckpointError, find_damage, load_pytree, save_pytree


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A posterior of 8 weights in two groups with a prior mean, fitted to five examples."""
    weights = {"w1": jnp.eye(2), "w2": jnp.ones((2, 2))}
    network = bnnlaplace.Network.from_function(lambda w, x: jnp.tanh(x @ w["w1"]) @ w["w2"], weights)
    x = np.random.default_rng(0).normal(size=(5, 2)).astype(np.float32)
    options = {"prior_precision": {"w1": 2.0, "w2": 0.5}, "prior_mean": weights}
    la = bnnlaplace.Laplace(network, "regression", hessian_structure="diag", **options).fit((x, x))
    path = tmp_path_factory.mktemp("checkpoints") / "posterior"
    la.save(path)
    return la, path


GROUPS = sorted({kind.partition(":")[0] for kind in damage.KINDS})


@pytest.mark.parametrize("group", GROUPS)
def test_what_is_damaged_or_forged_is_refused_in_one_sentence(saved, group, tmp_path, unchecked_annotations):
    la, path = saved
    for number, kind in enumerate(kind for kind in damage.KINDS if kind.partition(":")[0] == group):
        copy = Path(shutil.copytree(path, tmp_path / str(number) / "posterior"))
        try:
            damage.KINDS[kind](copy, np.random.default_rng(number))
        except damage.NotPossible:
            continue
        if kind in damage.UNCHANGED:
            again = bnnlaplace.Laplace.load(copy, la.network)
            np.testing.assert_array_equal(again.structure.diagonal, la.structure.diagonal)
            np.testing.assert_array_equal(again.prior.relative, la.prior.relative)
            assert sorted(entry.name for entry in copy.parent.iterdir() if entry.name.startswith(".")) == []
            continue
        with pytest.raises(CheckpointError) as caught:
            bnnlaplace.Laplace.load(copy, la.network)
        assert str(caught.value).isprintable() and len(str(caught.value)) < 600, kind


def test_what_is_declared_is_compared_with_the_files_before_they_are_read(saved, tmp_path, monkeypatch):
    copy = Path(shutil.copytree(saved[1], tmp_path / "posterior"))
    damage.KINDS["signed leaf: of petabytes"](copy, np.random.default_rng(0))
    monkeypatch.setattr(np, "frombuffer", lambda *arguments: pytest.fail("an array was read"))
    assert "declares " in find_damage(copy) and "bytes for" in find_damage(copy)
    with pytest.raises(CheckpointError, match="must be as it was saved; .* declares .* bytes for"):
        load_pytree(copy)


def test_arrays_that_do_not_fit_into_memory(tmp_path, monkeypatch):
    save_pytree(tmp_path / "x", {"w": np.ones(1000)}, {})
    monkeypatch.setattr("bnnlaplace.checkpoint.arrays.free_bytes", lambda device: 7000)
    with pytest.raises(CheckpointError, match="must fit into memory; they take 8 kB of 7 kB that are free"):
        load_pytree(tmp_path / "x")


def test_a_link_to_a_checkpoint_is_followed(saved, tmp_path):
    (tmp_path / "link").symlink_to(saved[1])
    again = bnnlaplace.Laplace.load(tmp_path / "link", saved[0].network)
    assert again.log_marginal_likelihood() == saved[0].log_marginal_likelihood()


def test_numbers_come_back_as_they_were_saved(saved):
    la, path = saved
    again = bnnlaplace.Laplace.load(path, la.network.with_params(jax.tree.map(jnp.zeros_like, la.network.params)))
    left, right = (jax.tree.leaves((other.fitted, other.prior)) for other in (la, again))
    for one, other in zip(left, right, strict=True):
        assert np.asarray(one).dtype == np.asarray(other).dtype
        np.testing.assert_array_equal(one, other)
