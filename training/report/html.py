"""The results of a run for people: a table on the console and one self-contained `report.html`.

`report.html` needs no network and no other file: figures are embedded, styles are inline. It adapts to phones, to
paper and to dark screens. The tree is built with ElementTree, which escapes every string.
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bnnlaplace import plots
from bnnlaplace.calibration.bootstrap import Interval, paired_differences
from training.report.findings import findings, number, precision, reservations
from training.report.results import MethodResult, RunResults, environment, write_metrics
from training.workdir import write_atomically, writing


class _Column(NamedTuple):
    heading: str
    short: str
    direction: int
    """1 where larger is better, -1 where smaller is, 0 where neither."""


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
    "the optimum of the evidence, with its error band shaded, dotted ones that of the validation NLL. The band around "
    "the evidence is two standard errors, and upwards also what stopping the recurrence can have taken from it. Where "
    "the samples have not converged, NLL and ECE are drawn faint, and the validation NLL does not choose.",
    "reliability": "Accuracy against confidence, and below how many images have which confidence. On the dashed line a "
    "prediction made with 70 % confidence is right 70 % of the time.",
    "training": "Training. The loss is the negative log joint divided by the number of training images.",
    "spectrum": "Ritz values of the GGN. The data determine the directions above a line, the prior those below.",
}
_WIDE = 130  # console columns that the table takes with its intervals


def best_methods(results: RunResults, metric: str) -> set[str]:
    """Labels of the best method and of those that the images do not tell from it.

    Two methods are told apart when the paired 95 % interval of their difference excludes zero. Empty where none is
    told from the best, and for metrics without a better direction.
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
    """Print all metrics of all methods, with 95 % intervals where the console is wide enough, and what qualifies them.

    Bold: the best of a column and what is not told from it by the images; see `best_methods`.
    """
    wide = console.width >= _WIDE
    columns = _present(results)
    title = f"{results.data}, {results.split}: {results.num_images[results.split]:,} images"
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
    UserError
        A file cannot be written.
    """
    figures = draw_figures(results)
    for name, figure in figures.items():
        with writing(directory / "figures" / f"{name}.png") as temporary:
            figure.savefig(temporary, format="png", dpi=150)
    write_metrics(directory / "metrics.json", results)
    write_report(directory / "report.html", results, figures)
    print_table(console, results)
    total = sum(results.seconds.values())
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in results.seconds.items())
    console.print(f"{total:.0f} s in all ({stages}). Report:", highlight=False)
    # The last line and nothing else on it, so that it can be clicked on, copied, and read by a script.
    console.out(str(directory / "report.html"), highlight=False)


def draw_figures(results: RunResults) -> dict[str, Figure]:
    """The figures of the report by name: evidence, training, spectrum, reliability."""
    curve = results.curves["Lanczos"]
    optima = {"best evidence": curve.evidence_optimum, "best validation NLL": curve.nll_optimum}
    return {
        "evidence": plots.evidence_curve(results.curves),
        "training": plots.training_curve(results.history),
        "spectrum": plots.spectrum(results.krylov.ritz_values, optima),
        "reliability": plots.reliability_diagram({method.label: method.reliability for method in results.methods}),
    }


def write_report(path: Path, results: RunResults, figures: Mapping[str, Figure]) -> None:
    """Write the self-contained report, atomically.

    Parameters
    ----------
    path
        The HTML file.
    results
        What the run found.
    figures
        By name, in the order of the report: those of `draw_figures`, or others under a caption of their own.

    Raises
    ------
    UserError
        The file cannot be written.
    """
    title = f"Laplace approximations on {results.data}"
    page = _element("html", lang="en")
    page.append(
        _element(
            "head",
            _element("meta", charset="utf-8"),
            _element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            _element("meta", name="color-scheme", content="light dark"),
            _element("title", title),
            _element("style", _STYLE),
        )
    )
    body = _element("main", _element("h1", title), _element("p", _summary(results), class_="summary"))
    body.append(_element("h2", "What the numbers say"))
    said = (_element("section", _element("h3", f.title), _element("p", f.text)) for f in findings(results))
    body.append(_element("div", *said, class_="columns"))
    body.extend(_table_section(results))
    body.append(_element("h2", "Figures"))
    drawn = (_figure(name, figure, results) for name, figure in figures.items())
    body.append(_element("div", *drawn, class_="columns"))
    body.append(_element("h2", "The run"))
    body.append(_pairs("Seconds", {stage: f"{seconds:,.1f}" for stage, seconds in results.seconds.items()}))
    body.append(_pairs("Configuration", _flat(results.config)))
    body.append(_pairs("Software and device", environment()))
    page.append(_element("body", body))
    html = ElementTree.tostring(page, encoding="unicode", method="html")
    write_atomically(path, f"<!DOCTYPE html>\n{html}\n")


def _summary(results: RunResults) -> str:
    images = ", ".join(f"{count:,} {split}" for split, count in results.num_images.items())
    return (
        f"A network with {results.num_weights:,} weights; images: {images}. Seed {results.seed}. Evaluated on the "
        f"{results.split} split. Validation curves from the {results.curve_link} predictive."
    )


def _table_section(results: RunResults) -> list[ElementTree.Element]:
    columns = _present(results)
    best = {metric: best_methods(results, metric) for metric in columns}
    arrows = {1: "\N{NO-BREAK SPACE}\N{UPWARDS ARROW}", -1: "\N{NO-BREAK SPACE}\N{DOWNWARDS ARROW}", 0: ""}
    headings = ("method", "prior precision", *(_COLUMNS[m].heading + arrows[_COLUMNS[m].direction] for m in columns))
    head = _element("thead", _element("tr", *(_element("th", heading, scope="col") for heading in headings)))
    body = _element("tbody")
    for method, before in zip(results.methods, (results.methods[0], *results.methods), strict=False):
        row = _element("tr", _element("th", method.label, scope="row"), _element("td", _precision(method)))
        if method.structure != before.structure:
            row.set("class", "section")
        for metric, interval in method.metrics.items():
            cell = _element("td", _element("span", number(interval.value)), _element("small", _ends(interval)))
            if method.label in best[metric]:
                cell.set("class", "best")
            row.append(cell)
        body.append(row)
    note = (
        "Arrows point to better. Small print: 95 % bootstrap intervals. Bold and shaded: the best of a column, and "
        "every value whose paired difference from it has a 95 % interval that includes zero; a column without any does "
        "not tell the methods apart. NLL in nats per image. AUROC and FPR95: telling these images from the "
        "out-of-distribution ones by the largest probability."
    )
    table = _element("div", _element("table", head, body), class_="scroll", tabindex="0")
    return [_element("h2", "All methods, all metrics"), table, _element("p", note, class_="note")]


def _figure(name: str, figure: Figure, results: RunResults) -> ElementTree.Element:
    """An SVG inside an image: sharp at any size, and apart from the page's styles and identifiers."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    caption = _CAPTIONS.get(name, name)
    width = f"{figure.get_figwidth() * 96:.0f}"
    image = _element("img", src=source, alt=f"{caption} ({results.data})", width=width)
    return _element("figure", image, _element("figcaption", caption))


def _pairs(title: str, values: Mapping[str, Any]) -> ElementTree.Element:
    rows = (_element("div", _element("dt", key), _element("dd", str(value))) for key, value in values.items())
    return _element("section", _element("h3", title), _element("dl", *rows))


def _element(tag: str, *children: str | ElementTree.Element, **attributes: str) -> ElementTree.Element:
    element = ElementTree.Element(tag, {key.rstrip("_"): value for key, value in attributes.items()})
    for child in children:
        if isinstance(child, str):
            element.text = child  # text comes alone here, never mixed with elements
        else:
            element.append(child)
    return element


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


_STYLE = """
:root { --ink: #1b1f24; --soft: #5b6470; --line: #d9dee4; --paper: #ffffff; --band: #e3eefb; --accent: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #a3adb8; --line: #363d46; --paper: #14171a; --band: #1d3348; --accent: #6db6e8; }
  figure img { filter: invert(1) hue-rotate(180deg); mix-blend-mode: screen; }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 1.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.25rem 0 .2rem; color: var(--accent); }
p { margin: 0 0 .5rem; max-width: 46rem; overflow-wrap: break-word; }
.summary, .note, figcaption { color: var(--soft); }
.note, figcaption { font-size: .875rem; }
.scroll { overflow-x: auto; margin: 0 0 .75rem; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 500; min-width: 8.5rem; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); }
td small { display: block; color: var(--soft); font-size: .72rem; white-space: nowrap; }
tr.section > * { border-top: 2px solid var(--line); }
td.best { background: var(--band); }
td.best span { font-weight: 700; }
.columns { columns: 28rem auto; column-gap: 3rem; }
.columns > * { break-inside: avoid; }
.columns section { padding-bottom: 1rem; }
.columns h3 { margin-top: 0; }
figure { margin: 0; padding: .5rem 0 1.75rem; }
figure img { display: block; max-width: 100%; height: auto; background: #fff; }
figcaption { max-width: 46rem; margin-top: .5rem; }
dl { columns: 20rem auto; column-gap: 2.5rem; margin: 0 0 1rem; font-size: .875rem; }
dl div { display: flex; justify-content: space-between; gap: 1rem; border-bottom: 1px solid var(--line);
  break-inside: avoid; padding: .1rem 0; }
dt { color: var(--soft); }
dd { margin: 0; text-align: right; overflow-wrap: anywhere; }
@media print {
  @page { size: A4; margin: 14mm; }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  table { font-size: 7pt; } td small { font-size: 6pt; } th, td { padding: 2pt 3pt; }
  th:first-child { position: static; } tbody th { min-width: 0; }
  .scroll { overflow: visible; }
  td.best { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  p, figcaption { max-width: none; }
  figure img { max-height: 22cm; width: auto; }
  figure, tr, dl div { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""
