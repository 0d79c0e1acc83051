"""How the report writes numbers: with fixed decimals, and differences with as many as decide their sign."""

import math
from decimal import Decimal

import numpy as np

from bnnlaplace.calibration import Interval

_MOST_DECIMALS = 6


def number(value: float, decimals: int = 3) -> str:
    """Write a number for readers, with a fixed number of decimals, a proper minus sign, and words for NaN."""
    if np.isnan(value):
        return "undefined"
    if np.isinf(value):
        return "\N{INFINITY}" if value > 0 else "\N{MINUS SIGN}\N{INFINITY}"
    return f"{round(value, decimals) + 0.0:,.{decimals}f}".replace("-", "\N{MINUS SIGN}")


def precision(value: float) -> str:
    """Write a prior precision with two significant digits: 0.083, 1.7, 560, 1,800."""
    return digits(value, 2)


def digits(value: float, count: int = 3, sign: str = "") -> str:
    """Write a number with so many significant digits and without powers of ten: 0.0000141, 0.0834, 1.5, 56,200.

    A sign of "+" marks numbers that are not negative, too.
    """
    text = f"{value:.{count}g}"
    return f"{Decimal(text):{sign},f}" if math.isfinite(value) else text


def ends(interval: Interval) -> str:
    """Write the ends of an interval below its value: 0.023-0.063, with a dash for numbers."""
    return f"{number(interval.low)}\N{EN DASH}{number(interval.high)}"


def difference(interval: Interval) -> str:
    """Write a difference with its interval, with as many decimals as the sign of either end needs, and at least three.

    So -0.0004 [-0.0009, -0.0001] is not written as 0.000 [-0.001, 0.000], which would leave open whether it counts.
    """
    smallest = min((abs(end) for end in interval[1:] if np.isfinite(end) and end != 0), default=1.0)
    decimals = min(max(3, math.ceil(-math.log10(smallest))), _MOST_DECIMALS)
    value, low, high = (number(part, decimals) for part in interval)
    return f"{value} [{low},\N{NO-BREAK SPACE}{high}]"
