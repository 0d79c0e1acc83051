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
    """

    expected_log_likelihood: np.float64
    sem: np.float64
    iterations: np.int64

    def of(self, estimate: Estimate) -> LowerBound:
        """The bound, from an estimate without the error of the expected log likelihood."""
        sem = np.hypot(estimate.sem, self.sem)
        return LowerBound(estimate.mean, sem if np.ndim(sem) else float(sem))
