"""The Gaussian prior of the weights, and the choice of its precisions by the evidence."""

from bnnlaplace.prior.gaussian import Groups, Precision, Prior, by_layer, group_names, group_numbers, resolve
from bnnlaplace.prior.grouped import GroupedOptimum, accelerated, fixed_point_step, grouped_optimum
from bnnlaplace.prior.scalar import SEARCH_RANGE, PriorOptimum, bracket, maximiser, optimum, range_above

__all__ = [
    "SEARCH_RANGE",
    "GroupedOptimum",
    "Groups",
    "Precision",
    "Prior",
    "PriorOptimum",
    "accelerated",
    "bracket",
    "by_layer",
    "fixed_point_step",
    "group_names",
    "group_numbers",
    "grouped_optimum",
    "maximiser",
    "optimum",
    "range_above",
    "resolve",
]
