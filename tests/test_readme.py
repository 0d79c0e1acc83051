"""The example in the README runs as it is printed, with nothing but the package installed."""

import re
from pathlib import Path

import jax
import numpy as np

README = Path(__file__).resolve().parents[1] / "README.md"


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # it saves a posterior
    (block,) = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names = {"__name__": "__main__"}
    exec(compile(block, str(README), "exec"), names)

    decrement, *printed = capsys.readouterr().out.splitlines()
    assert float(decrement) < 0.5  # near a mode, as it says: the data determine 26 directions
    assert printed[0].startswith("Estimate(mean=") and printed[1].startswith("KrylovError(")
    assert names["probs"].shape == (20, 3)
    np.testing.assert_allclose(names["probs"].sum(axis=1), np.ones(20), rtol=1e-5)
    assert {len(leaf) for leaf in jax.tree.leaves(names["weights"])} == {8}
    assert (tmp_path / "posterior").is_dir()
    assert names["la"].prior_precision > 0  # read back from there
