"""Fitted curvature structures: each answers the questions of a Laplace posterior at any prior precision.

The protocol `Structure` names these questions. To add a structure, write a class with the methods of `Structure` and of
`CovarianceStructure` or `SampleStructure`, enter it in `BY_NAME`, and let `bnnlaplace.fitting.fit` compute it.
"""

from bnnlaplace.structure.dense import DenseStructure
from bnnlaplace.structure.diagonal import DiagonalStructure
from bnnlaplace.structure.kronecker import KroneckerStructure
from bnnlaplace.structure.krylov import KrylovError, KrylovStructure
from bnnlaplace.structure.protocol import (
    AdditiveStructure,
    CovarianceStructure,
    OutputCovariance,
    RowStructure,
    SampleStructure,
    Structure,
)
from bnnlaplace.structure.spectral import SpectralStructure

# The names that `Laplace(hessian_structure=...)` takes, and the classes that each may be fitted as. "lanczos" becomes a
# `SpectralStructure` if the data have so few outputs that all eigenpairs can be computed.
BY_NAME = {
    "diag": (DiagonalStructure,),
    "kron": (KroneckerStructure,),
    "full": (DenseStructure,),
    "lanczos": (KrylovStructure, SpectralStructure),
}

__all__ = [
    "BY_NAME",
    "AdditiveStructure",
    "CovarianceStructure",
    "DenseStructure",
    "DiagonalStructure",
    "KroneckerStructure",
    "KrylovError",
    "KrylovStructure",
    "OutputCovariance",
    "RowStructure",
    "SampleStructure",
    "SpectralStructure",
    "Structure",
]
