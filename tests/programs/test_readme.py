"""The example of the README runs as it is printed, with nothing but the package installed."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

README = Path(__file__).resolve().parents[2] / "README.md"


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(3)(nn.tanh(nn.Dense(6)(x)))


@pytest.fixture(scope="module")
def trained():
    """What the README says that the reader has: a module at a mode of its log joint, training data and new inputs."""
    x = jax.random.normal(jax.random.key(0), (220, 2))
    y = jnp.digitize(x[:, 0] * x[:, 1], jnp.array([-0.3, 0.3]))
    variables = Net().init(jax.random.key(1), x[:1])

    def negative_log_joint(variables):
        log_probs = jax.nn.log_softmax(Net().apply(variables, x[:200]))
        misfit = -jnp.take_along_axis(log_probs, y[:200, None], axis=1).sum()
        return misfit + 0.5 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(variables))

    def step(variables, _):
        gradient = jax.grad(negative_log_joint)(variables)
        return jax.tree.map(lambda w, g: w - 3e-3 * g, variables, gradient), None

    variables = jax.jit(lambda start: jax.lax.scan(step, start, length=3000)[0])(variables)
    return {"module": Net(), "variables": variables, "x": x[:200], "y": y[:200], "x_new": x[200:]}


def test_the_example_runs(trained, tmp_path, monkeypatch):
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)  # it saves a posterior
    names = {"__name__": "__main__", **trained}
    exec(compile(blocks[0], str(README), "exec"), names)
    assert np.isfinite(names["evidence"].mean)
    assert names["probs"].shape == (20, 3)
    np.testing.assert_allclose(names["probs"].sum(axis=1), np.ones(20), rtol=1e-5)
    loaded = names["bnnlaplace"].Laplace.load("posterior", names["network"])
    assert loaded.prior_precision == pytest.approx(names["la"].prior_precision)
