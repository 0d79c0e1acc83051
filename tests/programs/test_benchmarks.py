"""Benchmarks run, write what they print, and never over a record of other options."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(name: str, *options: str) -> tuple[dict, str]:
    """Run a benchmark; return its record and its output."""
    command = [sys.executable, f"benchmarks/{name}.py", *options]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    (record,) = re.findall(r"written to (\S+\.json)", done.stdout)
    return json.loads(Path(record).read_text()), done.stdout


def test_krylov_benchmark_runs_small():
    record, output = run("krylov", "--small", "--parts", "headline", "hilbert")
    assert "projection / backpropagation" in output
    assert {"headline", "hilbert"} <= set(record)
    (figure,) = re.findall(r"written to (\S+\.png)", output)
    assert Path(figure).stat().st_size > 0


def test_posterior_benchmark_runs_small():
    """Our side, and the peer's where it is installed."""
    record, _ = run("laplace_torch", "--small", "--classes", "3")
    assert record["time"]["mlp 8-6-6, 3 classes, full"]["ours"]["medians"]["total"] > 0
    (memory,) = record["memory"].values()
    assert memory["ours"] >= 0  # so small a network may fit into what the process has


def test_evidence_benchmark_runs_small():
    record, _ = run("evidence", "--small")
    cases = record["classes_3"]["cases"]
    # Derivatives in a scalar prior precision take no memory beyond the value's, since they need no adjoint.
    assert cases["ours, d delta"]["memory_bytes"] < 1.1 * cases["ours, value"]["memory_bytes"]
    assert cases["ours, 400 steps"]["seconds"] > 0


def test_product_benchmark_runs_small():
    record, _ = run("ggn_products", "--small")
    assert record["digits_diagonal"]["seconds"] > 0 and record["largest_relative_difference"] < 1e-5


def test_benchmark_of_many_classes_runs_small():
    record, _ = run("many_classes", "--small")
    (case,) = record["results"].values()
    assert set(case["again"]) == {"fit", "probit", "mc"} and case["memory_mb"] > 0


def test_kronecker_benchmark_runs_small():
    record, _ = run("kronecker", "--small")
    results = record["models"]["cnn"]
    assert results["delta 1, exact blocks"]["variance_to_exact_blocks"] == 1
    assert results["delta 1, partial_traces"]["evidence"] < 0


def test_continual_benchmark_runs_small():
    """Two tasks: whitening errs less than adding factors, and the diagonal in some eigenvectors never below the sum."""
    record, _ = run("continual", "--small")
    for cases in record["tasks"].values():
        for errors in cases.values():
            assert abs(errors["whitened"]["error"]) < abs(errors["added factors"]["error"])
            assert errors["corrected"]["error"] > -1e-6


def test_many_outputs_benchmark_runs_small():
    """Its closed forms are an oracle of their own: both sides agree to the rounding of float32."""
    record, _ = run("many_outputs", "--small")
    (cases,) = record["results"].values()
    differences = [sides["bnnlaplace"]["difference"] for name, sides in cases.items() if not name.startswith("full")]
    assert len(differences) == 5 and max(differences) < 1e-5


def test_joint_training_benchmark_runs_small():
    record, _ = run("joint_training", "--small", "--matvecs", "2")
    assert record["cases"]["joint, Lanczos adjoint"]["seconds"] > 0 and record["over_a_plain_step"]["plain step"] == 1


def test_walks_are_counted():
    record, _ = run("walks")
    for name, walk in record["walks"].items():
        assert 1 < walk["files"] == len(walk["order"]) <= 1 + walk["moves"], name


def load(name: str):
    """Import a module of the benchmarks, which are scripts rather than a package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where a dataclass looks for its module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("small", [False, True])
def test_no_two_cases_of_a_run_share_a_name(small):
    names = [case.name for case in load("laplace_torch_cases").cases((10, 100), small)]
    assert len(names) == len(set(names)) > 10


def test_records_of_other_options_have_other_names(tmp_path, monkeypatch):
    record = load("record")

    def main(workdir: Path, classes: tuple = (10, 100), weights: bool = True, small: bool = False, rounds: int = 3):
        pass

    def name(workdir="checkpoints/van", classes=(10, 100), weights=True, small=False, rounds=3):
        options = {"workdir": ROOT / workdir, "classes": classes, "weights": weights, "small": small, "rounds": rounds}
        return record.record_name("evidence", main, options)

    assert name() == "evidence_van"
    assert name(classes=(3,), weights=False, small=True, rounds=1) == "evidence_van_classes_3_no_weights_small_rounds_1"
    names = [name(), name("other/van"), name(tmp_path / "van"), name(classes=(10,)), name(rounds=1), name(small=True)]
    assert len(set(names)) == len(names)

    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert json.loads(record.write("x", {"rows": [1]}).read_text())["rows"] == [1]
    with pytest.raises(ValueError, match=r"must not have \['device'\] twice"):
        record.write("x", {"device": "mine"})
