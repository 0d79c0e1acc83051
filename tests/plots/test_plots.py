"""Figures draw the numbers that they were given, and every word on them can be read."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.collections import LineCollection
from readable import assert_readable

from bnnlaplace import krylov, plots
from bnnlaplace.calibration.metrics import expected_calibration_error, reliability_bins
from bnnlaplace.plots import Guess, Picture, PrecisionCurve, style

GRID = np.logspace(-2, 4, 13)


def precision_curve(best, peak, nll_best, sem=20.0):
    """Evidence as in practice, over four decades: a peak, and a prior term that grows without bound."""
    evidence = peak * (1 + 0.3 * np.log(GRID / best) ** 2 + 0.05 * GRID)
    nll = 0.05 + 2.2 / (1 + GRID / (nll_best / 100)) + 0.01 * np.log1p(GRID / nll_best)
    return PrecisionCurve(
        precision=GRID,
        log_evidence=evidence,
        log_evidence_sem=np.full(len(GRID), sem),
        log_evidence_truncation=10 / GRID,
        validation_nll=nll,
        validation_ece=nll / 3,
        converged=np.ones(len(GRID), bool),
        evidence_optimum=best,
        evidence_optimum_low=best / 1.2,
        evidence_optimum_high=best * 1.2,
        evidence_at_bound=False,
        nll_optimum=nll_best,
        nll_at_bound=False,
    )


@pytest.fixture(scope="module")
def curves():
    return {"Lanczos": precision_curve(0.8, -700.0, 100.0), "diagonal": precision_curve(4.5, -2700.0, 1000.0, sem=0.0)}


@pytest.fixture(scope="module")
def bins():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.full(4, 0.3), size=80)
    return probs, rng.integers(0, 4, 80), reliability_bins(probs, rng.integers(0, 4, 80))


HISTORY = [
    {
        "epoch": epoch,
        "phase": "train" if epoch < 6 else "polish",
        "loss": 2.0 * 0.6**epoch,
        "validation_nll": 2.1 * 0.7**epoch,
        "accuracy": 1 - 0.8 * 0.5**epoch,
        "prior_precision": 1.0 if epoch < 4 else 0.5,
        "gradient_norm": None if epoch < 6 else 10.0 ** (5 - epoch),
    }
    for epoch in range(9)
]


def test_evidence_curve_draws_its_curves_and_optima(curves):
    figure = plots.evidence_curve(curves)
    evidence, nll = figure.axes
    for curve in curves.values():
        choices = (curve.evidence_optimum, curve.nll_optimum)
        for panel, values, marked in (
            (evidence, curve.log_evidence, choices[:1]),
            (nll, curve.validation_nll, choices),  # what the choice of the evidence costs is seen here
        ):
            assert any(np.array_equal(line.get_ydata(), values) for line in panel.lines)
            for optimum in marked:
                (mark,) = [line for line in panel.lines if list(line.get_xdata()) == [optimum]]
                assert mark.get_ydata()[0] == pytest.approx(np.interp(np.log(optimum), np.log(GRID), values))
        error = [curve.evidence_optimum_low, curve.evidence_optimum_high]
        assert any(list(line.get_xdata()) == error for line in evidence.lines)
    for band, curve in zip(evidence.collections, curves.values(), strict=True):
        corners = band.get_paths()[0].vertices
        for height in (
            curve.log_evidence - 2 * curve.log_evidence_sem,
            curve.log_evidence + 2 * curve.log_evidence_sem + curve.log_evidence_truncation,
        ):
            distances = np.abs(corners[:, None] - np.stack([GRID, height], axis=1)).sum(axis=-1)
            assert distances.min(axis=0).max() < 1e-6
    words = assert_readable(figure)
    assert "Lanczos: ● 0.8 (0.67 to 0.96) ◇ 100" in words and "diagonal: ● 4.5 (3.8 to 5.4) ◇ 1,000" in words
    assert "samples not converged" not in words


def test_evidence_axis_keeps_the_peaks_in_view(curves):
    """The evidence at the end of the grid is a thousand times the optimum; both peaks take a fair part of the axis."""
    panel = plots.evidence_curve(curves).axes[0]
    assert min(curve.log_evidence.min() for curve in curves.values()) < -1e6
    assert -1e5 < panel.get_ylim()[0] < -2e4  # down to twenty times the worse peak, and no further
    height = panel.transAxes.inverted().transform(panel.transData.transform([(1, -700), (1, -2700)]))[:, 1]
    assert 0.6 < height[1] < height[0] < 1
    assert height[0] - height[1] > 0.15


@pytest.mark.parametrize("shift", [1000.0, 5000.0, -1e7])
def test_evidence_axis_is_linear_where_a_logarithm_serves_nothing(curves, shift):
    shifted = {name: c._replace(log_evidence=np.maximum(c.log_evidence, -5e5) + shift) for name, c in curves.items()}
    figure = plots.evidence_curve(shifted)
    panel = figure.axes[0]
    assert panel.get_yscale() == "linear"
    if shift > 0:  # the peaks, 2,000 nats apart, are told apart although the curves fall by half a million
        low, high = panel.get_ylim()
        assert 0.1 < 2000 / (high - low) < 0.9
    assert_readable(figure)


def test_values_that_are_not_finite_leave_gaps(curves):
    nll, evidence = curves["diagonal"].validation_nll.copy(), curves["diagonal"].log_evidence.copy()
    nll[:2], evidence[0] = np.inf, np.nan
    figure = plots.evidence_curve({"diagonal": curves["diagonal"]._replace(validation_nll=nll, log_evidence=evidence)})
    drawn = next(line for line in figure.axes[1].lines if len(line.get_xdata()) == len(GRID)).get_ydata()
    assert np.isnan(drawn[:2]).all() and np.isfinite(drawn[2:]).all()
    assert_readable(figure)


@pytest.mark.parametrize("faint", [[0, 1, 2], [0, 12], [5]])
def test_curves_are_faint_where_the_samples_have_not_converged(curves, faint):
    """The bold line holds converged values alone; the faint line reaches the next converged points, and no further."""
    converged = ~np.isin(np.arange(len(GRID)), faint)
    marked = curves["Lanczos"]._replace(converged=converged)
    figure = plots.evidence_curve({"diagonal": curves["diagonal"], "Lanczos": marked})
    reached = sorted({index + step for index in faint for step in (-1, 0, 1)} & set(range(len(GRID))))
    diagonal, thin, full = [line for line in figure.axes[1].lines if len(line.get_xdata()) == len(GRID)]
    assert np.isfinite(diagonal.get_ydata()).all()
    assert np.flatnonzero(np.isfinite(thin.get_ydata())).tolist() == reached
    np.testing.assert_array_equal(full.get_ydata(), np.where(converged, marked.validation_nll, np.nan))
    assert thin.get_linewidth() < full.get_linewidth() and thin.get_alpha() < 1
    lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) == len(GRID)]
    assert all(np.isfinite(line.get_ydata()).all() for line in lines)  # the evidence has a band of its own for it
    labels = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert labels.count("samples not converged") == 1
    if len(faint) == 1:  # drawing takes most of the time, and one longer legend shows whether it is readable
        assert_readable(figure)


def test_an_optimum_at_the_end_of_its_search_is_called_that(curves):
    ended = curves["Lanczos"]._replace(evidence_at_bound=True, nll_optimum=1e5, nll_at_bound=True)
    figure = plots.evidence_curve({"diagonal": curves["diagonal"]._replace(nll_optimum=1e5), "Lanczos": ended})
    words = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    assert "Lanczos: ● 0.8 (at end) ◇ 100,000 (at end)" in words
    assert "diagonal: ● 4.5 (3.8 to 5.4) ◇ 100,000" in words


def test_four_posteriors_with_long_legends_are_readable(curves):
    """The legend is as wide as the figure: a longer entry would be cut."""
    names = ("diagonal Laplace", "Lanczos Laplace", "diagonal variational", "Lanczos variational")
    worst = curves["Lanczos"]._replace(nll_optimum=1e5, nll_at_bound=True, converged=GRID > 1)
    figure = plots.evidence_curve(dict.fromkeys(names, worst))
    words = assert_readable(figure)
    assert "Lanczos variational: ● 0.8 (0.67 to 0.96) ◇ 100,000 (at end)" in words


@pytest.mark.parametrize("count", [1, 2, 5])
def test_reliability_diagram(bins, count):
    probs, labels, _ = bins
    methods = {f"Lanczos variational {n}": reliability_bins(probs, (labels + n) % 4) for n in range(count)}
    figure = plots.reliability_diagram(methods)
    assert len(figure.axes) == 2 * count
    for n, (name, expected) in enumerate(methods.items()):
        diagram, histogram = figure.axes[2 * n : 2 * n + 2]
        assert diagram.get_title() == f"{name}\nECE {expected_calibration_error(probs, (labels + n) % 4):.3f}"
        assert sum(bar.get_height() for bar in histogram.patches) == pytest.approx(1)
        reached, over, under = np.split(np.array([bar.get_height() for bar in diagram.patches]), 3)
        full = expected.counts > 0
        np.testing.assert_allclose(reached + over, np.maximum(expected.confidence[full], reached), atol=1e-12)
        np.testing.assert_allclose(reached + under, expected.accuracy[full], atol=1e-12)
    assert_readable(figure)


def test_whiskers_are_wilson_intervals():
    """At 8 right of 10 the interval is [0.490, 0.943] (Wilson 1927); at 10 of 10 it still has a width."""
    eight_of_ten = reliability_bins(np.tile([0.7, 0.3], (10, 1)), np.repeat([0, 1], [8, 2]), num_bins=5)
    diagram = plots.reliability_diagram({"MAP": eight_of_ten}).axes[0]
    whisker = next(c for c in diagram.collections if isinstance(c, LineCollection)).get_segments()[0]
    np.testing.assert_allclose(whisker[:, 1], [0.4902, 0.9433], atol=1e-4)


def test_training_curve_shows_what_was_recorded():
    figure = plots.training_curve(HISTORY)
    assert [panel.get_ylabel() for panel in figure.axes] == [
        "nats per image", "accuracy", "prior precision", "gradient norm of\nthe log joint",
    ]  # fmt: skip
    loss, nll = figure.axes[0].lines
    assert list(loss.get_ydata()) == [record["loss"] for record in HISTORY]
    assert list(nll.get_ydata()) == [record["validation_nll"] for record in HISTORY]
    assert list(figure.axes[3].lines[0].get_xdata()) == [6, 7, 8]
    shaded = next(patch for patch in figure.axes[0].patches if patch.get_label() == "polishing phase")
    assert (shaded.get_x(), shaded.get_width()) == (5.5, 3.0)
    assert_readable(figure)


def test_what_is_of_no_method_is_grey():
    """The blue of one method was also that of the training loss and of the best evidence of another."""
    history = [record | {"log_evidence": -50.0 * 0.5 ** record["epoch"]} for record in HISTORY]
    panels = plots.training_curve(history).axes + plots.spectrum(np.geomspace(1, 9, 9), {"a": 2.0, "b": 3.0}).axes
    lines = [line for panel in panels for line in panel.lines]
    bands = [band.get_facecolor()[0, :3] for panel in panels for band in panel.collections]
    assert len(lines) > 8 and bands
    for red, green, blue in [matplotlib.colors.to_rgb(line.get_color()) for line in lines] + bands:
        assert red == green == blue
    for panel in panels:  # and the line style tells two greys apart
        looks = [(line.get_color(), line.get_linestyle(), line._unscaled_dash_pattern) for line in panel.lines]
        assert len({str(look) for look in looks}) == len(looks)


def test_training_curve_leaves_out_what_says_nothing():
    history = [{"epoch": n, "phase": "train", "loss": 1.0 / (n + 1), "prior_precision": 1.0} for n in range(3)]
    figure = plots.training_curve(history)
    assert [panel.get_ylabel() for panel in figure.axes] == ["nats per image"]
    assert [text.get_text() for text in figure.axes[0].get_legend().get_texts()] == ["training loss"]


def test_evidence_by_epoch_has_a_curve_for_each_curvature_that_was_recorded():
    history = [
        {"epoch": n, "phase": "train" if n < 5 else "polish", "log_evidence": None, "log_evidence_sem": None}
        for n in range(1, 9)
    ]
    history[1] |= {"log_evidence": -500.0, "log_evidence_sem": 20.0, "log_evidence_diagonal": -1200.0}
    history[5] |= {"log_evidence": -400.0, "log_evidence_sem": None, "log_evidence_diagonal": None}
    keys = {"Lanczos Laplace": "log_evidence", "diagonal Laplace": "log_evidence_diagonal", "other": "log_evidence_x"}
    figure = plots.evidence_history(history, keys)
    lanczos, diagonal = (container.lines[0] for container in figure.axes[0].containers)
    assert (list(lanczos.get_xdata()), list(lanczos.get_ydata())) == ([2, 6], [500, 400])
    assert (list(diagonal.get_xdata()), list(diagonal.get_ydata())) == ([2], [1200])
    ends = [segment[:, 1].tolist() for segment in figure.axes[0].containers[0].lines[2][0].get_segments()]
    assert ends == [[480, 520], [400, 400]]
    assert assert_readable(figure)[:3] == ["Lanczos Laplace", "diagonal Laplace", "polishing phase"]
    with pytest.raises(ValueError, match="history must hold an evidence; got none under"):
        plots.evidence_history(HISTORY, keys)


def test_evidence_by_epoch_ends_with_the_trained_network():
    """The curve ends at the last update, epochs before the end of training."""
    history = [{"epoch": n, "phase": "train", "log_evidence": -500.0 if n == 2 else None} for n in range(1, 9)]
    figure = plots.evidence_history(
        history, {"Lanczos": "log_evidence"}, trained={"Lanczos": (-450.0, 5.0), "another": (-1.0, 0.0)}
    )
    line, end = figure.axes[0].containers
    assert list(line.lines[0].get_xdata()) == [2]
    assert (list(end.lines[0].get_xdata()), list(end.lines[0].get_ydata())) == ([8], [450])
    assert end.lines[2][0].get_segments()[0][:, 1].tolist() == [445, 455]
    assert end.lines[0].get_color() == line.lines[0].get_color() and end.lines[0].get_markerfacecolor() == "white"
    assert assert_readable(figure)[:2] == ["Lanczos", "trained network"]
    assert "trained network" not in assert_readable(plots.evidence_history(history, {"Lanczos": "log_evidence"}))


def test_pictures_say_what_each_method_predicts():
    grey, colour = np.full((4, 4, 1), 9, np.uint8), np.zeros((5, 4, 3), np.uint8)
    guesses = {"MAP": Guess("automobile", 0.9996), "Lanczos variational": Guess("a very long name", 0.416)}
    picture = Picture(grey, "automobile", guesses)
    groups = {"most uncertain": [picture] * 4, "wrong": [], "typical": [picture._replace(image=colour)]}
    figure = plots.picture_groups(groups)
    assert len(figure.axes) == 5
    words = assert_readable(figure)
    assert (
        words.count("class automobile") == words.count("automobile, >99 %") == words.count("a very lon…, 42 % ×") == 5
    )
    assert "wrong" not in words and {"most uncertain", "typical", "MAP", "Lanczos variational"} < set(words)
    with pytest.raises(ValueError, match="groups must hold at least one picture"):
        plots.picture_groups({"wrong": []})


def test_spectrum_sorts_and_leaves_out_what_is_not_positive():
    ritz_values = np.array([1e-3, -1e-7, 8e3, 0.0, 250.0])
    figure = plots.spectrum(ritz_values, {"best evidence": 0.8, "best validation NLL": 120.0})
    values, *lines = figure.axes[0].lines
    assert list(values.get_ydata()) == [8e3, 250.0, 1e-3] and list(values.get_xdata()) == [1, 2, 3]
    assert [line.get_ydata()[0] for line in lines] == [0.8, 120.0]
    assert_readable(figure)


def test_spectrum_draws_what_has_converged_and_marks_the_rest():
    """A decomposition of 40 of 90 directions: the drawn curve holds eigenvalues, and the legend counts the others."""
    eigenvalues = np.geomspace(1e-3, 1e4, 90)
    product = lambda rows: rows * jnp.asarray(eigenvalues, jnp.float32)  # noqa: E731
    probes = jax.random.normal(jax.random.key(0), (8, 90))
    *_, decomposition = krylov.block_lanczos(product, probes, max_vectors=40)
    ritz = krylov.ritz(decomposition)
    figure = plots.spectrum(ritz.values, {"best evidence": 0.8}, ritz.couplings)
    curve, crosses, _ = figure.axes[0].lines
    drawn = curve.get_ydata()
    assert (np.abs(drawn[:, None] / eigenvalues - 1).min(axis=1) < 0.01).all() and drawn.max() > 9e3
    count, total = len(drawn), len(drawn) + len(crosses.get_ydata())
    assert 4 < count < total == (ritz.values > 0).sum()
    assert crosses.get_marker() == "x" and crosses.get_ydata().min() < drawn.min()
    words = assert_readable(figure)
    assert f"Ritz values of the GGN that have converged: {count} of {total}" in words
    assert f"not converged: {total - count} of {total}" in words
    none = plots.spectrum(ritz.values, {}, np.full_like(ritz.values, np.nan))
    assert len(none.axes[0].lines) == 1 and len(none.axes[0].lines[0].get_ydata()) == total


def test_nothing_global_is_touched(curves, bins):
    """No setting of matplotlib changes, and pyplot, which keeps figures and chooses a backend, is not imported here."""
    for file in Path(plots.__file__).parent.glob("*.py"):
        assert not re.search(r"^\s*(import|from)\b.*pyplot", file.read_text(), re.MULTILINE), file
    before = dict(matplotlib.rcParams)
    plots.evidence_curve(curves)
    plots.reliability_diagram({"MAP": bins[2]})
    plots.training_curve(HISTORY)
    plots.spectrum(np.ones(3), {"evidence": 1.0})
    assert dict(matplotlib.rcParams) == before


@pytest.mark.usefixtures("unchecked_annotations")
def test_nothing_to_draw_is_refused():
    refused = [
        (lambda: plots.evidence_curve({}), "curves must hold at least one structure"),
        (lambda: plots.reliability_diagram({}), "methods must hold at least one method"),
        (lambda: plots.training_curve([]), "history must hold at least one epoch"),
        (lambda: plots.training_curve([{"epoch": 0, "phase": "train"}]), "history must hold loss or accuracy"),
        (
            lambda: plots.spectrum(np.ones(3), {}, np.ones(2)),
            "residual_norms must be one for each of the 3 ritz_values",
        ),
        (lambda: plots.spectrum(np.zeros(3), {}), "ritz_values must hold a positive value; got 3 values"),
    ]
    for draw, message in refused:
        with pytest.raises(ValueError, match=message):
            draw()


def test_numbers_have_no_powers_of_ten():
    assert [style.number(value) for value in (1.414e-5, 0.0834, 1.74, 563.0, 1800.0, 2e12)] == [
        "0.000014", "0.083", "1.7", "560", "1,800", "2,000,000,000,000"
    ]  # fmt: skip
    assert [style.tick(value, None) for value in (-1e-5, 0.1, 1e4, 1e11)] == [
        "\N{MINUS SIGN}0.00001", "0.1", "10,000", "100,000,000,000"
    ]  # fmt: skip
    assert style.number(np.inf) == "inf"
