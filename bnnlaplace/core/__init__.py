"""What every stage needs: pytrees as vectors, full-precision algebra, checks of arguments, memory, shared records."""

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
