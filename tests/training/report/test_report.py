"""The report says what the results hold: every number, nothing foreign, and verdicts that the intervals support."""

import base64
import dataclasses
import io
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from bnnlaplace.calibration import bootstrap
from bnnlaplace.calibration.bootstrap import paired_differences
from bnnlaplace.calibration.metrics import reliability_bins
from bnnlaplace.plots import PrecisionCurve
from training.errors import UserError
from training.report.findings import confidence_gap, findings, number, precision, reservations
from training.report.html import best_methods, draw_figures, print_table, write_report
from training.report.results import KrylovResult, MethodResult, ModeDistance, RunResults, write_metrics

HOSTILE = "\"><script>alert('x')</script> & [bold]"
NUM_IMAGES = 80


def softmax(logits):
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def curve(best, peak, nll_best):
    grid = np.logspace(-2, 3, 7)
    evidence = peak - 20 * np.log(grid / best) ** 2
    nll = 0.1 + 0.05 * np.log(grid / nll_best) ** 2
    return PrecisionCurve(
        precision=grid,
        log_evidence=evidence,
        log_evidence_sem=np.full(7, 1.0),
        log_evidence_truncation=np.full(7, 0.75),
        validation_nll=nll,
        validation_ece=nll / 4,
        converged=np.ones(7, bool),
        evidence_optimum=best,
        evidence_optimum_low=best / 1.1,
        evidence_optimum_high=best * 1.1,
        evidence_at_bound=False,
        nll_optimum=nll_best,
        nll_at_bound=False,
    )


@pytest.fixture(scope="module")
def results():
    """MAP overconfident, temperature right, Laplace at the evidence underconfident, at the validation NLL right."""
    rng = np.random.default_rng(0)
    logits, ood = 3 * rng.normal(size=(NUM_IMAGES, 4)), rng.normal(size=(50, 4))
    labels = (softmax(logits).cumsum(axis=1) < rng.random((NUM_IMAGES, 1))).sum(axis=1)

    def method(sharpness, **choices):
        probs = softmax(sharpness * logits)
        evaluated = bootstrap(probs, labels, softmax(sharpness * ood), seed=0, resamples=200)
        return MethodResult(bootstrap=evaluated, reliability=reliability_bins(probs, labels), **choices)

    curves = {"diagonal": curve(4.5, -1300.0, 300.0), "Lanczos": curve(0.8, -700.0, 100.0)}
    methods = [method(3.0, structure="MAP"), method(1.02, structure="MAP", temperature=2.9)]
    for structure, flat in (("diagonal", 0.1), ("Lanczos", 0.2)):
        best = curves[structure]
        for choice, value, sharpness in (
            ("evidence", best.evidence_optimum, flat),
            ("validation NLL", best.nll_optimum, 1.0 + flat / 10),
        ):
            for link, factor in (("MC", 1.0), ("probit", 1.3)):
                methods.append(
                    method(
                        sharpness * factor, structure=structure, prior_choice=choice, prior_precision=value, link=link
                    )
                )
    return RunResults(
        data=HOSTILE,
        num_images={"train": 300, "validation": 60, "test": NUM_IMAGES},
        split="test",
        num_evaluated=NUM_IMAGES,
        num_foreign=NUM_IMAGES,
        ood="<b>inverted</b>",
        num_weights=12345,
        seed=7,
        config={"seed": 7, "data": {"name": HOSTILE, "dir": Path("somewhere"), "mean": (0.25, 0.5)}},
        seconds={"training": 12.3, "evaluation": 4.5},
        methods=methods,
        curves=curves,
        curve_link="MC",
        krylov=KrylovResult(
            5,
            40,
            8,
            True,
            0.031,
            120.25,
            121.75,
            200.0,
            np.array([100.0, 10.0, 1e-3, -1e-9]),
            np.array([0.0, 0.1, 0.5, 0.1]),
        ),
        history=[{"epoch": n, "phase": "train", "loss": 1.0 / (n + 1), "gradient_norm": None} for n in range(3)],
        gradient_norm=0.02,
        prior_gradient_norm=10.0,
        mode_in_training=ModeDistance(1.0, 0.5, 300.0),
        mode_of_evidence=ModeDistance(3.0, 9.0, 200.0),
    )


class Page(HTMLParser):
    """Text, tags and attributes of a page, and its table as rows of cells."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.rows, self.best = [], [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
            self.best.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self.best[-1].append(attributes.get("class") == "best")

    def handle_data(self, data):
        self.words.append(data)
        if self.rows and any(tag in ("td", "th") for tag, _ in self.tags[-3:]):
            self.rows[-1][-1] += f" {data}".rstrip()


@pytest.fixture(scope="module")
def html(results, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "deep" / "report.html"
    write_report(path, results, draw_figures(results))
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# --- report.html ------------------------------------------------------------------------------------------------


def test_every_number_is_in_the_table(results, page):
    assert len(page.rows) == 1 + len(results.methods)
    for method, row in zip(results.methods, page.rows[1:], strict=True):
        assert row[0].strip() == method.label
        assert row[1].strip() == ("" if method.prior_precision is None else precision(method.prior_precision))
        assert len(row) == 2 + 8
        for interval, cell in zip(method.metrics.values(), row[2:], strict=True):
            assert cell.split() == [number(interval.value), f"{number(interval.low)}–{number(interval.high)}"]


def test_marked_cells_are_the_best_methods(results, page):
    metrics = list(results.methods[0].metrics)
    for method, marks in zip(results.methods, page.best[1:], strict=True):
        assert marks[2:] == [method.label in best_methods(results, metric) for metric in metrics]


def test_report_is_self_contained_and_well_formed(html, page):
    outside_figures = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//|url\(|@import", outside_figures)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "a"}
    assert all(source.startswith("data:image/svg+xml;base64,") for source in _sources(page))
    opened = [tag for tag, _ in page.tags if tag not in ("meta", "img")]
    assert sorted(opened) == sorted(re.findall(r"</(\w+)>", outside_figures))
    assert html.startswith("<!DOCTYPE html>") and ("meta", {"charset": "utf-8"}) in page.tags


def _sources(page):
    return [attributes["src"] for tag, attributes in page.tags if tag == "img"]


def test_figures_are_embedded_whole(page):
    assert len(_sources(page)) == 4
    for source in _sources(page):
        drawing = ElementTree.fromstring(base64.b64decode(source.split(",")[1]))
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_strings_are_escaped(page):
    assert not {tag for tag, _ in page.tags} & {"script", "b"}
    assert {attributes["alt"].split(" (")[-1] for tag, attributes in page.tags if tag == "img"} == {f"{HOSTILE})"}
    text = "".join(page.words)
    assert f"Laplace approximations on {HOSTILE}" in text
    assert "<b>inverted</b> images" in text


def test_configuration_time_and_versions_are_shown(page):
    entries = list(zip(_texts_of(page, "dt"), _texts_of(page, "dd"), strict=True))
    assert ("data.name", HOSTILE) in entries and ("data.mean", "(0.25, 0.5)") in entries
    assert ("training", "12.3") in entries
    assert "jax" in dict(entries) and "device" in dict(entries)


def _texts_of(page, wanted):
    """Texts of the elements of one tag, read from the words between the right headings."""
    words = iter(page.words[len(page.words) - page.words[::-1].index("The run") :])
    headings = ("Seconds", "Configuration", "Software and device")
    pairs = [word for word in words if word.strip() and word not in headings]
    return pairs[0::2] if wanted == "dt" else pairs[1::2]


def test_without_out_of_distribution_images_the_columns_go(results, tmp_path):
    def without(evaluated):
        keep = [name for name in evaluated.values if name not in ("auroc", "fpr95")]
        return evaluated._replace(
            values={name: evaluated.values[name] for name in keep},
            replicates={name: evaluated.replicates[name] for name in keep},
        )

    methods = [dataclasses.replace(method, bootstrap=without(method.bootstrap)) for method in results.methods]
    plain = dataclasses.replace(results, ood=None, methods=methods)
    write_report(tmp_path / "report.html", plain, {})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert [len(row) for row in page.rows] == [2 + 6] * len(page.rows)
    assert "AUROC" not in " ".join(" ".join(row) for row in page.rows)


# --- what is marked, and what is said ---------------------------------------------------------------------------


def test_best_is_marked_only_where_the_paired_interval_justifies_it(results):
    best = best_methods(results, "nll")
    assert "MAP + temperature" in best and "diagonal (evidence, MC)" not in best
    values = {method.label: method.bootstrap.values["nll"] for method in results.methods}
    assert min(values, key=values.get) in best
    assert best_methods(results, "confidence") == set()
    # Scaling logits changes no decision: every accuracy is the same, and none deserves a mark.
    assert best_methods(results, "accuracy") == set()


def test_marks_follow_the_direction_of_the_metric(results):
    scores = {method.label: method.bootstrap.values["auroc"] for method in results.methods}
    marked = best_methods(results, "auroc")
    assert marked and max(scores, key=scores.get) in marked and min(scores, key=scores.get) not in marked


def said(results, title):
    matching = [finding.text for finding in findings(results) if title in finding.title]
    assert len(matching) == 1
    return matching[0].replace("\N{NO-BREAK SPACE}", " ")


def test_confidence_is_judged_by_its_interval(results):
    by_label = {method.label: method for method in results.methods}
    assert confidence_gap(by_label["MAP"].bootstrap).low > 0
    assert confidence_gap(by_label["diagonal (evidence, MC)"].bootstrap).high < 0
    assert said(results, "Which prediction is best").endswith("overconfident.")
    text = said(results, "Diagonal Laplace")
    at_evidence, at_validation = text.split(" At the precision of the ")[1:]
    assert "The predictions are underconfident:" in at_evidence
    assert "The predictions are neither over- nor underconfident beyond chance" in at_validation


def test_best_prediction_is_compared_by_paired_intervals(results):
    text = said(results, "Which prediction is best")
    best = min(results.methods, key=lambda method: method.bootstrap.values["nll"])
    assert f"of {best.label}." in text
    difference = paired_differences(best.bootstrap, results.methods[0].bootstrap)["nll"]
    assert difference.high < 0
    assert (
        f"lower than that of MAP (difference {number(difference.value)} "
        f"[{number(difference.low)}, {number(difference.high)}])" in text
    )
    assert "not distinguishable from that of MAP + temperature" in text or best.temperature is not None


def test_evidence_and_validation_optimum_are_compared(results):
    assert "The evidence prefers prior precision 0.8, the validation NLL 100: 120 times larger" in said(
        results, "Lanczos Laplace"
    )
    agreeing = results.curves["Lanczos"]._replace(nll_optimum=1.2)
    agreed = dataclasses.replace(results, curves={"Lanczos": agreeing})
    assert "the two agree within a factor of two" in said(agreed, "Lanczos Laplace")


# --- what qualifies the numbers ---------------------------------------------------------------------------------


def with_lanczos(results, **changes):
    return dataclasses.replace(
        results, curves=results.curves | {"Lanczos": results.curves["Lanczos"]._replace(**changes)}
    )


def at_temperature_bound(results):
    methods = [dataclasses.replace(m, temperature_at_bound=m.temperature is not None) for m in results.methods]
    return dataclasses.replace(results, methods=methods)


QUALIFIED = {
    "validation images": (
        lambda results: dataclasses.replace(
            results, split="validation", num_images={**results.num_images, "validation": NUM_IMAGES}
        ),
        "The evaluated images are the validation images, which also chose the temperature",
    ),
    "evidence": (
        lambda results: with_lanczos(results, evidence_optimum=1e6, evidence_at_bound=True),
        "The evidence of the Lanczos posterior still rises at the end of its search range, prior precision 1,000,000",
    ),
    "upper end": (
        lambda results: with_lanczos(results, nll_optimum=1000.0, nll_at_bound=True),
        "The validation NLL of the Lanczos posterior is lowest at the upper end of the grid, prior precision 1,000",
    ),
    "lower end": (
        lambda results: with_lanczos(results, nll_optimum=0.01, nll_at_bound=True),
        "lowest at the lower end of the grid, prior precision 0.01",
    ),
    "end of what has converged": (
        lambda results: with_lanczos(results, nll_optimum=10.0, nll_at_bound=True, converged=np.arange(7) > 3),
        "lowest at the end of that part of the grid where it is finite and the samples have converged, prior "
        "precision 10",
    ),
    "temperature": (
        at_temperature_bound,
        "The temperature of MAP + temperature is at the end of its search range, 2.90",
    ),
}


@pytest.mark.parametrize("case", QUALIFIED)
def test_what_qualifies_the_numbers_is_said_on_the_console_and_in_the_report(results, case, tmp_path):
    change, sentence = QUALIFIED[case]
    qualified = change(results)
    assert sentence in said(qualified, "Before reading the numbers")
    for width in (80, 400):
        console = Console(file=io.StringIO(), width=width)
        print_table(console, qualified)
        _, note = " ".join(console.file.getvalue().split()).split("note: ")
        assert sentence in note
    write_report(tmp_path / "report.html", qualified, {})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert sentence in "".join(page.words)


def test_nothing_is_qualified_without_a_reason(results):
    assert reservations(results) == []
    assert "Before reading the numbers" not in [finding.title for finding in findings(results)]


def test_what_qualifies_the_numbers_is_in_the_metrics(results, tmp_path):
    def metrics(of):
        write_metrics(tmp_path / "metrics.json", of)
        return json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"))

    plain = metrics(results)
    assert plain["held_out"] is True and plain["chosen_on"] == "validation"
    assert [plain["curves"]["Lanczos"][flag] for flag in ("evidence_at_bound", "nll_at_bound")] == [False, False]
    assert not any(method["temperature_at_bound"] for method in plain["methods"])
    assert metrics(QUALIFIED["validation images"][0](results))["held_out"] is False
    assert metrics(QUALIFIED["evidence"][0](results))["curves"]["Lanczos"]["evidence_at_bound"] is True
    ended = metrics(QUALIFIED["end of what has converged"][0](results))["curves"]["Lanczos"]
    assert ended["nll_at_bound"] is True and ended["converged"] == [False] * 4 + [True] * 3
    at_bound = [method["temperature_at_bound"] for method in metrics(at_temperature_bound(results))["methods"]]
    assert at_bound == [False, True] + [False] * 8


def test_precisions_where_samples_have_not_converged_are_named(results):
    text = said(with_lanczos(results, converged=np.arange(7) > 1), "Krylov")
    assert "samples of Lanczos have not converged at 2 of 7 prior precisions: 0.01, 0.068. There" in text
    assert "the validation NLL chooses among the other precisions alone" in text
    assert "On the grid" not in said(results, "Krylov")


# --- comparisons ------------------------------------------------------------------------------------------------


def test_structures_are_compared_at_their_evidence_optimum(results):
    text = said(results, "Structures, each at its evidence optimum")
    assert text.startswith("With the MC predictive, Lanczos has the lower NLL")
    assert "lower than that of diagonal (evidence, MC)" in text and "With the probit predictive, Lanczos" in text


def test_hadamard_is_checked_within_the_error(results):
    assert "that holds at every precision of the grid" in said(results, "Evidence")
    # 2 standard errors of 1 nat and 0.75 of truncation: 2.7 nats above are allowed, 2.8 are not.
    for excess, holds in ((2.7, True), (2.8, False)):
        lanczos = results.curves["Lanczos"]
        diagonal = results.curves["diagonal"]._replace(log_evidence=lanczos.log_evidence - 1000 * np.r_[0, np.ones(6)])
        diagonal.log_evidence[0] += excess
        changed = dataclasses.replace(results, curves={"diagonal": diagonal, "Lanczos": lanczos})
        text = said(changed, "Evidence")
        assert ("that holds" in text) == holds
        assert (f"by {excess:.2f} nats at precision 0.01" in text) != holds


def test_krylov_error_and_convergence_are_stated(results):
    text = said(results, "Krylov")
    assert "at most 3.1 %" in text and "1.50 nats (between 120.25 and 121.75)" in text and "are converged" in text
    stopped = dataclasses.replace(results, krylov=dataclasses.replace(results.krylov, converged=False))
    assert "are not converged" in said(stopped, "Krylov")


def test_gradient_at_the_mode_is_judged(results):
    near = said(results, "mode")
    assert "norm 0.02, 0.20 % of the norm of the prior's gradient" in near
    assert "of training, 1, the mode is 0.7 standard deviations" in near and "promises 0.2 nats: a mode" in near
    assert (
        "evidence prefers, 3, it is 3.0 standard deviations of the posterior away, where a sample is about 14.1" in near
    )
    far = dataclasses.replace(results, mode_in_training=ModeDistance(1.0, 50.0, 300.0))
    assert "not quite a mode" in said(far, "mode")


def test_numbers_are_written_for_readers():
    assert [number(value) for value in (0.12345, -1.5, -1e-9, 1234.5, np.inf, -np.inf, np.nan)] == [
        "0.123", "−1.500", "0.000", "1,234.500", "∞", "−∞", "undefined",
    ]  # fmt: skip
    assert [precision(value) for value in (0.0834, 1.74, 563.0, 1800.0)] == ["0.083", "1.7", "560", "1,800"]


def test_incomplete_records_are_refused(results):
    with pytest.raises(ValueError, match="a label of its own"):
        dataclasses.replace(results, methods=[results.methods[0]] * 2)
    with pytest.raises(ValueError, match="curves must hold Lanczos"):
        dataclasses.replace(results, curves={"diagonal": results.curves["diagonal"]})


# --- the console ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "wide"), [(80, False), (140, True)])
def test_table_holds_every_value_at_any_width(results, width, wide):
    console = Console(file=io.StringIO(), width=width)
    print_table(console, results)
    printed = console.file.getvalue()
    assert HOSTILE in printed and "…" not in printed
    numbers = printed.replace("–", " ").split()
    for method in results.methods:
        for interval in method.metrics.values():
            assert number(interval.value) in numbers
            assert not wide or f"{number(interval.low)}–{number(interval.high)}" in printed
    assert ("Intervals: metrics.json" in printed) != wide


# --- metrics.json -----------------------------------------------------------------------------------------------


def test_metrics_round_trip(results, tmp_path):
    write_metrics(tmp_path / "metrics.json", results)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    found = json.loads((tmp_path / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert found["seed"] == 7 and found["data"] == HOSTILE and found["num_weights"] == 12345
    assert found["config"]["data"] == {"name": HOSTILE, "dir": "somewhere", "mean": [0.25, 0.5]}
    assert {"jax", "numpy", "python", "platform", "device"} <= set(found["environment"])
    assert found["seconds"] == {"training": 12.3, "evaluation": 4.5}
    assert [method["label"] for method in found["methods"]] == [method.label for method in results.methods]
    for stored, method in zip(found["methods"], results.methods, strict=True):
        for name, interval in method.metrics.items():
            assert stored["metrics"][name] == interval._asdict()
        assert stored["difference_from_map"]["nll"]["value"] == pytest.approx(
            method.bootstrap.values["nll"] - results.methods[0].bootstrap.values["nll"], rel=1e-12, abs=1e-15
        )
        assert stored["reliability"]["counts"] == method.reliability.counts.tolist()
    empty = int(np.flatnonzero(results.methods[0].reliability.counts == 0)[0])
    assert found["methods"][0]["reliability"]["accuracy"][empty] is None
    assert found["curves"]["Lanczos"]["log_evidence"] == results.curves["Lanczos"].log_evidence.tolist()
    assert found["krylov"]["converged"] is True and found["krylov"]["ritz_values"][0] == 100.0
    assert found["history"][0] == {"epoch": 0, "phase": "train", "loss": 1.0, "gradient_norm": None}


def test_a_failed_write_leaves_the_old_file(results, tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"metrics\.json must be writable; got No space left on device; free the disk"):
        write_metrics(path, results)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["metrics.json"]


def test_a_directory_that_cannot_be_made_is_a_clear_error(results, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be writable"):
        write_report(tmp_path / "file" / "report.html", results, {})
