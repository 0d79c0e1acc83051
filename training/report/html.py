"""The results of a run for people: a table on the console, the figures, and one self-contained `report.html`.

`report.html` is made from the template `report.html.j2`, which escapes every string, and the style sheet `report.css`.
It needs neither a network nor another file: figures are embedded, styles are inline. It adapts to phones, to paper and
to dark screens.
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnnlaplace.calibration import Interval, paired_differences
from training.cli import interruption
from training.report.findings import findings, number, precision, reservations
from training.report.results import MethodResult, RunResults, environment, write_metrics
from training.workdir import write_atomically, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class _Column(NamedTuple):
    heading: str
    short: str
    direction: int
    """1 if larger is better, -1 if smaller is better, 0 if neither is."""


_COLUMNS = {
    "accuracy": _Column("accuracy", "acc.", 1),
    "nll": _Column("NLL", "NLL", -1),
    "ece": _Column("ECE", "ECE", -1),
    "ece_equal_mass": _Column("ECE, equal mass", "ECE\nmass", -1),
    "brier": _Column("Brier", "Brier", -1),
    "confidence": _Column("confidence", "conf.", 0),
    "auroc": _Column("AUROC", "AUROC", 1),
    "fpr95": _Column("FPR95", "FPR95", -1),
}
_CAPTIONS = {
    "evidence": "Log evidence, validation NLL and validation ECE against prior precision. Solid vertical lines mark "
    "the optimum of the evidence, with its error band shaded. Dotted lines mark the optimum of the validation NLL. "
    "The band around the evidence is two standard errors, and upwards also what stopping the recurrence can have taken "
    "from it. NLL and ECE are drawn faint at precisions where the samples have not converged; the validation NLL "
    "chooses none of these.",
    "reliability": "Accuracy against confidence, and below how many images have which confidence. On the dashed line a "
    "prediction made with 70 % confidence is right 70 % of the time.",
    "training": "Training. The loss is the negative log joint divided by the number of training images.",
    "spectrum": "Ritz values of the GGN. The data determine the directions above a line, the prior the ones below. "
    "Crosses mark values that have not converged: they are averages over smaller eigenvalues.",
}
_ARROWS = {1: "\N{NO-BREAK SPACE}\N{UPWARDS ARROW}", -1: "\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}", 0: ""}
_STOPPED = "stopped in stage evaluation; nothing of it is written"
_WIDE = 130  # Columns that the table takes on a console with its intervals.


def best_methods(results: RunResults, metric: str) -> set[str]:
    """Return the labels of the best method and of those that the images do not tell from it.

    Two methods are told apart if the paired 95 % interval of their difference excludes zero. The set is empty if no
    method is told from the best, and for metrics without a better direction.
    """
    direction = _COLUMNS[metric].direction
    if direction == 0:
        return set()
    best = max(results.methods, key=lambda method: direction * method.bootstrap.values[metric])
    tied = set()
    for method in results.methods:
        difference = paired_differences(method.bootstrap, best.bootstrap)[metric]
        if not (difference.low > 0 or difference.high < 0):
            tied.add(method.label)
    return tied if len(tied) < len(results.methods) else set()


def print_table(console: Console, results: RunResults) -> None:
    """Print all metrics of all methods, and what qualifies them.

    If the console is wide enough, each value has its 95 % interval. Bold is for the best of a column and for what the
    images do not tell from it; see `best_methods`.
    """
    wide = console.width >= _WIDE
    columns = _present(results)
    title = f"{results.data}, {results.split}: {_evaluated(results)} images"
    table = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method")
    table.add_column("prior\nprec.", justify="right", no_wrap=True)
    for metric in columns:
        table.add_column(_COLUMNS[metric].short, justify="right", no_wrap=True)
    best = {metric: best_methods(results, metric) for metric in columns}
    structure = results.methods[0].structure
    for method in results.methods:
        if method.structure != structure:
            table.add_section()
            structure = method.structure
        metrics = method.metrics
        cells = []
        for metric in columns:
            cell = number(metrics[metric].value)
            cell = f"[bold]{cell}[/bold]" if method.label in best[metric] else cell
            cells.append(f"{cell}\n[dim]{_ends(metrics[metric])}[/dim]" if wide else cell)
        table.add_row(escape(method.label), _precision(method), *cells)
    console.print(table)
    note = "Bold: best, or not told from the best by these images (paired bootstrap, 95 %)."
    console.print(note if wide else f"{note} Intervals: metrics.json and report.html.", style="dim")
    for reservation in reservations(results):
        console.print(f"note: {reservation}", style="yellow", markup=False, highlight=False)


def write_results(directory: Path, results: RunResults, console: Console) -> None:
    """Write metrics.json, report.html and the figures, each whole or not at all, and print the table.

    Raises
    ------
    StorageError
        A file cannot be written.
    Interrupted
        Ctrl-C or SIGTERM came. The message says whether all is written or nothing.
    """
    # All is made before anything is written, so that a run that stops meanwhile leaves what an earlier one wrote.
    with interruption.promptly(_STOPPED):
        interruption.stop_if_requested(_STOPPED)
        figures = draw_figures(results)
        images = {f"{name}.png": _image(figure) for name, figure in figures.items()}
        html = render_report(results, figures)
    for name, image in images.items():
        with writing(directory / "figures" / name) as temporary:
            temporary.write_bytes(image)
    write_metrics(directory / "metrics.json", results)
    write_atomically(directory / "report.html", html)
    print_table(console, results)
    total = sum(results.seconds.values())
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in results.seconds.items())
    console.print(f"{total:.0f} s in all ({stages}). Report:", highlight=False)
    # The path is the last line, and alone on it: a person can click on it, and a script can read it.
    console.out(str(directory / "report.html"), highlight=False)
    interruption.stop_if_requested("stopped when all was written")


def draw_figures(results: RunResults) -> dict[str, "Figure"]:
    """Draw the figures of the report. Their names are evidence, training, spectrum and reliability."""
    from bnnlaplace import plots  # Matplotlib takes most of a second to load.

    curve = results.curves["Lanczos"]
    optima = {"best evidence": curve.evidence_optimum, "best validation NLL": curve.nll_optimum}
    return {
        "evidence": plots.evidence_curve(results.curves),
        "training": plots.training_curve(results.history),
        "spectrum": plots.spectrum(results.krylov.ritz_values, optima, results.krylov.residual_norms),
        "reliability": plots.reliability_diagram({method.label: method.reliability for method in results.methods}),
    }


def write_report(path: Path, results: RunResults, figures: Mapping[str, "Figure"]) -> None:
    """Write what `render_report` returns, atomically.

    Raises
    ------
    StorageError
        The file cannot be written.
    """
    write_atomically(path, render_report(results, figures))


def render_report(results: RunResults, figures: Mapping[str, "Figure"]) -> str:
    """Return the self-contained report as HTML.

    Parameters
    ----------
    results
        What the run found.
    figures
        The figures by name, in the order of the report. They may come from `draw_figures`, or have names of their own,
        which are then their captions.
    """
    # Loaded here, because a program that writes no report need not wait for it.
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = _present(results)
    return (
        templates.get_template("report.html.j2").render(
            title=f"Laplace approximations on {results.data}",
            data=results.data,
            summary=_summary(results),
            findings=findings(results),
            columns=[_COLUMNS[metric].heading + _ARROWS[_COLUMNS[metric].direction] for metric in columns],
            rows=_rows(results, columns),
            figures=[_embedded(name, figure) for name, figure in figures.items()],
            tables={
                "Seconds": {stage: f"{seconds:,.1f}" for stage, seconds in results.seconds.items()},
                "Configuration": _flat(results.config),
                "Software and device": environment(),
            },
        )
        + "\n"
    )


def _image(figure: "Figure") -> bytes:
    """Draw a figure as PNG."""
    interruption.stop_if_requested(_STOPPED)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _summary(results: RunResults) -> str:
    images = ", ".join(f"{count:,} {split}" for split, count in results.num_images.items())
    return (
        f"A network with {results.num_weights:,} weights; images: {images}. Seed {results.seed}. Evaluated on "
        f"{_evaluated(results)} images of the {results.split} split. Validation curves from the {results.curve_link} "
        "predictive."
    )


def _evaluated(results: RunResults) -> str:
    """How many images of the split were evaluated, and of how many if not of all."""
    total = results.num_images[results.split]
    of_all = "" if results.num_evaluated == total else f" of {total:,}"
    return f"{results.num_evaluated:,}{of_all}"


def _rows(results: RunResults, columns: list[str]) -> list[dict[str, Any]]:
    """Return the rows of the table, one for each method."""
    best = {metric: best_methods(results, metric) for metric in columns}
    rows = []
    for method, before in zip(results.methods, (results.methods[0], *results.methods), strict=False):
        cells = [
            {"value": number(interval.value), "ends": _ends(interval), "best": method.label in best[metric]}
            for metric, interval in method.metrics.items()
        ]
        row = {"label": method.label, "precision": _precision(method), "cells": cells}
        rows.append(row | {"starts_section": method.structure != before.structure})
    return rows


def _embedded(name: str, figure: "Figure") -> dict[str, str]:
    """Embed a figure as an SVG image: sharp at any size, and apart from the page's styles and identifiers."""
    interruption.stop_if_requested(_STOPPED)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"source": source, "caption": _CAPTIONS.get(name, name), "width": f"{figure.get_figwidth() * 96:.0f}"}


def _present(results: RunResults) -> list[str]:
    return [metric for metric in _COLUMNS if metric in results.methods[0].bootstrap.values]


def _ends(interval: Interval) -> str:
    return f"{number(interval.low)}\N{EN DASH}{number(interval.high)}"


def _precision(method: MethodResult) -> str:
    return "" if method.prior_precision is None else precision(method.prior_precision)


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in config.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
