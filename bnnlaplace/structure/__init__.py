"""Fitted curvature structures: each answers, at any prior precision delta, the questions of a Laplace posterior.

`Structure` says what is asked of one. A new one is a class with its methods and those of `CovarianceStructure` or
`SampleStructure`, named below, and a function in `fit` that `Laplace.fit` calls.
"""

from bnnlaplace.structure.dense import DenseStructure
from bnnlaplace.structure.diagonal import DiagonalStructure
from bnnlaplace.structure.kronecker import KroneckerStructure
from bnnlaplace.structure.krylov import KrylovError, KrylovStructure
from bnnlaplace.structure.protocol import CovarianceStructure, OutputCovariance, SampleStructure, Structure
from bnnlaplace.structure.spectral import SpectralStructure

# The `hessian_structure` of Laplace, and what it may be fitted as; the last takes few outputs instead of many products.
BY_NAME = {
    "diag": (DiagonalStructure,),
    "kron": (KroneckerStructure,),
    "full": (DenseStructure,),
    "lanczos": (KrylovStructure, SpectralStructure),
}

__all__ = [
    "BY_NAME",
    "CovarianceStructure",
    "DenseStructure",
    "DiagonalStructure",
    "KroneckerStructure",
    "KrylovError",
    "KrylovStructure",
    "OutputCovariance",
    "SampleStructure",
    "SpectralStructure",
    "Structure",
]
