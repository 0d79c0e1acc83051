"""Checkpoints of release 0.1.0, which Orbax wrote, are read as they were, or refused in one sentence."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from campaign import damage

import bnnlaplace
from bnnlaplace.checkpoint import CheckpointError, find_damage, load_pytree, save_pytree
from bnnlaplace.checkpoint.leaves import describe


def write_version_1(path: Path, tree, metadata) -> None:
    """Write what release 0.1.0 wrote."""
    described = describe(tree)
    stored = {leaf.path: np.asarray(array) for leaf, array in described if array.size}
    ocp.PyTreeCheckpointer().save(path.absolute() / "arrays", stored)
    document = {"format_version": 1, "metadata": metadata, "leaves": [leaf.as_json() for leaf, _ in described]}
    damage.write_document(path, document)


TREE = {
    "w": np.random.default_rng(0).normal(size=(6, 4)),
    "deep": [{"a.b c": np.zeros(30)}, np.ones(3, ml_dtypes.bfloat16)],
    "key": jax.random.key(1),
    "empty": np.zeros((0, 3)),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = (
        tmp_path_factory.mktemp("version 1 ü%20") / "x"
    )  # TensorStore takes addresses, in which these are written otherwise
    write_version_1(path, TREE, {"step": 3})
    return path


def test_it_is_read_as_it_was_written(saved):
    tree, metadata = load_pytree(saved)
    assert metadata == {"step": 3} and find_damage(saved) is None
    np.testing.assert_array_equal(tree["w"], TREE["w"])
    np.testing.assert_array_equal(tree["deep"][0]["a.b c"], np.zeros(30))
    assert tree["deep"][1].dtype == ml_dtypes.bfloat16 and (tree["deep"][1] == 1).all()
    assert tree["empty"].shape == (0, 3) and jax.random.uniform(tree["key"]) == jax.random.uniform(TREE["key"])


def test_it_is_replaced_by_version_2(saved, tmp_path):
    copy = Path(shutil.copytree(saved, tmp_path / "x"))
    save_pytree(copy, {"w": np.ones(3)}, {})
    assert load_pytree(copy)[0]["w"].tolist() == [1, 1, 1]
    assert json.loads((copy / "metadata.json").read_text())["format_version"] == 2


KINDS = [
    *("one bit of any file", "a file cut short", "missing arrays", "signed missing arrays", "manifest: a pipe"),
    *("signed leaf: of petabytes", "signed leaf: of another type", "signed leaf: at another path"),
    *("signed leaf dropped", "signed shape turned", "signed document: version 99"),
]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_damaged_or_forged_is_refused(saved, kind, tmp_path, capfd):
    copy = Path(shutil.copytree(saved, tmp_path / "x"))
    damage.KINDS[kind](copy, np.random.default_rng(0))
    with pytest.raises(CheckpointError) as caught:
        load_pytree(copy)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("part", ["manifest.ocdbt", "d"])
def test_a_signed_database_with_parts_missing_is_refused(saved, part, tmp_path, capfd):
    """Orbax and TensorStore may take what is missing for zeros."""
    copy = Path(shutil.copytree(saved, tmp_path / "x"))
    file = copy / "arrays" / part
    shutil.rmtree(file) if file.is_dir() else file.unlink()
    damage.sign(copy)
    with pytest.raises(CheckpointError, match="arrays (does not hold|is not readable as arrays)"):
        load_pytree(copy)
    assert capfd.readouterr() == ("", "")


def test_a_posterior_of_the_first_release(tmp_path):
    """It did not write which weights and groups there are, whose likelihood it is, nor all sums of the data."""
    network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.eye(2))
    la = bnnlaplace.Laplace(network, hessian_structure="diag").fit((np.eye(2, dtype=np.float32), np.array([0, 1])))
    fitted = la.fitted
    tree = {
        "network": {"params": network.params, "frozen": {}},
        "prior_precision": np.asarray(1.0),
        "structure": fitted.structure,
        "fitted": {
            "log_likelihood": np.float32(fitted.log_likelihood.value),
            "log_likelihood_gradient": fitted.log_likelihood.gradient,
        },
    }
    write_version_1(tmp_path / "x", tree, {"hessian_structure": "diag", "likelihood": "classification"})
    again = bnnlaplace.Laplace.load(tmp_path / "x", network)
    assert again.log_marginal_likelihood().mean == pytest.approx(la.log_marginal_likelihood().mean, rel=1e-6)
    again.save(tmp_path / "x")
    assert bnnlaplace.Laplace.load(tmp_path / "x", network).log_marginal_likelihood() == again.log_marginal_likelihood()
