"""The networks of the repository are whole, small, of no particular machine, and predict what they should."""

from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from bnnlaplace.model.batched import outputs
from training import posteriors, sealed, trained_on
from training.data.load import load
from training.models import van
from training.report.evaluation import evaluated_split
from training.train.checkpoints import load_trained
from training.workdir import load_saved_config

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"


def refuse(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize(("name", "num_weights"), [("digits", 19_466), ("cifar10", 273_578)])
def test_a_shipped_network_is_whole(name, num_weights):
    """Its arrays, its settings and its config vouch for each other, and its metrics for themselves."""
    directory = CHECKPOINTS / name
    config = load_saved_config(directory, refuse)
    trained = load_trained(directory, config, refuse)
    assert sum(np.size(leaf) for leaf in jax.tree.leaves(trained.params)) == num_weights
    metrics, verified = sealed.load(directory / "metrics.json")
    assert verified
    assert config.data.dir is None
    assert metrics["config"]["data"]["dir"] is None
    assert not any(part.startswith("/") for part in metrics["command"])
    digests, verified = sealed.load(directory / "data.json")
    assert verified and digests.keys() == {"train", "validation"}  # and no path of a machine
    shipped = [directory / f"{each}.json" for each in ("config", "data", "metrics")]  # evaluations come on top
    shipped.append(directory / "log.jsonl")
    shipped += (directory / "train").rglob("*")
    assert sum(path.stat().st_size for path in shipped if path.is_file()) < 4e6


def test_digits_are_predicted_as_the_metrics_say():
    directory = CHECKPOINTS / "digits"
    config = load_saved_config(directory, refuse)
    trained, data = load_trained(directory, config, refuse), load(config.data)
    trained_on.require_same(directory, data, None)
    module = van.from_config(config, len(data.class_names))
    network = posteriors.make_network(module, trained.params, trained.batch_stats)
    split = evaluated_split(config, data)
    logits = np.asarray(outputs(network, split.images, microbatch=64), np.float64)
    log_probs = log_softmax(logits, axis=1)
    metrics = sealed.load(directory / "metrics.json")[0]["methods"][0]["metrics"]
    nll = -log_probs[np.arange(len(split.labels)), split.labels].mean()
    assert nll == pytest.approx(metrics["nll"]["value"], rel=1e-3)
    assert np.mean(logits.argmax(1) == split.labels) == pytest.approx(metrics["accuracy"]["value"])
