"""Krylov methods for matrices known by their products; they depend on nothing else of the package."""

from bnnlaplace.krylov.block_lanczos import BlockDecomposition, Ritz, block_lanczos, ritz
from bnnlaplace.krylov.lanczos import Lanczos, lanczos
from bnnlaplace.krylov.matfun import inverse_sqrt_coefficients, inverse_sqrt_error
from bnnlaplace.krylov.quadrature import gauss_radau, stochastic_lanczos_quadrature, trace_forms

__all__ = [
    "BlockDecomposition",
    "Lanczos",
    "Ritz",
    "block_lanczos",
    "gauss_radau",
    "inverse_sqrt_coefficients",
    "inverse_sqrt_error",
    "lanczos",
    "ritz",
    "stochastic_lanczos_quadrature",
    "trace_forms",
]
