"""The command-line programs from end to end on a small run, resumed, evaluated again, damaged and misused."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from bnnlaplace.structure import KrylovStructure
from training import evaluate, fit_van, sealed, summarise
from training.cli import interruption
from training.data import foreign, load, reading
from training.report import evaluation

ROOT = Path(__file__).resolve().parents[2]

SMALL = """
from training.config import Config, Curvature, Data, Evaluation, Model, Optimizer, Prior

config = Config(
    data=Data(name="digits", train_examples=90),
    model=Model(variant="digits"),
    optimizer=Optimizer(batch_size=30, epochs=2, warmup_epochs=1, polish_epochs=2),
    prior=Prior(update="online", every_epochs=2, examples=40),
    curvature=Curvature(num_probes=4, max_vectors=8, microbatch=45),
    evaluation=Evaluation(grid_size=3, resamples=20),
)
"""


@pytest.fixture(scope="module", autouse=True)
def private_directories(tmp_path_factory):
    """Data and compiled programs of these tests, shared among them."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(home / "tfds"))
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(home / "xla"))
        # A slow machine must not end the tests themselves.
        patch.setattr(interruption, "SECONDS_TO_UNWIND", 600.0)
        yield


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(SMALL)
    return path


@pytest.fixture(scope="module")
def finished(config_file, tmp_path_factory):
    """A finished run; tests that change it copy it first."""
    workdir = tmp_path_factory.mktemp("runs") / "small"
    assert fit_van.main(["--config", str(config_file), "--workdir", str(workdir)]) == 0
    return workdir


def run(program, capsys, *arguments):
    """Exit status and stderr."""
    status = program.main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.err


def test_block_krylov_benchmark_runs(finished):
    command = [sys.executable, "benchmarks/block_krylov.py", str(finished), "--probes", "1", "4", "--max-vectors", "16"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    one, four = json.loads(Path(done.stdout.split("written to ")[1].strip()).read_text())["rows"]
    assert (one["probes"], one["products"]) == (1, 64 * 16)
    assert (four["probes"], four["products"]) == (4, 16 * 16)
    assert "more than" in done.stdout or (one["converged"] and four["converged"])


def test_a_run_writes_everything(finished):
    written = {path.name for path in finished.iterdir()}
    assert written >= {"config.json", "log.jsonl", "train", "laplace", "metrics.json", "report.html", "figures"}
    metrics = json.loads((finished / "metrics.json").read_text())
    labels = [method["label"] for method in metrics["methods"]]
    assert labels == ["MAP", "MAP + temperature"] + [
        f"{structure} Laplace ({choice}, {link})"
        for structure in ("diagonal", "Lanczos")
        for choice in ("evidence", "validation NLL")
        for link in ("MC", "probit")
    ]
    assert set(metrics["seconds"]) == {"data", "training", "posterior", "evaluation"}
    assert metrics["num_images"] == {"train": 90, "validation": 180, "test": 360}
    assert metrics["held_out"] is True
    assert metrics["config"]["data"]["mean"] is not None  # the statistics are part of the record
    assert len(metrics["history"]) == 4
    assert metrics["history"][2]["prior_precision"] != 1.0  # updated online after two epochs


def test_evaluating_again_gives_the_same_numbers(finished, capsys):
    status, _ = run(evaluate, capsys, finished)
    assert status == 0
    again = json.loads((finished / "evaluation-test-inverted" / "metrics.json").read_text())
    assert again["command"] == ["python", "-m", "training.evaluate", str(finished)]
    before = json.loads((finished / "metrics.json").read_text())
    for ours, theirs in zip(again["methods"], before["methods"], strict=True):
        for name, interval in theirs["metrics"].items():
            np.testing.assert_allclose(ours["metrics"][name]["value"], interval["value"], rtol=1e-5, err_msg=name)


def test_a_run_without_posteriors_has_them_fitted_again(finished, tmp_path, capsys):
    """So weights, config and metrics are enough to be shared."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy, ignore=shutil.ignore_patterns("laplace", "evaluation-*"))
    status, _ = run(evaluate, capsys, copy)
    assert status == 0 and not (copy / "laplace").exists()
    again, before = (
        json.loads((directory / "metrics.json").read_text())
        for directory in (copy / "evaluation-test-inverted", finished)
    )
    for ours, theirs in zip(again["methods"], before["methods"], strict=True):
        np.testing.assert_allclose(ours["metrics"]["nll"]["value"], theirs["metrics"]["nll"]["value"], rtol=1e-3)


def test_another_split_and_other_images(finished, capsys):
    """Console, report and metrics say that the validation images also chose temperature and prior precision."""
    assert evaluate.main([str(finished), "--split", "validation", "--ood", "noise"]) == 0
    directory = finished / "evaluation-validation-noise"
    metrics = json.loads((directory / "metrics.json").read_text())
    assert (metrics["split"], metrics["ood"], metrics["held_out"]) == ("validation", "noise", False)
    sentence = "The evaluated images are the validation images, which also chose the temperature"
    printed = capsys.readouterr().out.splitlines()
    assert any(sentence in line for line in printed)
    assert sentence in (directory / "report.html").read_text()
    assert printed[-1] == str(directory / "report.html")


def test_summary_of_two_runs(finished, capsys):
    assert summarise.main([str(finished), str(finished)]) == 0
    printed = capsys.readouterr().out
    accuracy = json.loads((finished / "metrics.json").read_text())["methods"][0]["metrics"]["accuracy"]["value"]
    assert f"| MAP | – | {accuracy:.3f} [{accuracy:.3f}, {accuracy:.3f}] |" in printed
    assert "seeds 0, 0" in printed


def test_resuming_a_finished_run_fits_nothing_again(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    status, _ = run(fit_van, capsys, "--workdir", copy, "--resume")  # with the settings that are saved there
    assert status == 0
    before, after = (json.loads((path / "metrics.json").read_text()) for path in (finished, copy))
    assert [method["metrics"] for method in before["methods"]] == [method["metrics"] for method in after["methods"]]
    for stage in ("training", "posterior"):
        assert before["seconds"][stage] == after["seconds"][stage] > 0
    assert after["seconds"]["training"] == pytest.approx(sum(record["seconds"] for record in after["history"]))
    assert list(after["seconds"]) == ["data", "training", "posterior", "evaluation"]


def test_a_signal_while_fitting_stops_after_the_block(finished, config_file, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    shutil.rmtree(copy / "laplace")
    before = files_of(copy)
    blocks = []

    def fit_block(structure, tolerance, original=KrylovStructure.error):
        if not blocks:
            signal.raise_signal(signal.SIGTERM)
        blocks.append(structure)
        return original(structure, tolerance)

    monkeypatch.setattr(KrylovStructure, "error", fit_block)
    status, error = run(fit_van, capsys, "--config", config_file, "--workdir", copy, "--resume")
    assert status == 130 and len(blocks) == 1
    assert error.startswith("stopped while fitting the posteriors; the trained network is kept; continue with: ")
    assert error.endswith(f" -m training.fit_van --workdir {copy} --resume\n")
    assert files_of(copy) == before
    assert signal.getsignal(signal.SIGTERM) is not None and not interruption.requested()
    assert run(fit_van, capsys, "--workdir", copy, "--resume")[0] == 0  # as the message says


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_evaluating_writes_nothing(finished, tmp_path, capsys, monkeypatch, number):
    original = evaluation.evaluate
    monkeypatch.setattr(evaluation, "evaluate", lambda *args: signal.raise_signal(number) or original(*args))
    before = files_of(finished)
    status, error = run(evaluate, capsys, finished, "--ood", "noise")
    assert status == 130 and error.startswith("stopped in stage evaluation; nothing of it is written; continue with: ")
    assert error.endswith(f" -m training.evaluate {finished} --ood noise\n")
    assert files_of(finished) == before


def files_of(directory):
    """Return every file and its content."""
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_finished_run_can_be_resumed_with_another_evaluation(finished, config_file, tmp_path, capsys, monkeypatch):
    """Neither trained nor fitted again, and no image set is read more often than it is needed."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    reads = []
    for module in (load, foreign):
        monkeypatch.setattr(module, "load_split", lambda *split: reads.append(split[:2]) or reading.load_split(*split))
    before = sorted((path, path.stat().st_mtime_ns) for path in (copy / "laplace").rglob("*"))
    options = ["--evaluation.ood", "digits", "--evaluation.split", "validation", "--evaluation.grid-high", "1e6"]
    assert fit_van.main(["--config", str(config_file), "--workdir", str(copy), "--resume", *options]) == 0
    assert sorted((path, path.stat().st_mtime_ns) for path in (copy / "laplace").rglob("*")) == before
    assert reads.count(("digits", "test")) == 2  # once to hold out, once as foreign images
    metrics = json.loads((copy / "metrics.json").read_text())
    assert (metrics["split"], metrics["ood"]) == ("validation", "digits")
    assert metrics["curves"]["Lanczos"]["precision"][-1] == pytest.approx(1e6)
    saved = json.loads((copy / "config.json").read_text())["evaluation"]
    assert (saved["split"], saved["ood"], saved["grid_high"]) == ("validation", "digits", 1e6)
    assert "Traceback" not in capsys.readouterr().err


def test_a_damaged_posterior_is_named_and_fitted_again(finished, config_file, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    victim = max(
        (copy / "laplace" / "Lanczos").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0
    )
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    status, error = run(evaluate, capsys, copy, "--ood", "noise")
    assert status == 2 and victim.name in error and "to have them fitted again: " in error
    assert not (copy / "evaluation-test-noise").exists()
    status = fit_van.main(["--config", str(config_file), "--workdir", str(copy), "--resume"])
    printed = capsys.readouterr().out
    assert status == 0 and victim.name in "".join(printed.split())


def test_interruption_saves_and_exits_with_130(config_file, tmp_path):
    workdir = tmp_path / "run"
    program = [sys.executable, "-m", "training.fit_van", "--config", str(config_file), "--workdir", str(workdir)]
    process = subprocess.Popen(
        [*program, "--optimizer.epochs", "5000"], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    deadline = time.monotonic() + 120
    while not (workdir / "log.jsonl").exists() or not (workdir / "log.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"; continue with: {sys.executable} -m training.fit_van --workdir {workdir} --resume\n" in error
    assert "Traceback" not in error
    assert any((workdir / "train").iterdir())


def test_a_workdir_of_another_run(finished, config_file, capsys):
    options = ["--seed", "7", "--resume", "--evaluation.ood", "noise"]
    status, error = run(fit_van, capsys, "--config", config_file, "--workdir", finished, *options)
    assert status == 2 and "seed: 0 there, 7 here" in error and "evaluation" not in error


def test_evaluating_a_run_that_cannot_be_written(finished, tmp_path, capsys, monkeypatch):
    def refuse(dir):
        if dir == finished:
            raise PermissionError(13, "Permission denied")
        return contextlib.nullcontext()

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    status, error = run(evaluate, capsys, finished, "--ood", "noise")
    assert status == 2 and error.count("\n") == 1
    assert f"must be writable; got {finished}: Permission denied; evaluate a copy of it" in error
    assert not (finished / "evaluation-test-noise").exists()


def test_one_changed_bit_of_the_settings_is_one_line(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    saved = json.loads((copy / "config.json").read_text())
    text = (copy / "config.json").read_text()
    digits = f"{saved['data']['mean'][0]}"
    (copy / "config.json").write_text(text.replace(digits, f"{digits[:4]}{int(digits[4]) ^ 1}{digits[5:]}"))
    for program, arguments in ((evaluate, [copy]), (fit_van, ["--workdir", copy, "--resume"])):
        status, error = run(program, capsys, *arguments)
        assert status == 2 and error.count("\n") == 1
        assert f"{copy}/config.json must be a config as it was saved; its entry sha256" in error
    # Signed anew, it still differs from what the checkpoints record.
    saved["data"]["mean"][0] += 0.01
    (copy / "config.json").write_text(sealed.dump(saved, indent=2))
    status, error = run(evaluate, capsys, copy)
    assert status == 2 and error.count("\n") == 1 and "step_00000012 must have been computed" in error
    assert f"data.mean: [{digits}] there" in error


def test_a_config_without_a_digest_is_read_and_said_to_be_unverified(finished, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    saved = json.loads((copy / "config.json").read_text())
    del saved["sha256"]
    (copy / "config.json").write_text(json.dumps(saved))
    assert evaluate.main([str(copy)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(f"{copy}/config.json has no entry sha256: whether it is as it was saved is unverified") == 1


def test_unknown_foreign_images(finished, capsys):
    status, error = run(evaluate, capsys, finished, "--ood", "imagenet21k")
    assert status == 2 and "imagenet21k" in error
    assert not (finished / "evaluation-test-imagenet21k").exists()


def test_help_lists_every_field():
    text = subprocess.run(
        [sys.executable, "-m", "training.fit_van", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "COLUMNS": "160"},
    ).stdout
    for option in (
        "--workdir",
        "--resume",
        "--optimizer.learning-rate",
        "--prior.update",
        "--data.name",
        "--curvature.max-vectors",
    ):
        assert option in text


def test_programs_run_with_directories_that_cannot_be_written(tmp_path):
    """A cache below a file is a warning, a work directory below a file an error, and neither leaves anything behind."""
    (tmp_path / "file").touch()
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "file" / "cache"),
        "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
        "TFDS_DATA_DIR": str(tmp_path / "sets"),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-m", "training.fit_van", "--workdir", str(tmp_path / "file" / "run")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: the cache of compiled programs must be writable")
    assert error.startswith("error: `--workdir` must be writable") and error.endswith("or free the disk")
    assert (tmp_path / "file").read_bytes() == b""


# Signals that come within a callback of the garbage collector, as JAX has one: exceptions there are forgotten.
IN_A_CALLBACK = """
import gc, os, signal, sys, time
from rich.console import Console
from training.cli import interruption, program

def main(console):
    def interrupt(phase, info):
        for _ in range(int(sys.argv[1]) if phase == "start" else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    with program.Stopwatch(console).stage("posterior"):
        gc.callbacks.append(interrupt)
        gc.collect(0)
        gc.callbacks.clear()
        if sys.argv[1] == "2":
            time.sleep(60)
    print("went on")

interruption.SECONDS_TO_UNWIND = 0.5
sys.exit(program.run(main))
"""


@pytest.mark.parametrize(
    ("signals", "last_line"),
    [(1, "stopped after stage posterior"), (2, "stopped at once; what was finished is kept")],
)
def test_signals_in_a_callback_are_not_forgotten(signals, last_line, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CALLBACK, str(signals)],
        cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 130 and "went on" not in done.stdout
    assert done.stderr.splitlines()[-1] == last_line
    assert ("Exception ignored" in done.stderr) == (signals == 2)  # the control: a second one does raise there
