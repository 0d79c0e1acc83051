"""The results of a run for people: a table on the console, the figures, and one self-contained `report.html`.

`report.html` is made from the template `report.html.j2`, which escapes every string, and the style sheet `report.css`.
It needs neither a network nor another file: figures are embedded, styles are inline. It adapts to phones, to paper and
to dark screens.
"""

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from training.cli import interruption
from training.report import findings, tables
from training.report.command import for_shell
from training.report.figures import draw_figures, method_looks
from training.report.results import RunResults, environment, write_metrics
from training.report.tables import print_table
from training.settings import flattened
from training.workdir import write_atomically, writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CAPTIONS = {
    "evidence_by_epoch": "The evidence of the network during training, with standard errors; lower in the figure is "
    "better. Lanczos computes it from the whole curvature of the loss, diagonal from the diagonal of that alone. "
    "Shaded: the polishing phase, the last epochs of training. Where it starts, batch statistics freeze and the "
    "learning rate begins high again, so that the evidence can jump. Open circles: the trained network, by the "
    "posteriors of this report, at the prior precision of the highest evidence. Training estimates the evidence from "
    "--prior.examples images, and a small part of all images makes the estimate too high.",
    "evidence": "Evidence and validation NLL against the prior precision. The curve of a variational posterior is its "
    "lower bound of the evidence, extrapolated from the fit. Dots: what the evidence chose, with "
    "its error, or what a variational posterior keeps from training, and what that costs in NLL. Diamonds: the lowest "
    "NLL. The bands reach two standard errors up and down. Where Lanczos stopped early the evidence can be too low, "
    "and its band reaches further up by as much.",
    "reliability": "Reliability. On the dashed line a prediction made with 70 % confidence is right 70 % of the time. "
    "Below: how many images have which confidence.",
    "detection": "Confidence on own and on foreign images, and how well it tells them apart (ROC curve, whose area is "
    "the AUROC).",
    "rejection": "Accuracy if the least confident predictions are left to someone else.",
    "images": "Some of the evaluated images. A cross marks a wrong prediction.",
    "training": "Training. The loss is the negative log joint (log likelihood plus log prior), divided by the number "
    "of training images. Shaded: the polishing phase, the last epochs, in which batch statistics are frozen.",
    "spectrum": "Eigenvalues of the curvature of the loss, the generalised Gauss-Newton matrix (GGN). Lanczos "
    "approximates them by Ritz values. The data determine the directions above a line, the prior the ones below. "
    "Crosses are Ritz values that have not converged: averages over smaller eigenvalues.",
}
_STOPPED = "stopped in stage evaluation; nothing of it is written"


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


def render_report(results: RunResults, figures: Mapping[str, "Figure"]) -> str:
    """Return the self-contained report as HTML.

    Parameters
    ----------
    results
        What the run found.
    figures
        The figures by name. They may come from `draw_figures`, in whose places they are put. Others come at the end,
        and their names are their captions.
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
    return templates.get_template("report.html.j2").render(_content(results, figures)) + "\n"


def _content(results: RunResults, figures: Mapping[str, "Figure"]) -> dict[str, Any]:
    """What the template shows, by the names that it uses."""
    short, everything = tables.short_columns(results), tables.all_columns(results)
    first = "evidence_by_epoch" if "evidence_by_epoch" in figures else "evidence"
    return {
        "title": f"Laplace approximations on {results.data}",
        "results": results,
        "evaluated": tables.evaluated(results),
        "headlines": findings.headlines(results),
        "reservations": findings.reservations(results),
        "first": first,
        "short": {"columns": tables.headings(short), "rows": tables.rows(results, results.short_table, short)},
        "long": {"columns": tables.headings(everything), "rows": tables.rows(results, results.methods, everything)},
        "colours": {name: look.colour for name, look in method_looks(results).items()},
        "figures": {name: _embedded(name, figure) for name, figure in figures.items()},
        "others": [name for name in figures if name not in _CAPTIONS],
        "about_precisions": findings.about_precisions(results),
        "about_training": [
            findings.about_training_fit(results.posterior_name(name), fit)
            for name, fit in results.training_fits.items()
        ],
        "details": [findings.about_krylov(results), *findings.about_modes(results)],
        "command": for_shell(results.command),
        "seconds": {stage: f"{seconds:,.1f}" for stage, seconds in results.seconds.items()},
        "records": {"Configuration": flattened(results.config), "Software and device": environment()},
    }


def _image(figure: "Figure") -> bytes:
    """Draw a figure as PNG."""
    interruption.stop_if_requested(_STOPPED)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _embedded(name: str, figure: "Figure") -> dict[str, str]:
    """Embed a figure as an SVG image: sharp at any size, and apart from the page's styles and identifiers."""
    interruption.stop_if_requested(_STOPPED)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"source": source, "caption": _CAPTIONS.get(name, name), "width": f"{figure.get_figwidth() * 96:.0f}"}
