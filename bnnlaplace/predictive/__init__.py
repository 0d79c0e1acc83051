"""Predictions under the posterior, and what they cost on validation data."""

from bnnlaplace.predictive.functional import (
    FunctionalPosterior,
    functional_posteriors,
    functional_variances,
    marginal_samples,
    sample_variance,
    shared_posteriors,
)
from bnnlaplace.predictive.joint import FunctionalGaussian, functional_posterior
from bnnlaplace.predictive.predictions import predictions
from bnnlaplace.predictive.search import searched_curves
from bnnlaplace.predictive.validation import ValidationCurve, validation_curve, validation_curves

__all__ = [
    "FunctionalGaussian",
    "FunctionalPosterior",
    "ValidationCurve",
    "functional_posterior",
    "functional_posteriors",
    "functional_variances",
    "marginal_samples",
    "predictions",
    "sample_variance",
    "searched_curves",
    "shared_posteriors",
    "validation_curve",
    "validation_curves",
]
