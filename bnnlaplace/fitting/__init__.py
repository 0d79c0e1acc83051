"""From data to a fitted posterior, and the choice of its prior by the evidence."""

from bnnlaplace.fitting.mode import linear_mode

__all__ = [
    "linear_mode",
]
