"""Figures of rejection, detection and shifts draw what they were given, each method in its colour everywhere."""

import re

import matplotlib
import numpy as np
import pytest
from readable import assert_readable

from bnnlaplace import plots
from bnnlaplace.calibration import Interval, auroc, rejection_curve
from bnnlaplace.plots import Confidences, PrecisionCurve

NAMES = ("MAP", "MAP + temperature", "Lanczos, variational", "diagonal, Laplace", "ensemble of five")


def rejection(seed, size=200):
    rng = np.random.default_rng(seed)
    probs = rng.dirichlet(np.full(3, 0.4), size=size)
    return rejection_curve(probs, (probs.cumsum(axis=1) < rng.random((size, 1))).sum(axis=1))


def confidences(seed):
    rng = np.random.default_rng(seed)
    return Confidences(rng.beta(8, 1, 120), rng.beta(3, 2, 90))


def intervals(seed):
    values = 0.1 * 1.6 ** np.arange(6) + 0.02 * seed
    return [Interval(value, 0.9 * value, 1.2 * value) for value in values]


REJECTION = {name: rejection(seed) for seed, name in enumerate(NAMES)}
CONFIDENCES = {name: confidences(seed) for seed, name in enumerate(NAMES)}
SHIFTS = {
    shift: {name: intervals(seed) for seed, name in enumerate(NAMES)}
    for shift in ("rotation", "noise", "blur", "contrast", "brightness")
}


def test_rejection_curves_end_where_twenty_images_are_left():
    figure = plots.rejection_curves(REJECTION)
    for line, (name, curve) in zip(figure.axes[0].lines, REJECTION.items(), strict=True):
        np.testing.assert_allclose(line.get_xdata(), 100 * curve.rejection[:181])
        np.testing.assert_allclose(line.get_ydata(), 100 * curve.accuracy[:181])
        assert line.get_label() == f"{name}: area {curve.area:.4f}"
    assert_readable(figure)
    few = plots.rejection_curves({"MAP": rejection(0, size=5)}).axes[0].lines[0]
    assert len(few.get_xdata()) == 1


@pytest.mark.parametrize("count", [1, 2, 5])
def test_detection_figure(count):
    methods = {name: CONFIDENCES[name] for name in NAMES[:count]}
    figure = plots.detection_figure(methods)
    roc, *histograms = figure.axes
    assert len(histograms) == count
    for line, (name, pair) in zip(roc.lines, methods.items(), strict=False):
        assert line.get_label() == f"{name}: AUROC {auroc(*pair):.3f}"
        x, y = line.get_xdata() / 100, line.get_ydata() / 100
        assert np.trapezoid(y, x) == pytest.approx(auroc(*pair), abs=1e-12)
    edges = np.linspace(0, 1, 21)
    for panel, line, (name, pair) in zip(histograms, roc.lines, methods.items(), strict=False):
        assert panel.get_title() == name
        for steps, part in zip(panel.patches, pair, strict=True):
            np.testing.assert_allclose(steps.get_data().values, 100 * np.histogram(part, edges)[0] / len(part))
        assert matplotlib.colors.same_color(panel.patches[0].get_facecolor()[:3], line.get_color())
    assert_readable(figure)


def test_scores_that_are_not_probabilities_have_bins_of_their_own():
    """Scores far out, and infinite ones, are counted in the bins at the ends."""
    rng = np.random.default_rng(0)
    own, foreign = rng.normal(3, 1, 200), rng.normal(-2, 1, 150)
    own[0], foreign[0] = np.inf, -1e9
    figure = plots.detection_figure({"MAP": Confidences(own, foreign)}, score="log density")
    panel = figure.axes[1]
    assert panel.get_xlabel() == "log density"
    assert -5 < panel.get_xlim()[0] < -2 and 4 < panel.get_xlim()[1] < 7
    assert [steps.get_data().values.sum() for steps in panel.patches] == pytest.approx([100, 100])
    assert_readable(figure)
    plots.detection_figure({"MAP": Confidences(np.full(3, 7.0), np.full(2, 7.0))})  # one value, yet bins of some width


@pytest.mark.parametrize("shifts", [5, 1])
def test_severity_curves(shifts):
    chosen = dict(list(SHIFTS.items())[:shifts])
    figure = plots.severity_curves(chosen, "NLL (nats per image)")
    shown = [panel for panel in figure.axes if panel.get_visible()]
    assert [panel.get_title() for panel in shown] == list(chosen)
    assert all(panel.get_yscale() == "log" and panel.get_ylim() == shown[0].get_ylim() for panel in shown)
    for panel, methods in zip(shown, chosen.values(), strict=True):
        for line, band, points in zip(panel.lines, panel.collections, methods.values(), strict=True):
            assert list(line.get_ydata()) == [point.value for point in points]
            corners = {(x, round(y, 9)) for x, y in band.get_paths()[0].vertices}
            assert corners >= {(n, round(end, 9)) for n, p in enumerate(points) for end in (p.low, p.high)}
    assert_readable(figure)


def test_a_metric_that_is_not_finite_leaves_a_gap():
    points = intervals(0)
    points[2], points[4] = Interval(np.inf, 1.0, np.inf), Interval(np.nan, np.nan, np.nan)
    figure = plots.severity_curves({"noise": {"MAP": points}}, "NLL")
    assert np.flatnonzero(np.isnan(figure.axes[0].lines[0].get_ydata())).tolist() == [2, 4]
    assert_readable(figure)


def test_a_method_has_one_colour_in_all_figures():
    looks = plots.looks(NAMES)
    name = NAMES[3]
    grid = np.array([0.1, 1.0, 10.0])
    curve = PrecisionCurve(grid, -100 - grid, *[grid] * 4, np.ones(3, bool), 1.0, 1.0, 1.0, False, 1.0, False)
    figures = [
        plots.rejection_curves({name: REJECTION[name]}, looks),
        plots.detection_figure({name: CONFIDENCES[name]}, looks),
        plots.severity_curves({"blur": {name: intervals(0)}}, "NLL", looks),
        plots.evidence_curve({name: curve}, looks),
    ]
    lines = [figure.axes[0].lines[0] for figure in figures]
    assert {line.get_color() for line in lines} == {looks[name].colour} != {plots.looks([name])[name].colour}
    assert len({line.get_linestyle() for line in lines}) == 1
    many = plots.looks([f"method {n}" for n in range(14)])
    assert len(set(many.values())) == 14
    assert plots.looks(["a", "b", "a"]) == plots.looks(["a", "b"])


@pytest.mark.usefixtures("unchecked_annotations")
def test_nothing_to_draw_is_refused_and_no_setting_changes():
    before = dict(matplotlib.rcParams)
    for draw, message in (
        (lambda: plots.rejection_curves({}), "methods must hold at least one method; got none"),
        (lambda: plots.detection_figure({}), "methods must hold at least one method; got none"),
        (lambda: plots.severity_curves({}, "NLL"), "shifts must hold at least one shift, .*; got {}"),
        (lambda: plots.severity_curves({"blur": {}}, "NLL"), re.escape("got {'blur': []}")),
        (lambda: plots.rejection_curves(REJECTION, plots.looks(NAMES[:4])), r"none for \['ensemble of five'\]"),
        (lambda: plots.detection_figure({"MAP": Confidences(np.array([np.nan]), np.ones(2))}), "scores_in must"),
    ):
        with pytest.raises(ValueError, match=message):
            draw()
    assert dict(matplotlib.rcParams) == before
