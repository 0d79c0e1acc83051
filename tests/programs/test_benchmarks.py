"""Benchmarks run, and write what they print."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_krylov_benchmark_runs_small():
    command = [sys.executable, "benchmarks/krylov.py", "--small", "--parts", "headline", "hilbert"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    assert "projection / backpropagation" in done.stdout
    record = json.loads((ROOT / "benchmarks/results/krylov_small_headline_hilbert.json").read_text())
    assert {"headline", "hilbert"} <= set(record)
    assert (ROOT / "benchmarks/results/krylov_small_hilbert.png").stat().st_size > 0


def test_posterior_benchmark_runs_small():
    """Our side, and the peer's where it is installed."""
    command = [sys.executable, "benchmarks/laplace_torch.py", "--small", "--classes", "3"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads((ROOT / "benchmarks/results/laplace_torch_small.json").read_text())
    assert record["time"]["mlp 8-6-6, 3 classes, full"]["ours"]["medians"]["total"] > 0
    (memory,) = record["memory"].values()
    assert memory["ours"] >= 0  # so small a network may fit into what the process has


def test_evidence_benchmark_runs_small():
    command = [sys.executable, "benchmarks/evidence.py", "--small"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    cases = json.loads((ROOT / "benchmarks/results/evidence_small.json").read_text())["classes_3"]["cases"]
    # Derivatives in a scalar prior precision take no memory beyond the value's, since they need no adjoint.
    assert cases["ours, d delta"]["memory_bytes"] < 1.1 * cases["ours, value"]["memory_bytes"]
    assert cases["ours, 400 steps"]["seconds"] > 0
