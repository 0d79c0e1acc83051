"""The command in the report leads to the settings of the run, whatever they are."""

import dataclasses
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from training import evaluate
from training.cli import program
from training.cli.arguments import parse
from training.config import Config, Curvature, Data, Evaluation, Model, Optimizer, Prior
from training.data.load import with_statistics
from training.report.command import command_of, for_shell

IMAGES = np.random.default_rng(0).integers(256, size=(20, 4, 4, 1), dtype=np.uint8)


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        Config(
            seed=3,
            data=Data(dir=Path("/a b/it's"), augment=True, train_examples=100),
            model=Model(stem_kernel=3),
            optimizer=Optimizer(learning_rate=1e-4, second_moment_decay=0.0),
            prior=Prior(update="online", structure="layerwise", every_epochs=5),
            curvature=Curvature(tolerance=0.01),
            evaluation=Evaluation(split="validation", ood="noise"),
        ),
        Config(data=Data(mean=(-0.5,), std=(0.25,))),
        Config(prior=Prior(update="joint", curvature="diagonal", learning_rate=0.125)),
    ],
)
def test_the_command_gives_the_settings_of_the_run(config):
    recorded = Config(**{**vars_of(config), "data": with_statistics(config.data, IMAGES)})
    words = command_of(recorded, IMAGES)
    assert words[:3] == ["python", "-m", "training.fit_van"]
    in_shell = for_shell(words).replace("\\\n", "")
    assert shlex.split(in_shell) == words
    arguments = parse(words[3:], "python -m training.fit_van")
    assert arguments.settings == config  # pixel statistics that were measured are measured again


@dataclasses.dataclass
class Results:
    command: tuple[str, ...]


def test_the_report_of_an_evaluation_names_the_evaluation(tmp_path, monkeypatch, capsys):
    """It named the training, which makes another network."""
    written = []
    shipped = Path(__file__).resolve().parents[3] / "checkpoints" / "digits"
    workdir = shutil.copytree(shipped, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation-*", ".lock"))
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    monkeypatch.setattr(program, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(evaluate.posteriors, "fit", lambda *_: {})
    monkeypatch.setattr(evaluate.evaluation, "evaluate", lambda *_: Results(("python", "-m", "training.fit_van")))
    monkeypatch.setattr(evaluate, "write_results", lambda directory, results, console: written.append(results))
    assert evaluate.main([str(workdir), "--ood", "noise"]) == 0
    assert written == [Results(["python", "-m", "training.evaluate", str(workdir), "--ood", "noise"])]
    capsys.readouterr()


def vars_of(config):
    return {name: getattr(config, name) for name in ("seed", "model", "optimizer", "prior", "curvature", "evaluation")}
