"""The examples in the README run as they are printed, with nothing but the package installed."""

import re
from pathlib import Path

import jax
import numpy as np

README = Path(__file__).resolve().parents[1] / "README.md"


def run_example(number):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    names = {"__name__": "__main__"}
    exec(compile(blocks[number], str(README), "exec"), names)
    return names


def test_the_example_of_a_model_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # it saves a posterior
    names = run_example(0)

    decrement, *printed = capsys.readouterr().out.splitlines()
    assert float(decrement) < 0.5  # near a mode, as it says: the data determine 26 directions
    assert printed[0].startswith("Estimate(mean=") and printed[1].startswith("KrylovError(")
    assert names["probs"].shape == (20, 3)
    np.testing.assert_allclose(names["probs"].sum(axis=1), np.ones(20), rtol=1e-5)
    assert {len(leaf) for leaf in jax.tree.leaves(names["weights"])} == {8}
    assert (tmp_path / "posterior").is_dir()
    assert names["la"].prior_precision > 0  # read back from there


def test_the_example_of_krylov_methods_runs():
    names = run_example(1)
    dense = jax.vmap(lambda row: names["matvec"](row, names["params"]))(np.eye(1000, dtype=np.float32))
    assert abs(names["value"] - np.linalg.slogdet(dense)[1]) <= 4 * names["estimate"].sem
    np.testing.assert_allclose(dense @ names["root"].value, root(dense) @ names["v"], atol=1e-4)
    assert names["root"].error < 1e-3 and names["flow"].error < 1e-3
    np.testing.assert_allclose(names["flow"].value, 0 * names["v"] + 1, atol=1e-4)  # a constant does not flow
    assert np.abs(names["gradient"]["scale"] - np.diag(np.linalg.inv(dense))).mean() < 0.1


def root(matrix):
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values) @ vectors.T
