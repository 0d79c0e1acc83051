"""The figures of a study: a metric against the severity of shifts, accuracy against rejection, and detection."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bnnlaplace.calibration import Interval, intervals, paired_interval, rejection_curve, resample
from training.study import method_names
from training.study.config import MOST_SHOWN, Study
from training.study.scores import Method
from training.workdir import writing

# The link of the posteriors, as in the tables of results.
_LINK = "probit"

Methods = Mapping[Any, Mapping[int, Method]]


def draw(directory: Path, regime: str, methods: Methods, study: Study) -> None:
    """Write the figures of one regime."""
    from bnnlaplace import plots  # Matplotlib takes most of a second to load.

    keys = _shown(methods, study)
    shown = {label: list(methods[key].values()) for label, key in zip(_labels(keys), keys, strict=True)}
    if not shown:
        return
    looks = plots.looks(shown)
    drawn = {"rejection": plots.rejection_curves({name: _rejection(each) for name, each in shown.items()}, looks)}
    for name in next(iter(shown.values()))[0].numbers["auroc"]:
        confidences = {
            label: plots.Confidences(_joined(each, "confidence"), _joined(each, f"foreign_{name}"))
            for label, each in shown.items()
        }
        drawn[f"detection_{name}"] = plots.detection_figure(confidences, looks)
    shifts = study.measures.shifts
    if shifts:
        curves = {
            shift: {label: _severities(each, position, shift) for label, each in shown.items()}
            for position, shift in enumerate(shifts)
        }
        drawn["severity"] = plots.severity_curves(curves, "NLL of shifted images (nats)", looks)
    for name, figure in drawn.items():
        with writing(directory / f"{regime}_{name}.png") as temporary:
            figure.savefig(temporary, dpi=150, format="png")


def _shown(methods: Methods, study: Study) -> list[Any]:
    """Choose the methods of the figures: those that the study names, or the reference and some posteriors."""
    reference = study.reference_name
    posteriors = {
        (training.name, posterior.name): (training.name, posterior.name, posterior.chosen_by, _LINK)
        for training in reversed(study.trainings)
        for posterior in study.posteriors_of(training)
    }
    usual = (method_names.MAP, method_names.MAP_T_SPLIT, method_names.ENSEMBLE)
    wanted: list[Any] = [(reference, name, None, None) for name in usual]
    wanted += posteriors.values()
    if study.shown:
        named = [tuple(name.split(".", 1)) for name in study.shown]
        wanted = [posteriors.get(name, (*name, None, None)) for name in named]
    return [key for key in wanted if key in methods][:MOST_SHOWN]


def _labels(keys: Sequence[Any]) -> list[str]:
    """Name methods, in few words where these differ, and with their training if there are several."""
    several = len({training for training, *_ in keys}) > 1
    whole = [f"{training}: " * several + method_names.label(method) for training, method, *_ in keys]
    short = [label.split(" (")[0] for label in whole]
    return [brief if short.count(brief) == 1 else label for brief, label in zip(short, whole, strict=True)]


def _joined(methods: Iterable[Method], name: str) -> np.ndarray:
    return np.concatenate([np.asarray(method.arrays[name], np.float64) for method in methods])


def _rejection(methods: Iterable[Method]) -> Any:
    """The curve of the predictions of all seeds together.

    Whether each is right, and its confidence, decide it. So two classes stand for all: the predicted one and the rest.
    """
    methods = list(methods)
    is_wrong = 1 - _joined(methods, "accuracy").astype(np.int64)
    return rejection_curve(np.tile([1.0, 0.0], (len(is_wrong), 1)), is_wrong, _joined(methods, "confidence"))


def _severities(methods: list[Method], position: int, shift: str) -> list[Interval]:
    """The mean NLL at severities 0, 1, ... with its interval over images and seeds; of one seed, over images alone."""
    rows = [np.asarray(method.arrays["shift_nll"][position], np.float64) for method in methods]
    clean = float(np.mean([method.numbers["shifts"][shift]["nll"][0] for method in methods]))
    return [Interval(clean, np.nan, np.nan), *(_interval([row[n] for row in rows]) for n in range(len(rows[0])))]


def _interval(rows: list[np.ndarray]) -> Interval:
    if not all(np.isfinite(row).all() for row in rows):
        return Interval(float("nan"), float("nan"), float("nan"))
    if len(rows) > 1:
        return paired_interval(rows, [np.zeros_like(row) for row in rows], seed=0)
    row = rows[0]
    return intervals(resample(lambda counts: {"nll": counts @ row / len(row)}, (len(row),), seed=0))["nll"]
