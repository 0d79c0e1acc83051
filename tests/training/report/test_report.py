"""The report says what the results hold: every number, nothing foreign, and verdicts that the intervals support."""

import base64
import dataclasses
import io
import json
import math
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from rich.console import Console

from bnnlaplace.calibration import Interval, bootstrap, rejection_curve
from bnnlaplace.calibration.bootstrap import paired_differences
from bnnlaplace.calibration.metrics import reliability_bins
from bnnlaplace.plots import PrecisionCurve
from bnnlaplace.variational.saturation import TrainingFit
from training.errors import UserError
from training.report import findings
from training.report import html as html_module
from training.report.figures import evidence_keys, method_looks
from training.report.findings import reservations
from training.report.html import draw_figures, print_table, render_report, write_results
from training.report.numbers import difference, digits, number, precision
from training.report.results import (
    Example,
    KrylovResult,
    MethodResult,
    ModeDistance,
    Predictions,
    RunResults,
    difference_from_map,
    write_metrics,
)
from training.report.tables import best_methods

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
        probs, foreign = softmax(sharpness * logits), softmax(sharpness * ood)
        return MethodResult(
            bootstrap=bootstrap(probs, labels, foreign, seed=0, resamples=200),
            reliability=reliability_bins(probs, labels),
            predictions=Predictions(
                probs.argmax(axis=1), probs.max(axis=1), foreign.max(axis=1), rejection_curve(probs, labels)
            ),
            **choices,
        )

    curves = {
        "diagonal": curve(4.5, -1300.0, 300.0),
        "Lanczos": curve(0.8, -700.0, 100.0),
        "Lanczos, variational": curve(1.2, -650.0, 40.0),
    }
    methods = [method(3.0, structure="MAP"), method(1.02, structure="MAP", temperature=2.9)]
    for name, flat in (("diagonal", 0.1), ("Lanczos", 0.2), ("Lanczos, variational", 0.9)):
        best = curves[name]
        kind = {"structure": name.split(",")[0], "approximation": "variational" if "," in name else "Laplace"}
        for choice, value, sharpness in (
            ("evidence", best.evidence_optimum, flat),
            ("validation NLL", best.nll_optimum, 1.0 + flat / 10),
        ):
            for link, factor in (("MC", 1.0), ("probit", 1.3)):
                how = {"prior_choice": choice, "prior_precision": value, "link": link}
                methods.append(method(sharpness * factor, **kind, **how))
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
        class_names=("<i>zero</i>", "one", "two", "three"),
        examples={"typical": [Example(3, np.full((4, 4, 1), 9, np.uint8), int(labels[3]))]},
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
        history=[{"epoch": n, "phase": "train", "loss": 1.0 / (n + 1), "log_evidence": -9.0 + n} for n in range(3)],
        gradient_norm=0.02,
        prior_gradient_norm=10.0,
        mode_in_training=ModeDistance(1.0, 0.5, 300.0),
        mode_of_evidence=ModeDistance(3.0, 9.0, 200.0),
        training_fits={"diagonal": TrainingFit(1.2, 0.1, 4.3), "Lanczos": TrainingFit(2.9, 0.1, 2.3)},
        command=("python", "-m", "training.fit_van", "--seed", "7", "--data.dir", "a <b> c"),
    )


class Page(HTMLParser):
    """Text, tags and attributes of a page, and its tables as rows of cells: the short one, then that of all methods."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words, self.rows, self.best, self.tables, self.in_cell = [], [], [], [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append((tag, attributes))
        if tag == "tr":
            self.rows.append([])
            self.best.append([])
        if tag == "table":
            self.tables.append(len(self.rows))
        if tag in ("td", "th"):
            self.in_cell = True
            self.rows[-1].append("")
            self.best[-1].append(attributes.get("class") == "best")

    def handle_data(self, data):
        self.words.append(data)
        if self.in_cell:
            self.rows[-1][-1] += f" {data}".rstrip()

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")


@pytest.fixture(scope="module")
def html(results, tmp_path_factory):
    directory = tmp_path_factory.mktemp("report") / "deep"
    write_results(directory, results, Console(file=io.StringIO()))
    return (directory / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


# --- report.html ------------------------------------------------------------------------------------------------


def test_the_short_table_has_a_row_for_each_method_with_its_difference_from_map(results, page):
    names = ["MAP", "MAP + temperature", "diagonal Laplace", "Lanczos Laplace", "Lanczos variational"]
    start, end = page.tables
    assert [row[0].strip() for row in page.rows[start + 1 : end]] == names
    for method, row in zip(results.short_table, page.rows[start + 1 : end], strict=True):
        assert method.link in (None, "probit") and method.prior_choice in (None, "evidence")
        for metric, cell in zip(("accuracy", "nll", "ece", "auroc"), row[2:], strict=True):
            interval = method.metrics[metric]
            expected = [number(interval.value), f"{number(interval.low)}–{number(interval.high)}"]
            if method.name != "MAP":
                expected += difference(difference_from_map(results, method)[metric]).split()
            assert cell.split() == expected


def test_every_number_is_in_the_folded_table(results, page):
    rows = page.rows[page.tables[1] + 1 :]
    for method, row in zip(results.methods, rows, strict=True):
        assert row[0].strip() == method.label
        assert row[1].strip() == ("" if method.prior_precision is None else precision(method.prior_precision))
        assert len(row) == 2 + 8
        for interval, cell in zip(method.metrics.values(), row[2:], strict=True):
            assert cell.split() == [number(interval.value), f"{number(interval.low)}–{number(interval.high)}"]


def test_marked_cells_are_the_best_methods(results, page):
    metrics = list(results.methods[0].metrics)
    for method, marks in zip(results.methods, page.best[page.tables[1] + 1 :], strict=True):
        assert marks[2:] == [method.label in best_methods(results.methods, metric) for metric in metrics]


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
    assert len(_sources(page)) == 8
    for source in _sources(page):
        drawing = ElementTree.fromstring(base64.b64decode(source.split(",")[1]))
        assert drawing.tag == "{http://www.w3.org/2000/svg}svg"
    assert all(attributes["alt"] for tag, attributes in page.tags if tag == "img")


def test_strings_are_escaped(page):
    assert not {tag for tag, _ in page.tags} & {"script", "b"}
    assert all(attributes.keys() == {"style"} for tag, attributes in page.tags if tag == "i")  # colours of methods
    assert {attributes["alt"].split(" (")[-1] for tag, attributes in page.tags if tag == "img"} == {f"{HOSTILE})"}
    text = "".join(page.words)
    assert f"Laplace approximations on {HOSTILE}" in text
    assert "a foreign one (<b>inverted</b>)" in text
    assert "training.fit_van \\\n    --seed 7 \\\n    --data.dir 'a <b> c'" in text


@pytest.mark.parametrize(
    ("term", "explained"),
    [
        ("nats", "nats (the unit of natural logarithms)"),
        ("logits", "logits (the outputs before the softmax)"),
        ("link", "link averages the softmax over the Gaussian of the outputs: probit by a formula, MC over posterior"),
        ("log joint", "log joint (log likelihood plus log prior)"),
        ("polishing phase", "polishing phase, the last epochs"),
        ("GGN", "the generalised Gauss-Newton matrix (GGN)"),
        ("Ritz values", "Lanczos approximates them by Ritz values"),
    ],
)
def test_a_term_is_explained_where_it_comes_first(page, term, explained):
    text = " ".join("".join(page.words).split())
    start = text.index(explained)
    assert start <= re.search(rf"\b{term}\b", text).start() < start + len(explained)


def test_configuration_time_and_versions_are_shown(page):
    entries = list(zip(page.words, page.words[1:], strict=False))
    assert ("data.name", HOSTILE) in entries and ("data.mean", "(0.25, 0.5)") in entries
    assert ("training", "12.3") in entries
    assert {"jax", "device"} < set(page.words)


def test_without_out_of_distribution_images_the_columns_go(results):
    def without(evaluated):
        keep = [name for name in evaluated.values if name not in ("auroc", "fpr95")]
        return evaluated._replace(
            values={name: evaluated.values[name] for name in keep},
            replicates={name: evaluated.replicates[name] for name in keep},
        )

    methods = [dataclasses.replace(method, bootstrap=without(method.bootstrap)) for method in results.methods]
    plain = dataclasses.replace(results, ood=None, methods=methods)
    page = Page(render_report(plain, {}))
    assert [len(row) for row in page.rows] == [2 + 3] * page.tables[1] + [2 + 6] * (len(page.rows) - page.tables[1])
    assert "AUROC" not in " ".join(" ".join(row) for row in page.rows)
    assert [headline.metric for headline in findings.headlines(plain)] == ["NLL", "ECE"]
    assert "detection" not in draw_figures(plain)


# --- what is marked, and what is said ---------------------------------------------------------------------------


def test_best_is_marked_only_where_the_paired_interval_justifies_it(results):
    best = best_methods(results.methods, "nll")
    assert "MAP + temperature" in best and "diagonal Laplace (evidence, MC)" not in best
    values = {method.label: method.bootstrap.values["nll"] for method in results.methods}
    assert min(values, key=values.get) in best
    assert best_methods(results.methods, "confidence") == set()
    # Scaling logits changes no decision: every accuracy is the same, and none deserves a mark.
    assert best_methods(results.methods, "accuracy") == set()


def test_marks_follow_the_direction_of_the_metric(results):
    scores = {method.label: method.bootstrap.values["auroc"] for method in results.methods}
    marked = best_methods(results.methods, "auroc")
    assert marked and max(scores, key=scores.get) in marked and min(scores, key=scores.get) not in marked


def test_the_three_numbers_are_those_of_the_foremost_method_with_what_the_images_tell(results):
    assert results.foremost.label == "Lanczos variational (evidence, probit)"
    nll, ece, auroc = findings.headlines(results)
    values = results.foremost.bootstrap.values
    assert [each.value for each in (nll, ece, auroc)] == [number(values[name]) for name in ("nll", "ece", "auroc")]
    of_map, of_temperature = (
        paired_differences(results.foremost.bootstrap, reference.bootstrap)["nll"] for reference in results.methods[:2]
    )
    assert of_map.high < 0 < of_temperature.high
    assert nll.comparisons == [
        f"better than MAP ({number(results.methods[0].bootstrap.values['nll'])}): {difference(of_map)}",
        f"not told apart from MAP + temperature ({number(results.methods[1].bootstrap.values['nll'])}): "
        f"{difference(of_temperature)}",
    ]
    laplace = dataclasses.replace(results, methods=[m for m in results.methods if m.approximation != "variational"])
    assert laplace.foremost.label == "Lanczos Laplace (evidence, probit)"
    worse, _, higher = findings.headlines(laplace)
    assert worse.comparisons[1].startswith("worse than MAP + temperature")
    assert "Training images contradict the evidence of Lanczos Laplace" in reservations(laplace)[0]
    sign = paired_differences(laplace.foremost.bootstrap, laplace.methods[0].bootstrap)["auroc"]
    assert higher.comparisons[0].startswith("better than" if sign.low > 0 else ("not", "worse")[sign.high < 0])


@pytest.mark.parametrize(
    ("interval", "written"),
    [
        ((-0.0004, -0.0009, -0.0001), "−0.0004 [−0.0009, −0.0001]"),
        ((0.0213, 0.0142, 0.0318), "0.021 [0.014, 0.032]"),
        ((0.001, -0.00003, 0.002), "0.00100 [−0.00003, 0.00200]"),
        ((0.0, 0.0, 0.0), "0.000 [0.000, 0.000]"),
        ((np.nan, np.nan, np.nan), "undefined [undefined, undefined]"),
        ((np.inf, 0.5, np.inf), "∞ [0.500, ∞]"),
    ],
)
def test_differences_have_the_digits_that_decide_their_sign(interval, written):
    assert difference(Interval(*interval)).replace("\N{NO-BREAK SPACE}", " ") == written


def test_precisions_of_evidence_and_validation_are_compared(results):
    (sentence,) = findings.about_precisions(results)
    assert sentence == "For Lanczos variational the evidence chose 1.2 and the validation NLL 40, 33 times as large."


def test_a_precision_that_is_kept_from_training_is_called_that(results):
    """In the report, in the legend of its figure and on the console. One that the bound chose is not."""
    sentence = (
        "Variational posteriors keep the prior precision that training chose by the evidence of Lanczos Laplace: "
        "their own lower bound did not choose it."
    )
    name = "Lanczos, variational"
    kept = dataclasses.replace(
        results, curves=results.curves | {name: results.curves[name]._replace(from_training=True)}
    )
    assert findings.about_precisions(kept) == [
        sentence,
        "For Lanczos variational training chose 1.2 and the validation NLL 40, 33 times as large.",
    ]
    for each, count in ((kept, 2), (results, 0)):
        figures = draw_figures(each)
        page = Page(render_report(each, {}))
        assert " ".join(page.words).count(sentence) == count
        words = [text.get_text() for text in figures["evidence"].legends[0].get_texts()]
        assert ("Lanczos variational: ● 1.2 (of training) ◇ 40" in words) == bool(count)
        assert ("precision that the evidence prefers, or of training" in words) == bool(count)
        assert "Lanczos Laplace: ● 0.8 (0.73 to 0.88) ◇ 100" in words
        console = Console(file=io.StringIO(), width=400)
        print_table(console, each)
        assert (sentence in console.file.getvalue()) == bool(count)
    by_diagonal = dataclasses.replace(kept, config={"prior": {"curvature": "diagonal"}})
    assert by_diagonal.kept_precision == sentence.replace("Lanczos Laplace", "diagonal Laplace")


def test_training_fits_say_whether_the_evidence_is_kept(results, page):
    texts = [findings.about_training_fit(name, fit) for name, fit in results.training_fits.items()]
    small, large = (text.replace("\N{NO-BREAK SPACE}", " ") for text in texts)
    assert "an NLL of 1.200 ± 0.100 nats a training image, where the evidence allows 4.300. It is not larger" in small
    assert "2.900 ± 0.100 nats a training image, where the evidence allows 2.300. It is larger: trust neither" in large
    assert f"Lanczos Laplace{texts[1].removeprefix('Lanczos')}" in page.words


# --- what qualifies the numbers ---------------------------------------------------------------------------------


def with_lanczos(results, **changes):
    return dataclasses.replace(
        results, curves=results.curves | {"Lanczos": results.curves["Lanczos"]._replace(**changes)}
    )


def at_temperature_bound(results):
    methods = [dataclasses.replace(m, temperature_at_bound=m.temperature is not None) for m in results.methods]
    return dataclasses.replace(results, methods=methods)


def of_part(results, count):
    return dataclasses.replace(results, config=results.config | {"curvature": {"examples": count}})


QUALIFIED = {
    "validation images": (
        lambda results: dataclasses.replace(
            results, split="validation", num_images={**results.num_images, "validation": NUM_IMAGES}
        ),
        "The evaluated images are the validation images, which also chose the temperature",
    ),
    "part of the images": (
        lambda results: of_part(results, 40),
        "Evidence and curvature are estimates from 40 of 300 training images",
    ),
    "evidence": (
        lambda results: with_lanczos(results, evidence_optimum=1e6, evidence_at_bound=True),
        "The evidence of Lanczos Laplace still rises at the end of its search range, prior precision 1,000,000",
    ),
    "upper end": (
        lambda results: with_lanczos(results, nll_optimum=1000.0, nll_at_bound=True),
        "The validation NLL of Lanczos Laplace is lowest at the upper end of the grid, prior precision 1,000",
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
    "decomposition": (
        lambda results: dataclasses.replace(results, krylov=dataclasses.replace(results.krylov, converged=False)),
        "The decomposition of Lanczos Laplace missed its tolerance: a posterior sample is off by up to 3.1 %",
    ),
    "temperature": (
        at_temperature_bound,
        "The temperature of MAP + temperature is at the end of its search range, 2.90",
    ),
}


@pytest.mark.parametrize("case", QUALIFIED)
def test_what_qualifies_the_numbers_is_said_on_the_console_and_in_the_report(results, case):
    change, sentence = QUALIFIED[case]
    qualified = change(results)
    assert [sentence in each for each in reservations(qualified)] == [True]
    for width in (80, 400):
        console = Console(file=io.StringIO(), width=width)
        print_table(console, qualified)
        _, note = " ".join(console.file.getvalue().split()).split("note: ")
        assert sentence in note
    page = Page(render_report(qualified, {}))
    assert sentence in "".join(page.words)


def test_nothing_is_qualified_without_a_reason(results, page):
    assert reservations(results) == []
    assert "Before reading the numbers" not in page.words


def test_posteriors_that_end_at_one_place_are_one_sentence(results):
    ended = {
        name: curve._replace(nll_optimum=1000.0, nll_at_bound=name != "diagonal")
        for name, curve in results.curves.items()
    }
    (sentence,) = reservations(dataclasses.replace(results, curves=ended))
    assert sentence.startswith("The validation NLL of Lanczos Laplace and Lanczos variational is lowest at the upper")


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
    assert at_bound == [False, True] + [False] * 12


def test_precisions_where_samples_have_not_converged_are_named(results):
    _, sentence = findings.about_precisions(with_lanczos(results, converged=np.arange(7) > 1))
    assert "samples of Lanczos Laplace have not converged at 2 of 7 prior precisions (0.01 to 0.068)" in sentence


def test_hadamard_is_checked_within_the_error(results):
    # 2 standard errors of 1 nat and 0.75 of truncation: 2.7 nats above are allowed, 2.8 are not.
    for excess, holds in ((2.7, True), (2.8, False)):
        lanczos = results.curves["Lanczos"]
        diagonal = results.curves["diagonal"]._replace(log_evidence=lanczos.log_evidence - 1000 * np.r_[0, np.ones(6)])
        diagonal.log_evidence[0] += excess
        changed = reservations(dataclasses.replace(results, curves=results.curves | {"diagonal": diagonal}))
        assert holds == (changed == [])
        assert holds or f"exceeds that of Lanczos by {excess:.2f} nats at prior precision 0.01" in changed[0]


def test_krylov_error_and_modes_are_stated(results, page):
    text = findings.about_krylov(results)
    assert "at most 3.1 %" in text and "between 120.25 and 121.75 nats" in text and text in page.words
    gradient, here, there = findings.about_modes(results)
    assert findings.about_modes(of_part(results, 40)) == []  # the noise of a part would count as a distance
    assert findings.about_modes(of_part(results, 300)) == [gradient, here, there]
    assert "norm of this gradient is 0.02, which is 0.20 % of the norm of the prior's part" in gradient
    away = "standard deviations of the posterior away from the mode"
    assert f"of training, 1, the weights are 0.7 {away}" in here and here.endswith("practical purposes.")
    assert f"prefers, 3, the weights are 3.0 {away}. Samples of the posterior are about 14.1 away from its" in there
    far = dataclasses.replace(results, mode_in_training=ModeDistance(1.0, 50.0, 300.0))
    assert "Train longer" in findings.about_modes(far)[1]


# --- figures ----------------------------------------------------------------------------------------------------


def test_the_evidence_of_training_is_that_of_its_curvature(results):
    """And curves over the prior precision open the report where training recorded none."""
    assert evidence_keys(results) == {"Lanczos Laplace": "log_evidence"}
    both = [record | {"log_evidence_diagonal": -20.0} for record in results.history]
    names = ["Lanczos Laplace", "diagonal Laplace"]
    assert list(evidence_keys(dataclasses.replace(results, history=both))) == names
    by_diagonal = dataclasses.replace(results, config={"prior": {"curvature": "diagonal"}})
    assert evidence_keys(by_diagonal) == {"diagonal Laplace": "log_evidence"}
    by_epoch = draw_figures(results)["evidence_by_epoch"]  # and ends with that of the trained network
    highest = results.curves["Lanczos"].log_evidence.max()
    assert [list(part.lines[0].get_ydata())[-1] for part in by_epoch.axes[0].containers] == [7.0, -highest]
    without = [record | {"log_evidence": None} for record in results.history]
    figures = draw_figures(dataclasses.replace(results, history=without))
    assert list(figures)[0] == "evidence" and "evidence_by_epoch" not in figures


def test_a_method_has_one_colour_in_figures_and_tables(results, html):
    looks = method_looks(results)
    figure = draw_figures(results)["rejection"]
    for line in figure.axes[0].lines:
        name = line.get_label().split(":")[0]
        assert line.get_color() == looks[name].colour
        assert f'<i style="background:{looks[name].colour}"></i>{name}' in html


# --- numbers and records ----------------------------------------------------------------------------------------


def test_numbers_are_written_for_readers():
    assert [number(value) for value in (0.12345, -1.5, -1e-9, 1234.5, np.inf, -np.inf, np.nan)] == [
        "0.123", "−1.500", "0.000", "1,234.500", "∞", "−∞", "undefined",
    ]  # fmt: skip
    assert [precision(value) for value in (0.0834, 1.74, 563.0, 1800.0)] == ["0.083", "1.7", "560", "1,800"]
    assert [digits(value) for value in (1.414e-5, -0.08342, 1.5, 0.0, 56_249.0, 1.2e12)] == [
        "0.0000141", "-0.0834", "1.5", "0", "56,200", "1,200,000,000,000"
    ]  # fmt: skip
    assert [digits(value, sign="+") for value in (1.414e-5, -1e-7, math.inf)] == ["+0.0000141", "-0.0000001", "inf"]


def test_incomplete_records_are_refused(results):
    with pytest.raises(ValueError, match="a label of its own"):
        dataclasses.replace(results, methods=[results.methods[0]] * 2)
    with pytest.raises(ValueError, match="curves must hold Lanczos"):
        dataclasses.replace(results, curves={"diagonal": results.curves["diagonal"]})
    with pytest.raises(ValueError, match="methods must hold Lanczos by the evidence, through probit"):
        dataclasses.replace(results, methods=results.methods[:2])


# --- the console ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "wide"), [(80, False), (140, True)])
def test_table_holds_every_value_at_any_width(results, width, wide):
    console = Console(file=io.StringIO(), width=width)
    print_table(console, results)
    printed = console.file.getvalue()
    assert HOSTILE in printed and "…" not in printed
    numbers = printed.replace("–", " ").split()
    for method in results.short_table:
        assert method.name in printed
        for metric in ("accuracy", "nll", "ece", "auroc"):
            interval = method.metrics[metric]
            assert number(interval.value) in numbers
            assert not wide or f"{number(interval.low)}–{number(interval.high)}" in printed
        if method.name != "MAP":
            assert set(difference(difference_from_map(results, method)["nll"]).split()) <= set(printed.split())
    assert "metrics.json, report.html" in " ".join(printed.split())


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
    assert found["format_version"] == 2 and [method["approximation"] for method in found["methods"][::4]] == [
        None, "Laplace", "Laplace", "variational",
    ]  # fmt: skip
    assert "examples" not in found and "predictions" not in found["methods"][0]
    assert found["training_fits"]["Lanczos"] == {"nll": 2.9, "sem": 0.1, "evidence": 2.3}
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
    assert found["history"][0] == {"epoch": 0, "phase": "train", "loss": 1.0, "log_evidence": -9.0}


def test_a_failed_write_leaves_the_old_file(results, tmp_path, monkeypatch):
    path = tmp_path / "metrics.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"metrics\.json must be writable; got No space left on device; free the disk"):
        write_metrics(path, results)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["metrics.json"]


def test_a_directory_that_cannot_be_made_is_a_clear_error(results, tmp_path, monkeypatch):
    monkeypatch.setattr(html_module, "draw_figures", lambda results: {})
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be writable"):
        write_results(tmp_path / "file", results, Console(file=io.StringIO()))
