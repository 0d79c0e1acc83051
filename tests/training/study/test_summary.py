"""Verdicts and means of the summary, from units whose scores are known."""

import dataclasses
import itertools
import json
import re
from typing import Any

import numpy as np
import pytest
import scipy

from bnnlaplace import plots
from training.config import Config
from training.errors import UserError
from training.study import figures, fits, store, summary
from training.study.config import Measures, Posterior, Regime, Study, Training
from training.study.scores import Method
from training.study.store import POINTS, Result, Unit

STUDY = Study(
    config=Config(),
    regimes=(Regime("few"), Regime("empty")),
    seeds=(0, 1, 2),
    trainings=(Training("adamw", weight_decay=0.1), Training("posthoc")),
    measures=Measures(shifts=("blur",), foreign=("noise",)),
)
N, NOISE = 50, np.random.default_rng(0)


def method(training: str, name: str, nll: np.ndarray, ece: float, **description: Any) -> Method:
    described = {"training": training, "method": name, "prior": None, "link": None, "warnings": [], **description}
    numbers = dict.fromkeys(("calibrated", "brier", "accuracy", "confidence", "rejection"), 0.5)
    curve = {"nll": [1.0] * 6, "ece": [0.1] * 6, "accuracy": [0.5] * 6}
    numbers |= {"nll": float(nll.mean()) if np.isfinite(nll).all() else None, "ece": ece}
    arrays = {name: np.full(N, 0.5, np.float32) for name in ("calibrated", "brier", "confidence", "foreign_noise")}
    arrays |= {"nll": np.float32(nll), "accuracy": np.ones(N, np.float32)}
    arrays |= {f"shift_{name}": np.ones((1, 5, N), np.float32) for name in ("nll", "accuracy", "confidence")}
    return Method(described, numbers | {"shifts": {"blur": curve}, "auroc": {"noise": 0.9}}, arrays)


def row_of(root, training: str, name: str) -> dict[str, Any]:
    return next(row for row in read(root)["methods"] if (row["training"], row["method"]) == (training, name))


@pytest.fixture
def root(tmp_path):
    """Three seeds: the second training is better by .2 in NLL in all, and in ECE by .1, .2 and .3."""
    for seed in STUDY.seeds:
        base = 1 + 0.1 * NOISE.normal(size=N)
        reference = [method("adamw", "map", base, 0.4), method("adamw", "map-t-split", base, 0.4, temperature=2.0)]
        ours = [method("posthoc", "map", base - 0.2, 0.4 - 0.1 * (seed + 1))]
        if seed == 0:
            reference.append(method("adamw", "ensemble", np.full(N, np.inf), 0.4))
        for training, methods in (("adamw", reference), ("posthoc", ours)):
            result = Result(methods, None, 10.0 * (seed + 1), {"images": {"test": N}})
            unit = Unit("few", seed, training, POINTS)
            store.save_unit(tmp_path, unit, result, store.settings_of(STUDY, unit))
    return tmp_path


def read(root) -> dict[str, Any]:
    return json.loads((root / "summary" / "summary.json").read_text())["regimes"]["few"]


def test_only_intervals_that_exclude_zero_say_better_and_they_are_those_of_hand_computations(root):
    lines = summary.summarise(root, STUDY, "the command")
    rows = {(row["training"], row["method"]): row for row in read(root)["methods"]}
    against = rows["posthoc", "map"]["differences"]["MAP"]
    assert against["nll"]["value"] == pytest.approx(-0.2, abs=1e-6)
    assert against["nll"]["verdict"] == "better"
    # Student's interval of -.1, -.2, -.3 over three seeds includes zero.
    half = scipy.stats.t.ppf(0.975, 2) * 0.1 / np.sqrt(3)
    assert against["ece"] == {
        "value": pytest.approx(-0.2), "low": pytest.approx(-0.2 - half), "high": pytest.approx(-0.2 + half),
        "verdict": "not told",
    }  # fmt: skip
    # An accuracy that is equal is neither, and an NLL that is not finite is compared with nothing.
    assert against["accuracy"]["verdict"] == "not told"
    assert "nll" not in rows["adamw", "ensemble"]["differences"]["MAP"]
    assert rows["adamw", "ensemble"]["seeds"] == [0]
    assert rows["adamw", "map-t-split"]["temperature"] == 2.0
    assert "own MAP" not in rows["adamw", "map"]["differences"]
    assert read(root)["seconds"]["posthoc.points"] == pytest.approx(20)
    page = (root / "summary" / "summary.md").read_text()
    assert "-0.2 [-0.2, -0.2] better" in page and "the command" in page
    assert any("posthoc: MAP" in line for line in lines)
    assert len(list((root / "summary").glob("few_*.png"))) == 3


def test_missing_and_failed_units_are_told(root):
    failure = Result([], "MemoryError: too large", 1.0, {"images": {"test": N}})
    unit = Unit("few", 2, "posthoc", POINTS)
    store.save_unit(root, unit, failure, store.settings_of(STUDY, unit))
    grown = dataclasses.replace(STUDY, seeds=(0, 1, 2, 3))
    summary.summarise(root, grown, "")
    assert read(root)["missing"] == 2
    assert "failed: posthoc, points, seed 2: MemoryError: too large" in (root / "summary" / "summary.md").read_text()


def test_a_regime_without_results_is_listed_as_missing(root):
    failure = Result([], "MemoryError: too large", 1.0, {"images": {"test": N}})
    failed = dataclasses.replace(STUDY, regimes=(*STUDY.regimes, Regime("failed")))
    unit = Unit("failed", 0, "adamw", POINTS)
    store.save_unit(root, unit, failure, store.settings_of(failed, unit))
    lines = summary.summarise(root, failed, "")
    page = (root / "summary" / "summary.md").read_text().split("\n## ")
    assert "empty: Nothing has been computed: all 6 units are missing." in lines
    assert page[2].splitlines() == ["empty", "", "Nothing has been computed: all 6 units are missing.", ""]
    assert "Images: 50 test. Seeds: none; 5 units are missing." in page[3] and "- failed: adamw, points" in page[3]
    document = json.loads((root / "summary" / "summary.json").read_text())["regimes"]
    assert list(document) == ["few", "empty", "failed"] and document["empty"]["missing"] == 6


def test_one_seed_has_intervals_over_images_alone(root):
    summary.summarise(root, dataclasses.replace(STUDY, seeds=(1,)), "")
    rows = {(row["training"], row["method"]): row for row in read(root)["methods"]}
    against = rows["posthoc", "map"]["differences"]["MAP"]
    assert against["nll"]["verdict"] == "better"
    assert (against["ece"]["low"], against["ece"]["verdict"]) == (None, "not told")


def test_a_temperature_at_an_end_of_its_search_is_told(root):
    for seed, (temperature, at_bound) in enumerate([(0.1, True), (10.0, True), (0.1, True)]):
        unit = Unit("few", seed, "adamw", POINTS)
        ended = method("adamw", "map-t-split", np.ones(N), 0.4, temperature=temperature, temperature_at_bound=at_bound)
        inside = method("adamw", "map-t-part", np.ones(N), 0.4, temperature=2.0, temperature_at_bound=False)
        store.save_unit(root, unit, Result([ended, inside], None, 1.0, {}), store.settings_of(STUDY, unit))
    summary.summarise(root, STUDY, "")
    notes = row_of(root, "adamw", "map-t-split")["reservations"]
    assert notes == [
        f"the temperature is at the end of its search range, {end}, for seed {seeds}: the optimum is not inside it"
        for end, seeds in (("0.1", "0, 2"), ("10", "1"))
    ]
    assert not row_of(root, "adamw", "map-t-part")["reservations"]
    assert "; ".join(notes) in (root / "summary" / "summary.md").read_text()


CHOICES = {(fits.EVIDENCE, "evidence"), (fits.FOLDS, "folds")}


@pytest.mark.parametrize(("named", "chosen_by"), sorted(CHOICES))
def test_figures_show_each_posterior_at_the_prior_of_its_own_choice(root, monkeypatch, named, chosen_by):
    """And through the link of the tables of results, by the names that the study gives or without them."""
    posterior = Posterior("diag", "laplace", chosen_by=chosen_by)
    study = dataclasses.replace(STUDY, posteriors=(posterior,), shown=(f"adamw.{posterior.name}", "posthoc.map"))
    unit, looks, original = Unit("few", 0, "adamw", posterior.name), [], plots.looks
    choices = itertools.product((named, fits.VALIDATION), ("MC", "probit"))
    methods = [method("adamw", posterior.name, np.ones(N), 0.1, prior=prior, link=link) for prior, link in choices]
    store.save_unit(root, unit, Result(methods, None, 1.0, {}), store.settings_of(study, unit))
    monkeypatch.setattr(plots, "looks", lambda shown: looks.append(shown) or original(shown))
    rows = {summary.key_of(each): {0: each} for each in methods}
    assert figures._shown(rows, study) == [("adamw", posterior.name, named, "probit")]
    assert figures._shown(rows, dataclasses.replace(study, shown=())) == figures._shown(rows, study)
    summary.summarise(root, study, "")
    assert [list(shown) for shown in looks] == [[f"adamw: {posterior.name}", "posthoc: MAP"]]


def test_methods_of_figures_that_differ_in_a_bracket_alone_have_whole_names():
    keys = [("adamw", name, None, None) for name in ("map", "map-t-split", "map-t-validation")]
    assert figures._labels(keys) == [
        "MAP", "MAP + T (held-out folds)", "MAP + T (validation images)"
    ]  # fmt: skip
    assert figures._labels(keys[:2]) == ["MAP", "MAP + T"]


def test_results_of_other_settings_are_not_summarised_as_those_of_this_study(root):
    other = dataclasses.replace(STUDY, trainings=(Training("adamw", weight_decay=0.5), STUDY.trainings[1]))
    with pytest.raises(
        UserError, match="adamw.points must be of the settings .* training.weight_decay: 0.1 there, 0.5"
    ):
        summary.summarise(root, other, "")
    assert not (root / "summary").exists()


def test_a_unit_of_other_settings_or_a_damaged_one_is_named(root):
    unit = Unit("few", 0, "adamw", POINTS)
    with pytest.raises(UserError, match="got measures.samples: 100 there, 9 now; put back what it was computed with"):
        store.load_unit(root, unit, {"measures": {"samples": 9, "later": 1}, "regime": {"settings": {}}})
    with pytest.raises(UserError, match="got regime.settings.seed: None there, 3 now; put back"):
        store.load_unit(root, unit, {"regime": {"settings": {"seed": 3}}})
    victim = max((root / unit.place).rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    victim.write_bytes(victim.read_bytes()[:-1] + b"\x00")
    with pytest.raises(UserError, match="must be as it was written"):
        summary.summarise(root, STUDY, "")


def test_small_numbers_are_written_without_powers_of_ten(root):
    unit = Unit("few", 0, "posthoc", POINTS)
    tiny = method("posthoc", "map", np.full(N, 1.41e-5), 1e-6, seconds={"fit": 20.9, "prior": 1e-5})
    store.save_unit(root, unit, Result([tiny], None, 1.0, {}), store.settings_of(STUDY, unit))
    summary.summarise(root, dataclasses.replace(STUDY, seeds=(0,)), "")
    page = (root / "summary" / "summary.md").read_text()
    assert "| 0.0000141 |" in page and "| 0.000001 |" in page and "| 20.9 + 0.00001 |" in page
    assert not re.search(r"\de[+-]\d", page)
