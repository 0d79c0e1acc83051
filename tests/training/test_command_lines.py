"""Command lines that cannot be used are one line, and nothing is left behind; nothing is trained here."""

import shutil
import signal
from pathlib import Path

import pytest

from training import evaluate, fit_van, summarise
from training.cli.arguments import load_config
from training.study import __main__ as study
from training.workdir import save_config

pytestmark = pytest.mark.usefixtures("private_directories")
ROOT = Path(__file__).resolve().parents[2]
SMALL = """
from training.config import Config, Data, Optimizer

config = Config(data=Data(name="digits", train_examples=90), optimizer=Optimizer(batch_size=30))
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(SMALL)
    return path


def run(module, capsys, *arguments):
    """Exit status and stderr."""
    status = module.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.name", "imagenet21k"], "digits"),
        (["--model.variant", "b9"], "b0"),
        (["--model.variant", "b0"], "images"),
        (["--evaluation.ood", "imagenet21k"], "imagenet21k"),
        (["--optimizer.batch-size", "5000"], "batch_size"),
        (["--prior.update", "online", "--optimizer.epochs", "3", "--optimizer.polish-epochs", "3"], "every_epochs` 10"),
        (["--optimizer.learning-rate", "fast"], "--optimizer.learning-rate: could not convert string to float: 'fast'"),
        (["--seed", "1.5"], "--seed: invalid literal for int() with base 10: '1.5'"),
        (["--prior.update", "sometimes"], "invalid choice 'sometimes' for argument '--prior.update'"),
        (["--workdir"], "Missing value for argument '--workdir'"),
        (["--optimizer.learning-rate", "-1"], "`optimizer.learning_rate` must be greater than 0; got -1.0"),
        (["--data.augment"], "augment"),
        (["--no-such-option"], "no-such-option"),
    ],
)
def test_bad_options(config_file, tmp_path, capsys, arguments, message):
    workdir = tmp_path / "run"
    status, error = run(fit_van, capsys, "--config", config_file, "--workdir", workdir, *arguments)
    assert status == 2 and message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        (evaluate, [], "Missing from python -m training.evaluate: PATH"),
        (evaluate, ["somewhere", "--split", "train"], "invalid choice 'train' for argument '--split'"),
        (summarise, ["--digits"], "Unrecognized options: --digits"),
    ],
)
def test_bad_options_of_the_other_programs(module, arguments, message, capsys):
    status, error = run(module, capsys, *arguments)
    assert status == 2 and message in error
    assert error.startswith("error: ") and error.endswith("--help\n") and error.count("\n") == 1


STUDY = """
from training.config import Config, Data
from training.study.config import Measures, Regime, Study, Training

study = Study(Config(data=Data(train_examples=60)), (Regime("few"),), (0,), (Training("adamw"),),
              measures=Measures(foreign=("noize",)))
"""


def test_a_misspelt_foreign_set_is_told_with_what_there_is_and_the_option_of_the_program(config_file, tmp_path, capsys):
    shutil.copytree(ROOT / "checkpoints" / "digits", tmp_path / "run")
    (tmp_path / "study.py").write_text(STUDY)
    new = ["--workdir", tmp_path / "new", "--config"]
    for module, arguments, option in (
        (fit_van, [*new, config_file, "--evaluation.ood", "noize"], "--data.dir"),
        (evaluate, [tmp_path / "run", "--ood", "noize"], "--data-dir"),
        (study, [*new, tmp_path / "study.py"], "--data-dir"),
    ):
        status, error = run(module, capsys, *arguments)
        assert status == 2 and error.count("\n") == 1
        assert error.startswith(
            "error: the foreign images must be inverted, noise, or those of a data set: digits, one prepared in "
        )
        assert error.endswith(f"got 'noize'; choose one of these, or name the directory that holds it by {option}\n")
    misspelt = ["--workdir", tmp_path / "other", "--config", config_file, "--data.name", "digit"]
    assert run(fit_van, capsys, *misspelt)[1].endswith("or name the directory that holds it by --data.dir\n")


def test_a_signal_while_reading_the_data(config_file, tmp_path, capsys, monkeypatch):
    original = fit_van.load
    monkeypatch.setattr(fit_van, "load", lambda config: signal.raise_signal(signal.SIGTERM) or original(config))
    status, error = run(fit_van, capsys, "--config", config_file, "--workdir", tmp_path / "run")
    assert (status, error) == (130, "stopped in stage data; nothing is written; run the same command again\n")
    assert not (tmp_path / "run").exists()


def test_evaluating_a_directory_without_a_run(tmp_path, capsys):
    status, error = run(evaluate, capsys, tmp_path / "nothing")
    assert status == 2 and "config.json" in error
    status, error = run(summarise, capsys, tmp_path)
    assert status == 2 and "metrics.json" in error


def test_a_workdir_of_another_run(config_file, tmp_path, capsys):
    save_config(tmp_path / "run", load_config(config_file))
    (tmp_path / "run" / "train").mkdir()
    options = ["--seed", "7", "--resume", "--evaluation.ood", "noise"]
    status, error = run(fit_van, capsys, "--config", config_file, "--workdir", tmp_path / "run", *options)
    assert status == 2 and "seed: 0 there, 7 here" in error and "evaluation" not in error
