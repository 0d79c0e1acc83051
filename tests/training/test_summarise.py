"""The table over several runs: what is averaged how, and one line for what cannot be averaged."""

import copy
import json
from pathlib import Path

import pytest

from training import sealed, summarise

METRICS = ("accuracy", "nll", "ece", "brier", "confidence", "auroc", "fpr95")


def run_with(seed, nll, precision, low=-1.0, high=1.0):
    """The part of a metrics.json that the table reads."""

    def method(label, precision):
        scores = {name: {"value": nll, "low": nll, "high": nll} for name in METRICS}
        nll_difference = {"value": 0.0, "low": low, "high": high}
        return {
            "label": label,
            "prior_precision": precision,
            "metrics": scores,
            "difference_from_map": {"nll": nll_difference},
        }

    return {
        "format_version": 1,
        "data": "digits",
        "split": "test",
        "ood": "inverted",
        "seed": seed,
        "config": {
            "seed": seed,
            "data": {"dir": f"data/{seed}", "mean": [0.5]},
            "optimizer": {"epochs": 40, "learning_rate": 0.01},
        },
        "num_images": {"test": 360},
        "seconds": {"training": 10.0, "evaluation": 2.5},
        "methods": [method("MAP", None), method("Lanczos (validation NLL, MC)", precision)],
        "curves": {"Lanczos": {"log_evidence": [-9.0, None, -5.0 - seed]}},
    }


@pytest.fixture
def summary(tmp_path, capsys):
    """Return a function that summarises metrics (dictionaries, or raw text); it returns status, stdout and stderr."""

    def run(*contents):
        workdirs = []
        for index, content in enumerate(contents):
            (tmp_path / f"run{index}").mkdir()
            workdirs.append(str(tmp_path / f"run{index}"))
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / f"run{index}" / "metrics.json").write_text(text)
        status = summarise.main(workdirs)
        return status, *capsys.readouterr()

    return run


def test_prior_precisions_are_averaged_geometrically_and_scores_are_not(summary):
    status, printed, _ = summary(run_with(0, 0.1, 100.0), run_with(1, 0.3, 100_000.0), run_with(2, 0.2, 100_000.0))
    header, _, first, second = printed.splitlines()[:4]
    assert status == 0
    assert header.startswith("| method | prior precision (geometric mean) | accuracy |")
    assert first.startswith("| MAP | – | 0.200 [0.100, 0.300] |")
    assert second.startswith("| Lanczos (validation NLL, MC) | 10,000 [100, 100,000] | 0.200 [0.100, 0.300] |")
    assert "digits, test, 360 images; out of distribution: inverted; seeds 0, 1, 2; 12 to 12 s a run." in printed
    assert "Highest log evidence or lower bound on the grid, Lanczos: -6 [-7, -5] nats." in printed


def test_one_run_is_shown_without_a_mean(summary):
    status, printed, _ = summary(run_with(0, None, 0.0834))
    assert status == 0
    assert printed.startswith("| method | prior precision | accuracy |")
    assert "| Lanczos (validation NLL, MC) | 0.0834 | not finite |" in printed


def test_both_formats_are_read(summary):
    """They differ in labels, so that one table cannot hold runs of both."""
    new = run_with(0, 0.1, 1.0) | {"format_version": 2}
    new["methods"][1]["label"] = "Lanczos Laplace (validation NLL, MC)"
    assert "| Lanczos Laplace (validation NLL, MC) | 1 |" in summary(new)[1]


def test_lines_are_never_wrapped(summary):
    _, printed, _ = summary(run_with(0, 0.1, 1.0), run_with(1, 0.1, 1.0))
    assert len([line for line in printed.splitlines() if line.startswith("|")]) == 4


INCOMPLETE = run_with(0, 0.1, 1.0)
del INCOMPLETE["methods"][1]["metrics"]["auroc"]
STRANGE = copy.deepcopy(run_with(0, 0.1, 1.0)) | {"methods": [3]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "must be the metrics of a run in format 1 or 2; got no format"),
        ([], "must be JSON as it was written; the file must be an object; got []"),
        ("3", "must be JSON as it was written; the file must be an object; got 3"),
        (run_with(0, 0.1, 1.0) | {"format_version": 7}, "got format 7"),
        (INCOMPLETE, "complete; got KeyError: 'auroc'"),
        (STRANGE, "complete; got TypeError"),
        ({"format_version": 1}, "complete; got KeyError: 'methods'"),
        ('{"format_version": 1', "must be JSON as it was written"),
    ],
)
def test_foreign_metrics_are_one_line_that_names_the_file(summary, tmp_path, content, message):
    status, printed, error = summary(run_with(0, 0.1, 1.0), content)
    assert status == 2 and printed == "" and error.count("\n") == 1
    assert str(tmp_path / "run1" / "metrics.json") in error and message in error


def test_signed_metrics_are_read(summary):
    signed = sealed.dump(run_with(0, 0.125, 1.0), indent=1)
    assert summary(signed)[0] == 0


def test_a_changed_score_of_signed_metrics_is_refused(summary):
    signed = sealed.dump(run_with(0, 0.125, 1.0), indent=1)
    assert "0.125" in signed
    status, printed, error = summary(signed.replace("0.125", "0.121"))
    assert status == 2 and printed == "" and error.count("\n") == 1
    assert "its entry sha256 must be the digest of all others" in error and "run training.evaluate again" in error


def test_no_runs_at_all_is_one_line(capsys):
    assert summarise.main([]) == 2
    printed, error = capsys.readouterr()
    assert printed == "" and error.count("\n") == 1
    assert (
        "work directories of one or more finished runs must be named; got none; try python -m training.summa" in error
    )


def test_what_is_tried_without_runs_works_in_a_clone(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert summarise.main([]) == 2
    tried = capsys.readouterr().err.split("try python -m training.summarise ")[1].split()
    assert summarise.main(tried) == 0
    assert "| MAP |" in capsys.readouterr().out


def test_runs_of_different_experiments_are_refused(summary):
    status, _, error = summary(run_with(0, 0.1, 1.0), run_with(1, 0.1, 1.0) | {"ood": "noise"})
    assert status == 2 and "compare like with like" in error


def test_runs_of_different_settings_are_one_line_that_names_them(summary):
    other = run_with(1, 0.1, 1.0)
    other["config"]["optimizer"] = {"epochs": 2, "learning_rate": 0.01}
    other["config"]["data"]["augment"] = True
    status, printed, error = summary(run_with(0, 0.1, 1.0), other)
    assert status == 2 and printed == "" and error.count("\n") == 1
    assert "these differ in data.augment: None, True; optimizer.epochs: 40, 2; compare like with like" in error


def test_in_how_many_runs_the_nll_is_told_from_that_of_map(summary):
    intervals = [(-0.3, -0.1), (-0.3, -0.1), (0.1, 0.2), (-0.1, 0.1), (None, None)]
    _, printed, _ = summary(*(run_with(seed, 0.1, 1.0, *interval) for seed, interval in enumerate(intervals)))
    lines = printed.splitlines()
    assert lines[-2:] == [
        "NLL against that of MAP, by the paired 95 % interval of each run:",
        "- Lanczos (validation NLL, MC): better in 2, worse in 1, not told in 2",
    ]
