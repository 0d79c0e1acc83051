"""The example and the tables of the README are what the package does and what `docs/results.json` holds."""

import importlib.util
import json
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"


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


def test_the_example_runs_with_nothing_but_the_package_installed(trained, tmp_path, monkeypatch):
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


def test_the_readme_is_short_and_its_links_lead_somewhere():
    text = README.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert [target for target in targets if "://" not in target and not (ROOT / target).exists()] == []
    assert (ROOT / "docs/images/readme.png").stat().st_size < 200_000


@pytest.fixture
def results(monkeypatch):
    """The program behind `make results`."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec = importlib.util.spec_from_file_location("results", ROOT / "docs" / "results.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_those_of_the_kept_numbers(results):
    """So that nobody edits a number by hand: `make results` in a clone changes nothing."""
    numbers = json.loads(results.NUMBERS.read_text(encoding="utf-8"))
    text = README.read_text(encoding="utf-8")
    assert results.readme(text, numbers) == text
    assert results.page(numbers) == results.PAGE.read_text(encoding="utf-8")
    assert results.in_rows(numbers) == results.NUMBERS.read_text(encoding="utf-8")


def test_results_come_from_the_records_of_this_machine_where_they_are_whole(results, tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    folder = tmp_path / "benchmarks" / "results"
    folder.mkdir(parents=True)
    common = {"versions": {"jax": "1.0"}, "platform": "cpu", "device": "cpu", "cores": 3}
    products = {
        "speedup_over_grouped": 2.5,
        "largest_relative_difference": 1e-6,
        "digits_one_vector": {"seconds": 0.25},
    }
    (folder / "ggn_products.json").write_text(json.dumps(common | products))
    (folder / "evidence.json").write_text(json.dumps(common | {"matfree": None, "steps": 400}))
    for seed, accuracy in enumerate((0.5, 0.7)):
        run = tmp_path / f"run_{seed}"
        run.mkdir()
        (run / "metrics.json").write_text(json.dumps(metrics(accuracy)))

    numbers = json.loads(results.NUMBERS.read_text(encoding="utf-8"))
    kept = json.dumps(numbers["evidence"])
    report = results.update(numbers, [tmp_path / "run_0", tmp_path / "run_1"])
    assert numbers["products"]["environment"] == {"jax": "1.0", "device": "cpu", "cores": 3}
    assert [row[1] for row in numbers["products"]["rows"]] == [2.5, 1e-6, 250]
    assert json.dumps(numbers["evidence"]) == kept
    assert any("evidence: kept, as the record lacks 'classes_10'" in line for line in report)
    assert any("krylov: kept, as this machine has no benchmarks/results/krylov.json" in line for line in report)
    label, precision, accuracy, *_ = numbers["methods"]["rows"][1]
    assert (label, precision) == ("Lanczos", pytest.approx([4.0, 4.0, 4.0]))
    assert accuracy == pytest.approx([0.6, 0.5, 0.7])
    assert numbers["evidence_of_runs"]["rows"] == [["Lanczos", [-3.0, -3.0, -3.0]]]
    assert numbers["modes"]["rows"][0][1:] == pytest.approx([50, 50])
    assert numbers["modes"]["rows"][1][1:] == pytest.approx([3, 3])
    assert "| Lanczos | 4 [4, 4] | 0.600 [0.500, 0.700] |" in results.page(numbers)
    assert "*Measured on cpu, 3 cores, with jax 1.0.*" in results.page(numbers)


def metrics(accuracy):
    """The part of `metrics.json` that the tables read."""
    names = ("accuracy", "nll", "ece", "brier", "confidence", "auroc", "fpr95")
    values = {name: {"value": accuracy} for name in names}
    mode = {"decrement": 9.0, "effective_parameters": 16.0}
    return {
        "environment": {"jax": "1.0", "device": "cpu", "cpu_count": 3},
        "methods": [
            {"label": "MAP", "prior_precision": None, "metrics": values},
            {"label": "Lanczos", "prior_precision": 4.0, "metrics": values},
        ],
        "curves": {"Lanczos": {"log_evidence": [-5.0, -3.0, None]}},
        "gradient_norm": 1.0,
        "prior_gradient_norm": 2.0,
        "mode_in_training": mode,
        "mode_of_evidence": mode,
    }
