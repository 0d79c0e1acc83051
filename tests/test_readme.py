"""The example in the README runs as it is printed, on a network and data of one's own."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np

README = Path(__file__).resolve().parents[1] / "README.md"


class Tiny(nn.Module):
    """A Flax module as a user may have one."""

    @nn.compact
    def __call__(self, x):
        """Two inputs to the logits of three classes."""
        return nn.Dense(3)(nn.tanh(nn.Dense(4)(x)))


def test_the_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # it saves a posterior
    rng = np.random.default_rng(0)
    x_train, x_test = rng.normal(size=(60, 2)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    module = Tiny()
    names = {
        "module": module,
        "variables": module.init(jax.random.key(0), x_train),
        "x_train": x_train,
        "y_train": rng.integers(0, 3, size=60),
        "x_test": x_test,
    }
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, str(README), "exec"), names)

    printed = capsys.readouterr().out
    assert "Estimate(mean=" in printed and "KrylovError(" in printed
    np.testing.assert_allclose(names["probs"].sum(axis=1), np.ones(5), rtol=1e-5)
    assert {len(leaf) for leaf in jax.tree.leaves(names["weights"])} == {8}
    assert (tmp_path / "posterior").is_dir()
    assert names["la"].prior_precision > 0  # read back from there
