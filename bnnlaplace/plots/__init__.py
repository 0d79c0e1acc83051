"""Figures of evidence, calibration, training and spectrum; nothing else in the package imports matplotlib.

Every function takes plain arrays and returns a `Figure` of its own: no pyplot state, no global settings. Save it with
`figure.savefig(path)`.
"""

from bnnlaplace.plots.eigenvalues import spectrum
from bnnlaplace.plots.precision import PrecisionCurve, evidence_curve
from bnnlaplace.plots.reliability import reliability_diagram
from bnnlaplace.plots.training import training_curve

__all__ = ["PrecisionCurve", "evidence_curve", "reliability_diagram", "spectrum", "training_curve"]
