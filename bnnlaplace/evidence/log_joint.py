"""The evidence without its log-determinant, as a function of q = (theta - mu)' P0 (theta - mu).

The normalisation of the prior is not among them: in the evidence it cancels against that of the posterior.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import ArrayLike, Float


class LogJoint(NamedTuple):
    """log p(y | f) - q / 2, with the noise of the likelihood as it is, or at its best for each q.

    Multiplying the noise variance of a regression by s divides the GGN by s. The determinant of G / s with the prior
    precision P0 / s is that of G with P0. With q taken at P0, the other terms of the evidence are

        -(r + q) / (2 s) - n / 2 log s - const,    which is largest at s = (r + q) / n.

    So the evidence with its noise maximised is one more function of q, and every search over the prior takes either.

    Attributes
    ----------
    constant
        The part that does not depend on q: scale * sum_n log p(y_n | f_n) in nats, plus r / 2 if the noise is at its
        best.
    squared_residuals
        r = sum ((y - f) / sigma)^2; used if the noise is at its best.
    num_targets
        n, the number of targets: all outputs of all examples. None if the noise is fixed.
    """

    constant: float
    squared_residuals: float = 0.0
    num_targets: float | None = None

    @classmethod
    def at_best_noise(
        cls, squared_residuals: float, num_targets: float, sigma_noise: Float[ArrayLike, "*C"]
    ) -> "LogJoint":
        """Maximise over a common factor of the noise variances; `sigma_noise` is one number or one for each output."""
        # Computed from the noise itself, as log p + r / 2 would lose all digits if r is large.
        mean_log_sigma = float(np.log(np.asarray(sigma_noise, np.float64)).mean())
        constant = -num_targets * (mean_log_sigma + 0.5 * math.log(2 * math.pi))
        return cls(constant, squared_residuals, num_targets)

    def __call__(self, q: Float[ArrayLike, "*D"]) -> Float[ArrayLike, "*D"]:
        """The value in nats."""
        # At the best s = (r + q) / n the term (r + q) / (2 s) is n / 2.
        if self.num_targets is None:
            return self.constant - 0.5 * q
        return self.constant - 0.5 * self.num_targets * (1 + np.log(self.noise_factor(q)))

    def slope(self, q: float) -> float:
        """The derivative in q, -1 / (2 s)."""
        return float(-0.5 / self.noise_factor(q))

    def noise_factor(self, q: Float[ArrayLike, "*D"]) -> Float[ArrayLike, "*D"]:
        """The best noise variance over that of the likelihood; 1 if the noise is fixed."""
        return 1.0 if self.num_targets is None else (self.squared_residuals + q) / self.num_targets
