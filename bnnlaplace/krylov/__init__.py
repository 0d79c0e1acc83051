"""Krylov methods for matrices that are known only by their products.

Decompositions (`lanczos`, `arnoldi`, `block_lanczos`, `block_golub_kahan`), functions of a matrix times a vector
(`matfun_lanczos`, `matfun_arnoldi`), and traces (`stochastic_lanczos_quadrature`, `trace_forms`). Nothing here knows of
networks.
"""

from bnnlaplace.krylov.arnoldi import Arnoldi, arnoldi
from bnnlaplace.krylov.block_functions import (
    gauss_radau,
    inverse_sqrt_coefficients,
    inverse_sqrt_error,
    summed_exactly,
    trace_forms,
)
from bnnlaplace.krylov.block_golub_kahan import block_golub_kahan
from bnnlaplace.krylov.block_lanczos import BlockDecomposition, Ritz, block_lanczos, ritz
from bnnlaplace.krylov.deflation import Eigenpairs, leading_eigenpairs
from bnnlaplace.krylov.lanczos import Lanczos, lanczos
from bnnlaplace.krylov.matfun import MatrixFunction, matfun_arnoldi, matfun_lanczos
from bnnlaplace.krylov.probes import normal_probes, rademacher_probes
from bnnlaplace.krylov.quadrature import TraceEstimate, stochastic_lanczos_quadrature
from bnnlaplace.krylov.symmetry import check_symmetric
from bnnlaplace.krylov.tridiagonal import tridiagonal_matrix

__all__ = [
    "Arnoldi",
    "BlockDecomposition",
    "Eigenpairs",
    "Lanczos",
    "MatrixFunction",
    "Ritz",
    "TraceEstimate",
    "arnoldi",
    "block_golub_kahan",
    "block_lanczos",
    "check_symmetric",
    "gauss_radau",
    "inverse_sqrt_coefficients",
    "inverse_sqrt_error",
    "lanczos",
    "leading_eigenpairs",
    "matfun_arnoldi",
    "matfun_lanczos",
    "normal_probes",
    "rademacher_probes",
    "ritz",
    "stochastic_lanczos_quadrature",
    "summed_exactly",
    "trace_forms",
    "tridiagonal_matrix",
]
