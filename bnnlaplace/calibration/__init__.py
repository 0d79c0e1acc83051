"""How good class probabilities are: metrics with intervals, detection of foreign inputs, temperature scaling."""

from bnnlaplace.calibration.bootstrap import Bootstrap, Interval, intervals, paired_differences, resample
from bnnlaplace.calibration.detection import auroc, fpr_at_95_tpr, weighted_detection
from bnnlaplace.calibration.metrics import (
    ReliabilityBins,
    accuracy,
    bootstrap,
    brier_score,
    calibration_gaps,
    evaluate,
    expected_calibration_error,
    mean_confidence,
    negative_log_likelihood,
    reliability_bins,
)
from bnnlaplace.calibration.temperature import Temperature, fit_temperature

__all__ = [
    "Bootstrap",
    "Interval",
    "ReliabilityBins",
    "Temperature",
    "accuracy",
    "auroc",
    "bootstrap",
    "brier_score",
    "calibration_gaps",
    "evaluate",
    "expected_calibration_error",
    "fit_temperature",
    "fpr_at_95_tpr",
    "intervals",
    "mean_confidence",
    "negative_log_likelihood",
    "paired_differences",
    "reliability_bins",
    "resample",
    "weighted_detection",
]
