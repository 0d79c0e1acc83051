"""The figures of the report. A method has one colour in all of them, and in the table; what is of none is grey."""

from typing import TYPE_CHECKING

import numpy as np

from training.report.results import Example, MethodResult, RunResults

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from bnnlaplace.plots import Look, Picture

# All methods of a run, in the order of the colours: the foremost has the strongest, whatever others there are.
_COLOURED = (
    *("Lanczos variational", "MAP", "Lanczos Laplace", "MAP + temperature"),
    *("diagonal variational", "diagonal Laplace"),
)
# The methods whose confidence is drawn. There is one colour and one panel for each, so that more would be too many.
_SHOWN = ("MAP", "MAP + temperature", "Lanczos Laplace", "Lanczos variational")


def method_looks(results: RunResults) -> "dict[str, Look]":
    """Return colour and line style of each method by its name."""
    from bnnlaplace import plots  # Matplotlib takes most of a second to load.

    return plots.looks((*_COLOURED, *(method.name for method in results.methods)))


def draw_figures(results: RunResults) -> dict[str, "Figure"]:
    """Draw the figures of the report by name.

    Names are evidence_by_epoch (if training recorded the evidence), evidence, reliability, detection (if there are
    foreign images), rejection, images, training and spectrum.
    """
    from bnnlaplace import plots

    looks = method_looks(results)
    shown = {method.name: method for method in results.short_table if method.name in _SHOWN}
    curve = results.curves["Lanczos"]
    own = results.posterior_name("Lanczos")
    optima = {f"best evidence, {own}": curve.evidence_optimum, f"best validation NLL, {own}": curve.nll_optimum}
    figures = {}
    if keys := evidence_keys(results):
        figures["evidence_by_epoch"] = plots.evidence_history(results.history, keys, looks, trained_evidence(results))
    figures["evidence"] = plots.evidence_curve(
        {results.posterior_name(name): curve for name, curve in results.curves.items()}, looks
    )
    figures["reliability"] = plots.reliability_diagram(
        {name: method.reliability for name, method in shown.items()}, looks=looks
    )
    if results.ood is not None:
        confidences = {
            name: plots.Confidences(method.predictions.confidence, method.predictions.foreign_confidence)
            for name, method in shown.items()
        }
        figures["detection"] = plots.detection_figure(confidences, looks)
    rejection = {name: method.predictions.rejection for name, method in shown.items()}
    figures["rejection"] = plots.rejection_curves(rejection, looks)
    if results.examples:
        figures["images"] = plots.picture_groups(_pictures(results), looks)
    if results.history:  # a run may begin and end with imported weights
        figures["training"] = plots.training_curve(results.history)
    figures["spectrum"] = plots.spectrum(results.krylov.ritz_values, optima, results.krylov.residual_norms)
    return figures


def evidence_keys(results: RunResults) -> dict[str, str]:
    """Return which evidences training recorded: the entry of its records, by the name of the posterior."""
    names = {results.trained_by: "log_evidence"}
    names.setdefault("diagonal Laplace", "log_evidence_diagonal")
    return {name: key for name, key in names.items() if any(record.get(key) is not None for record in results.history)}


def trained_evidence(results: RunResults) -> dict[str, tuple[float, float]]:
    """Return the highest log evidence of the trained network on the grid, with its standard error, by posterior."""
    best = {name: int(np.nanargmax(curve.log_evidence)) for name, curve in results.curves.items()}
    return {
        results.posterior_name(name): (float(curve.log_evidence[best[name]]), float(curve.log_evidence_sem[best[name]]))
        for name, curve in results.curves.items()
    }


def _pictures(results: RunResults) -> "dict[str, list[Picture]]":
    """The example images with the predictions of MAP and of the foremost method."""
    from bnnlaplace.plots import Guess, Picture

    methods = (results.methods[0], results.foremost)

    def guess(method: MethodResult, index: int) -> Guess:
        predictions = method.predictions
        return Guess(results.class_names[predictions.classes[index]], float(predictions.confidence[index]))

    def picture(example: Example) -> Picture:
        guesses = {method.name: guess(method, example.index) for method in methods}
        return Picture(example.image, results.class_names[example.label], guesses)

    return {title: [picture(example) for example in group] for title, group in results.examples.items()}
