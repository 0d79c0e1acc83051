"""The evidence lower bound of a variational posterior: what is known of it beside its value."""

from typing import NamedTuple

import numpy as np

from bnnlaplace.core.types import Estimate, LowerBound


class Bound(NamedTuple):
    """The expected log likelihood under a variational posterior.

    Attributes
    ----------
    expected_log_likelihood
        E log p(D | f), in nats.
    sem
        Its standard error over the samples of the outputs.
    iterations
        How many iterations the fit took.
    precision
        The prior precision of the fit, or its geometric mean over the weights; NaN if their ratios have changed since.
    """

    expected_log_likelihood: np.float64
    sem: np.float64
    iterations: np.int64
    precision: np.float64

    def of(self, estimate: Estimate, precision: float) -> LowerBound | Estimate:
        """The bound, from an estimate without the error of the expected log likelihood.

        At another precision than that of the fit it is an extrapolation, which may be above the evidence.
        """
        is_own = np.isclose(precision, self.precision, rtol=1e-6, atol=0)
        return (LowerBound if is_own else Estimate)(*self.extrapolated(estimate))

    def extrapolated(self, estimate: Estimate) -> Estimate:
        """Give an estimate the error of the expected log likelihood, without saying that it is a bound."""
        sem = np.hypot(estimate.sem, self.sem)
        return Estimate(estimate.mean, sem if np.ndim(sem) else float(sem))
