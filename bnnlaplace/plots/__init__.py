"""Figures of evidence, calibration, training and spectrum. Nothing else in the package imports matplotlib.

Every function takes plain arrays and returns a new `Figure`. No pyplot state and no global setting changes. Save a
figure with `figure.savefig(path)`.
"""

from bnnlaplace.plots.eigenvalues import spectrum
from bnnlaplace.plots.precision import PrecisionCurve, evidence_curve
from bnnlaplace.plots.reliability import reliability_diagram
from bnnlaplace.plots.training import training_curve

__all__ = ["PrecisionCurve", "evidence_curve", "reliability_diagram", "spectrum", "training_curve"]
