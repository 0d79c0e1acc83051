"""Figures of evidence, calibration, detection, images, training and spectrum.

Nothing else in the package imports matplotlib. Every function takes plain arrays and returns a new `Figure`. No pyplot
state and no global setting changes. Save a figure with `figure.savefig(path)`.
"""

from bnnlaplace.plots.detection import Confidences, detection_figure
from bnnlaplace.plots.eigenvalues import spectrum
from bnnlaplace.plots.images import Guess, Picture, picture_groups
from bnnlaplace.plots.precision import PrecisionCurve, evidence_curve
from bnnlaplace.plots.rejection import rejection_curves
from bnnlaplace.plots.reliability import reliability_diagram
from bnnlaplace.plots.severity import severity_curves
from bnnlaplace.plots.style import Look, looks
from bnnlaplace.plots.training import evidence_history, training_curve

__all__ = [
    "Confidences",
    "Guess",
    "Look",
    "Picture",
    "PrecisionCurve",
    "detection_figure",
    "evidence_curve",
    "evidence_history",
    "looks",
    "picture_groups",
    "rejection_curves",
    "reliability_diagram",
    "severity_curves",
    "spectrum",
    "training_curve",
]
