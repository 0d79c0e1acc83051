"""Fit a posterior to data, and choose its prior by the evidence."""

from bnnlaplace.fitting.mode import linear_mode

__all__ = [
    "linear_mode",
]
