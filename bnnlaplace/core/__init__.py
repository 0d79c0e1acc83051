"""What every stage needs: records, pytrees as vectors, products in full precision, checks of arguments, free memory."""

from bnnlaplace.core.memory import MemoryEstimate
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.core.types import Estimate, LinearOperator, NotAModeWarning

__all__ = [
    "Estimate",
    "LinearOperator",
    "MemoryEstimate",
    "NotAModeWarning",
    "leaf_names",
]
