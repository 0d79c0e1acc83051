"""How good class probabilities are: metrics with intervals, detection of foreign inputs, temperature scaling."""

from bnnlaplace.calibration.bootstrap import Bootstrap, Interval, intervals, paired_differences, resample
from bnnlaplace.calibration.calibrated import calibrated_log_likelihood, calibrated_log_likelihoods
from bnnlaplace.calibration.detection import RocCurve, auroc, entropy, fpr_at_95_tpr, roc_curve, weighted_detection
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
from bnnlaplace.calibration.paired import example_scores, paired_interval
from bnnlaplace.calibration.rejection import RejectionCurve, rejection_curve
from bnnlaplace.calibration.temperature import Temperature, fit_temperature

__all__ = [
    "Bootstrap",
    "Interval",
    "RejectionCurve",
    "ReliabilityBins",
    "RocCurve",
    "Temperature",
    "accuracy",
    "auroc",
    "bootstrap",
    "brier_score",
    "calibrated_log_likelihood",
    "calibrated_log_likelihoods",
    "calibration_gaps",
    "entropy",
    "evaluate",
    "example_scores",
    "expected_calibration_error",
    "fit_temperature",
    "fpr_at_95_tpr",
    "intervals",
    "mean_confidence",
    "negative_log_likelihood",
    "paired_differences",
    "paired_interval",
    "rejection_curve",
    "reliability_bins",
    "resample",
    "roc_curve",
    "weighted_detection",
]
