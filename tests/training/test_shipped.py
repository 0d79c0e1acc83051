"""A checkpoint that comes with the repository is whole, and predicts what its metrics say."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.special import log_softmax

from bnnlaplace.model.batched import outputs
from training import posteriors
from training.data.load import load
from training.models import van
from training.report.evaluation import evaluated_split
from training.train.checkpoints import load_trained
from training.workdir import load_saved_config

ROOT = Path(__file__).resolve().parents[2]


def refuse(message: str) -> None:
    raise AssertionError(message)


def test_digits():
    directory = ROOT / "checkpoints" / "digits"
    shipped = [directory / name for name in ("config.json", "log.jsonl", "metrics.json")]  # evaluations come on top
    shipped += (directory / "train").rglob("*")
    assert sum(path.stat().st_size for path in shipped if path.is_file()) < 4e6
    config = load_saved_config(directory, refuse)
    trained, data = load_trained(directory, config, refuse), load(config.data)
    module = van.from_config(config, len(data.class_names))
    network = posteriors.make_network(module, trained.params, trained.batch_stats)
    split = evaluated_split(config, data)
    logits = np.asarray(outputs(network, split.images, microbatch=64), np.float64)
    log_probs = log_softmax(logits, axis=1)
    metrics = json.loads((directory / "metrics.json").read_text())["methods"][0]["metrics"]
    nll = -log_probs[np.arange(len(split.labels)), split.labels].mean()
    assert nll == pytest.approx(metrics["nll"]["value"], rel=1e-3)
    assert np.mean(logits.argmax(1) == split.labels) == pytest.approx(metrics["accuracy"]["value"])
