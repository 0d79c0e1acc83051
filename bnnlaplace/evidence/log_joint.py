"""The terms of the evidence beside the determinant, as a function of q = (theta - mu)' P0 (theta - mu).

The prior's normalisation is not among them: in the evidence it cancels against that of the posterior.
"""

import math
from typing import NamedTuple, Protocol

import numpy as np
from jaxtyping import ArrayLike, Float


class LogJoint(Protocol):
    """log p(y | f) - q / 2, the likelihood as it is or with its noise at the maximum."""

    def __call__(self, q: Float[ArrayLike, "*D"]) -> Float[ArrayLike, "*D"]:
        """The value, in nats."""
        ...

    def slope(self, q: float) -> float:
        """Its derivative."""
        ...


class FixedNoise(NamedTuple):
    """log p(y | f) - q / 2.

    Attributes
    ----------
    log_likelihood
        scale * sum_n log p(y_n | f_n), in nats.
    """

    log_likelihood: float

    def __call__(self, q: Float[ArrayLike, "*D"]) -> Float[ArrayLike, "*D"]:
        """The value."""
        return self.log_likelihood - 0.5 * q

    def slope(self, q: float) -> float:
        """Minus a half."""
        return -0.5


class BestNoise(NamedTuple):
    """The same of a Gaussian likelihood, maximised over a factor s of the noise variance.

    With the variance s sigma^2 the GGN is G / s. Its determinant with the prior precision P0 / s is that of G with P0,
    so that with q taken at P0 the rest of the evidence is

        -(r + q) / (2 s) - n / 2 log s - const,    largest at s = (r + q) / n.

    Attributes
    ----------
    squared_residuals
        r = sum ((y - f) / sigma)^2.
    num_outputs
        n: the number of targets, all outputs of all examples counted.
    constant
        log p(y | f) + r / 2, which depends on sigma alone.
    """

    squared_residuals: float
    num_outputs: float
    constant: float

    @classmethod
    def of(cls, squared_residuals: float, num_outputs: float, sigma_noise: Float[np.ndarray, "*C"]) -> "BestNoise":
        """From the residuals over the noise `sigma_noise`, one for all outputs or one each."""
        sigma = np.asarray(sigma_noise, np.float64)
        constant = -num_outputs * (float(np.log(sigma).mean()) + 0.5 * math.log(2 * math.pi))
        return cls(squared_residuals, num_outputs, constant)

    def factor(self, q: Float[ArrayLike, "*D"]) -> Float[ArrayLike, "*D"]:
        """s: the best noise variance over that of the likelihood."""
        return (self.squared_residuals + q) / self.num_outputs

    def log_likelihood(self, factor: float) -> float:
        """log p(y | f) with the noise variance multiplied by `factor`."""
        return self.constant - 0.5 * (self.squared_residuals / factor + self.num_outputs * math.log(factor))

    def __call__(self, q: Float[ArrayLike, "*D"]) -> Float[ArrayLike, "*D"]:
        """The value at s."""
        return self.constant - 0.5 * self.num_outputs * (1 + np.log(self.factor(q)))

    def slope(self, q: float) -> float:
        """-1 / (2 s)."""
        return float(-0.5 / self.factor(q))
