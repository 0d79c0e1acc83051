"""Choose the overall prior precision by the evidence. A fitted curvature is enough: no product is computed."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported at their first use, which takes half a second
from jaxtyping import Float

from bnnlaplace.core import checks
from bnnlaplace.evidence.log_joint import LogJoint

# The smallest and the largest precision that a search tries.
SEARCH_RANGE = (1e-4, 1e6)

LogDeterminant = Callable[[float], Float[np.ndarray, " S"]]


def range_above(resolution: float) -> tuple[float, float]:
    """Return the smallest and the largest precision to try for a structure with this `resolution`.

    Below the resolution the curvature is rounding, and so is the evidence.

    Parameters
    ----------
    resolution
        The result of `Structure.resolution`.
    """
    low, high = SEARCH_RANGE
    low = max(low, resolution)
    return low, max(high, 1e4 * low)


class PriorOptimum(NamedTuple):
    """The maximiser of the evidence over a scalar prior precision.

    Attributes
    ----------
    prior_precision
        The maximiser.
    low, high
        An interval for the errors of the maximiser. Truncation of the recurrence: the interval reaches from this
        maximiser to that of the evidence at the other end of the truncation bracket. Randomness of the probes: it goes
        two standard errors beyond either, which on the log scale is the standard error of the slope over the curvature.
        It is cut at the search range. If the evidence is exact, it is a point.
    at_bound
        Whether the evidence still rises at an end of the search range, so that the optimum is not inside it.
    """

    prior_precision: float
    low: float
    high: float
    at_bound: bool


def optimum(
    log_determinant: LogDeterminant,
    log_joint: LogJoint,
    squared_norm: float,
    *,
    truncation: LogDeterminant | None = None,
    search_range: tuple[float, float] = SEARCH_RANGE,
) -> PriorOptimum:
    """Maximise log p(D) over a scalar delta, with an interval for the errors of probes and truncation.

    Parameters
    ----------
    log_determinant, truncation
        delta -> log det(I + G / delta) for each probe, and a bound on how far truncation raised it: the methods of a
        `bnnlaplace.structure.Structure`. Without `truncation` the interval holds the error of the probes alone.
    log_joint
        The function from (theta - mu)' P0 (theta - mu) to the other terms of the evidence; see
        `bnnlaplace.evidence.LogJoint`.
    squared_norm
        (theta - mu)' D (theta - mu), with P0 = delta D.
    search_range
        The smallest and the largest delta.

    Raises
    ------
    ValueError
        If the evidence is not a number at any delta.
    """
    bounds = np.log(search_range)

    def located(end: LogDeterminant) -> tuple[float, float]:
        """Return the maximiser and two of its standard errors, on the log scale."""
        negative = _negative_evidence(end, log_joint, squared_norm)
        point = _log_maximiser(negative, bounds)
        return point, 2 * _log_standard_error(negative, end, point)

    ends = [log_determinant] if truncation is None else bracket(log_determinant, truncation)
    points, widths = np.transpose([located(end) for end in ends])
    low, high = np.clip([(points - widths).min(), (points + widths).max()], *bounds)
    # The bounded method approaches an end of the range, but does not reach it.
    at_bound = bool(np.abs(points[0] - bounds).min() < 1e-3)
    return PriorOptimum(*(float(np.exp(point)) for point in (points[0], low, high)), at_bound)


def maximiser(
    log_determinant: LogDeterminant,
    log_joint: LogJoint,
    squared_norm: float,
    *,
    search_range: tuple[float, float] = SEARCH_RANGE,
) -> float:
    """Find the delta of `optimum`, without its interval.

    A grid of 8 points in each decade finds the highest of several maxima, and Brent's method refines it.

    Parameters
    ----------
    log_determinant, log_joint, squared_norm, search_range
        As for `optimum`.
    """
    negative = _negative_evidence(log_determinant, log_joint, squared_norm)
    return float(np.exp(_log_maximiser(negative, np.log(search_range))))


def bracket(log_determinant: LogDeterminant, truncation: LogDeterminant) -> tuple[LogDeterminant, LogDeterminant]:
    """Return an upper and a lower bound on the log-determinant: as a truncated recurrence gives it, and lowered.

    Parameters
    ----------
    log_determinant, truncation
        As for `optimum`.
    """
    return log_determinant, lambda delta: log_determinant(delta) - truncation(delta)


def lowest(values: Float[np.ndarray, " D"], what: str) -> int:
    """Return the index of the smallest value. NaN is passed over; ValueError if all are NaN, which names `what`."""
    if np.isnan(values).all():
        raise ValueError(
            f"{what} must be a number at one prior precision at least; got NaN at all {len(values)}; look for values "
            "that are not finite in the weights and the data"
        )
    return int(np.nanargmin(values))


def checked_grid(precisions: Iterable[float], where: str) -> Float[np.ndarray, " D"]:
    """Return prior precisions as an array, or raise ValueError if there are none or one is not positive and finite."""
    try:
        grid = np.asarray([] if isinstance(precisions, (str, bytes)) else list(precisions))
    except (TypeError, ValueError):  # a single number, or lists of several lengths
        grid = np.asarray([])
    if grid.ndim != 1 or grid.size == 0 or grid.dtype.kind not in "iuf":
        raise ValueError(
            f"{where} must be positive, finite numbers, at least one; got {precisions!r:.80}; try [0.1, 1.0, 10.0]"
        )
    checks.all_positive(grid, where, advice="try [0.1, 1.0, 10.0]")
    return grid.astype(np.float64)


def _negative_evidence(
    log_determinant: LogDeterminant, log_joint: LogJoint, squared_norm: float
) -> Callable[[float], float]:
    """Return -log p(D) as a function of log delta."""

    def negative(log_delta: float) -> float:
        delta = np.exp(log_delta)
        return 0.5 * float(np.mean(log_determinant(delta))) - log_joint(delta * squared_norm)

    return negative


def _log_maximiser(negative: Callable[[float], float], bounds: Float[np.ndarray, " 2"]) -> float:
    """Minimise over a grid first, as there may be several minima, then between the neighbours of the best point."""
    low, high = bounds
    grid = np.linspace(low, high, 1 + int(np.ceil(8 * (high - low) / np.log(10))))
    best = lowest(np.array([negative(point) for point in grid]), "the evidence")
    around = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    return float(scipy.optimize.minimize_scalar(negative, bounds=around, method="bounded", options={"xatol": 1e-6}).x)


def _log_standard_error(negative: Callable[[float], float], log_determinant: LogDeterminant, log_delta: float) -> float:
    """Estimate the standard error of the maximiser: that of the slope over the probes, divided by the curvature."""
    # A slope that is off by e moves its zero by e / curvature.
    step = 0.05
    curvature = (negative(log_delta + step) - 2 * negative(log_delta) + negative(log_delta - step)) / step**2
    slopes = 0.5 * (log_determinant(np.exp(log_delta + step)) - log_determinant(np.exp(log_delta - step))) / (2 * step)
    if len(slopes) == 1 or np.ptp(slopes) == 0:
        return 0.0
    return float(slopes.std(ddof=1) / np.sqrt(len(slopes)) / max(curvature, np.finfo(float).tiny))
