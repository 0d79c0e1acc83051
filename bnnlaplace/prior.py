"""The prior precision, and its choice by the evidence."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from scipy.optimize import minimize_scalar

from bnnlaplace import evidence

SEARCH_RANGE = (1e-4, 1e6)


class PriorOptimum(NamedTuple):
    """The maximiser of the evidence over a scalar prior precision.

    Attributes
    ----------
    prior_precision
        The maximiser.
    low, high
        An interval of two standard errors around it, from the probes: on the log scale the standard error of the slope
        over the curvature. A point where nothing was sampled.
    at_bound
        The evidence still rises at an end of the search range: the optimum is not inside it.
    """

    prior_precision: float
    low: float
    high: float
    at_bound: bool


def optimum(
    log_determinant: Callable[[float], Float[np.ndarray, " S"]],
    log_likelihood: float,
    squared_norm: float,
    *,
    search_range: tuple[float, float] = SEARCH_RANGE,
) -> PriorOptimum:
    """Maximise log p(D) over a scalar delta, from a fitted structure alone.

    A grid of 8 points a decade finds the highest of several maxima; Brent's method refines it. No curvature product.
    """

    def negative(log_delta: float) -> float:
        delta = np.exp(log_delta)
        return 0.5 * float(np.mean(log_determinant(delta))) - evidence.log_joint(log_likelihood, squared_norm, delta)

    low, high = np.log(search_range)
    grid = np.linspace(low, high, 1 + int(np.ceil(8 * (high - low) / np.log(10))))
    best = int(np.argmin([negative(point) for point in grid]))
    bracket = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    refined = minimize_scalar(negative, bounds=bracket, method="bounded", options={"xatol": 1e-6})
    log_delta = float(refined.x)
    at_bound = bool(best in (0, len(grid) - 1) and min(log_delta - low, high - log_delta) < 1e-3)
    width = 2 * _log_standard_error(negative, log_determinant, log_delta)
    return PriorOptimum(
        float(np.exp(log_delta)), float(np.exp(log_delta - width)), float(np.exp(log_delta + width)), at_bound
    )


def _log_standard_error(negative: Callable, log_determinant: Callable, log_delta: float) -> float:
    step = 0.05
    curvature = (negative(log_delta + step) - 2 * negative(log_delta) + negative(log_delta - step)) / step**2
    slopes = 0.5 * (log_determinant(np.exp(log_delta + step)) - log_determinant(np.exp(log_delta - step))) / (2 * step)
    if len(slopes) == 1 or np.ptp(slopes) == 0:
        return 0.0
    return float(slopes.std(ddof=1) / np.sqrt(len(slopes)) / max(curvature, np.finfo(float).tiny))
