"""Fitted curvature structures: each answers, at any prior precision delta, the questions of a Laplace posterior.

`Structure` says what is asked of one. A new one is a class with its methods and those of `CovarianceStructure` or
`SampleStructure`, named below, and a function in `fit` that `Laplace.fit` calls.
"""

from bnnlaplace.structure.dense import DenseStructure
from bnnlaplace.structure.diagonal import DiagonalStructure
from bnnlaplace.structure.krylov import KrylovError, KrylovStructure
from bnnlaplace.structure.protocol import CovarianceStructure, SampleStructure, Structure

# The `hessian_structure` of Laplace.
BY_NAME = {"diag": DiagonalStructure, "full": DenseStructure, "lanczos": KrylovStructure}

__all__ = [
    "BY_NAME",
    "CovarianceStructure",
    "DenseStructure",
    "DiagonalStructure",
    "KrylovError",
    "KrylovStructure",
    "SampleStructure",
    "Structure",
]
