"""The tables of results are those of the kept numbers, and the records of a machine take their place."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from training import sealed

ROOT = Path(__file__).resolve().parents[1]


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
    text = results.README.read_text(encoding="utf-8")
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
    unremarked = [dataclasses.replace(table, remarks=()) for table in results.TABLES]
    monkeypatch.setattr(results, "TABLES", unremarked)
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
    page = results.page(numbers).replace("\N{NO-BREAK SPACE}", " ")
    assert "| Lanczos | 4 [4, 4] | 0.600 [0.500, 0.700] |" in page and "| 0 better, 2 worse of 2 |" in page
    assert "*Measured on cpu, 3 cores, with jax 1.0.*" in page


def test_figures_beside_a_record_are_copied_and_shown(results, tmp_path, monkeypatch):
    """Those that are there: a figure may be missing, and one that was copied before stays."""
    monkeypatch.setattr(results, "ROOT", tmp_path)
    monkeypatch.setattr(results, "IMAGES", tmp_path)
    study = next(table for table in results.TABLES if table.name == "study")
    shown = dataclasses.replace(study, read=lambda _: [], remarks=(), figures={"a.png": "First.", "b.png": "Second."})
    monkeypatch.setattr(results, "TABLES", [shown])
    record = tmp_path / study.record
    record.parent.mkdir(parents=True)
    record.write_text(json.dumps({"versions": {"jax": "0.10.2"}, "device": "cpu", "cores": 2}))
    (record.parent / "b.png").write_bytes(b"picture")
    numbers = {}
    results.update(numbers, [])
    page = "\n".join(results.section(shown, numbers["study"]))
    assert (tmp_path / "study_b.png").read_bytes() == b"picture"
    assert "![Second.](images/study_b.png)" in page and "First." not in page
    assert "With this release of jaxlib sums on CPUs can be wrong." in page


def test_a_record_that_was_edited_is_refused(results, tmp_path):
    """One with a digest; those of benchmarks have none."""
    path = tmp_path / "metrics.json"
    path.write_text(sealed.dump(metrics(0.5), indent=1))
    assert results.read_record(path) == metrics(0.5)
    path.write_text(path.read_text().replace("0.5", "0.75"))
    with pytest.raises(SystemExit, match="metrics.json must be as it was written"):
        results.read_record(path)
    path.write_text(json.dumps(metrics(0.75)))
    assert results.read_record(path) == metrics(0.75)


def metrics(accuracy):
    """The part of `metrics.json` that the tables read."""
    names = ("accuracy", "nll", "ece", "brier", "confidence", "auroc", "fpr95")
    values = {name: {"value": accuracy} for name in names}
    mode = {"decrement": 9.0, "effective_parameters": 16.0}
    worse = {"low": 0.1, "high": 0.3}
    return {
        "environment": {"jax": "1.0", "device": "cpu", "cpu_count": 3},
        "methods": [
            {"label": "MAP", "prior_precision": None, "metrics": values, "difference_from_map": {"nll": None}},
            {"label": "Lanczos", "prior_precision": 4.0, "metrics": values, "difference_from_map": {"nll": worse}},
        ],
        "curves": {"Lanczos": {"log_evidence": [-5.0, -3.0, None]}},
        "gradient_norm": 1.0,
        "prior_gradient_norm": 2.0,
        "mode_in_training": mode,
        "mode_of_evidence": mode,
    }


def test_a_study_of_which_units_are_missing_is_kept(results):
    """A difference whose interval excludes zero is bold; that of the reference to itself is a dash."""
    import study_table

    row = dict(zip(study_table.KEY, study_table.point("map"), strict=True))
    row["numbers"] = {"nll": 0.5, "calibrated": -0.4, "ece": 0.1, "auroc": {"noise": 0.9}}
    row["differences"] = {"MAP + T": {"nll": {"value": 0.2, "low": 0.1, "high": 0.3}, "shift_nll": None}}
    shown = study_table.Shown("study", {study_table.point("map"): "MAP"}, {"few": "10 images"})
    summary = {"regimes": {"few": {"missing": 0, "methods": [row]}}}
    (numbers,) = shown.read([summary])
    assert shown.write(numbers) == [
        *("10 images", "MAP", "0.500", "\N{EN DASH}", "0.400", "\N{EN DASH}", "**+0.200 [+0.100, +0.300]**"),
        *("\N{EN DASH}", "\N{EN DASH}", "0.100", "0.900"),
    ]
    assert len(shown.table("name", "heading", "text", []).columns) == len(numbers)
    summary["regimes"]["few"]["missing"] = 2
    with pytest.raises(KeyError, match="2 units of few"):
        shown.read([summary])


def test_a_remark_that_the_numbers_contradict_is_refused(results):
    """So that new numbers are not published under old sentences."""
    from evidence_studies import SHORT
    from study_table import AGAINST_MAP, AGAINST_T

    numbers = json.loads(results.NUMBERS.read_text(encoding="utf-8"))
    (row,) = [row for row in numbers["study"]["rows"] if row[:2] == ["300 images", "MAP"]]
    row[SHORT.columns.index(AGAINST_T)] = [0.2, -0.1, 0.5]  # no remark rests on this
    results.page(numbers)
    of_bound = "last layer, variational, by the evidence"
    (row,) = [row for row in numbers["study"]["rows"] if row[:2] == ["100 images", of_bound]]
    row[SHORT.columns.index(AGAINST_MAP)] = [-0.1, -0.3, 0.1]
    with pytest.raises(SystemExit, match=r"table 'study' .* contradict: .* by its bound alone is \*\*better than MAP"):
        results.page(numbers)


def test_a_finding_that_a_table_contradicts_is_refused(results):
    """It rests on several tables, which are measured at different times."""
    import in_short
    from study_table import AGAINST_T
    from training_studies import TRAININGS

    numbers = json.loads(results.NUMBERS.read_text(encoding="utf-8"))
    (row,) = [row for row in numbers["study_trainings"]["rows"] if row[:2] == ["100 images", "AdamW: ensemble of five"]]
    row[TRAININGS.columns.index(AGAINST_T)] = [-0.1, -0.3, 0.1]
    with pytest.raises(SystemExit, match=r"an ensemble.* must agree with table 'study_trainings'"):
        in_short.lines(numbers)


def test_every_table_has_a_command_that_measures_it(results):
    """`make measure` writes every record that `make results` reads."""
    import measure

    records = {each.record for each in measure.MEASUREMENTS}
    read = {table.record for table in results.TABLES if table.record}
    assert {record if "/" in record else f"benchmarks/results/{record}" for record in read} <= records
    assert {f"{run}/metrics.json" for run in results.RUNS} <= records
    assert measure.main(["--list", "krylov"]) == 0
