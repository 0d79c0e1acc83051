"""Curvature of the negative log likelihood in weight space: G = scale * sum_n J_n' Lambda_n J_n.

As products (`ggn_operator`, `dual_operator`, `streamed_operator`), as a diagonal, by Kronecker factors, or as a matrix.
"""

from bnnlaplace.curvature.dense import ggn as dense_ggn
from bnnlaplace.curvature.diagonal import ggn_diagonal
from bnnlaplace.curvature.ggn import block_product, dual_operator, dual_pullback, ggn_operator
from bnnlaplace.curvature.kronecker import DiagonalSums, FilterSums, LayerSums
from bnnlaplace.curvature.kronecker import factors as kronecker_factors
from bnnlaplace.curvature.linearisation import Linearisation, linearise
from bnnlaplace.curvature.streamed import operator as streamed_operator

__all__ = [
    "DiagonalSums",
    "FilterSums",
    "LayerSums",
    "Linearisation",
    "block_product",
    "dense_ggn",
    "dual_operator",
    "dual_pullback",
    "ggn_diagonal",
    "ggn_operator",
    "kronecker_factors",
    "linearise",
    "streamed_operator",
]
