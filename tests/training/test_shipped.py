"""The networks that come with the repository are whole, small, and of no particular machine."""

import json
from pathlib import Path

import jax
import numpy as np
import pytest

from training.train.checkpoints import load_trained
from training.workdir import load_saved_config

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


def refuse(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize(("name", "num_weights"), [("digits", 19_466), ("cifar10", 273_578)])
def test_a_shipped_network_is_whole(name, num_weights):
    """Its arrays, its settings and its config vouch for each other."""
    workdir = CHECKPOINTS / name
    config = load_saved_config(workdir, refuse)
    trained = load_trained(workdir, config, refuse)
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(trained.params)) == num_weights
    metrics = json.loads((workdir / "metrics.json").read_text())
    assert config.data.dir is None
    assert metrics["config"]["data"]["dir"] is None
    assert not any(part.startswith("/") for part in metrics["command"])
    kept = [workdir / "config.json", workdir / "log.jsonl", workdir / "metrics.json", *(workdir / "train").rglob("*")]
    assert sum(path.stat().st_size for path in kept if path.is_file()) < 4e6
