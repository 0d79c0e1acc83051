"""Traces of functions of a matrix, read off one block decomposition.

Leading eigenpairs that have converged are summed exactly, which removes their share of the variance, and for functions
whose derivatives have known signs the truncation error is bracketed.
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from bnnlaplace.krylov.block_lanczos import BlockDecomposition, Ritz


def trace_forms(
    ritz: Ritz, function: Callable[[np.ndarray], np.ndarray], *, tolerance: float = 1e-2
) -> Float[np.ndarray, " S"]:
    """tr f(A) as each probe of one block decomposition estimates it, f elementwise on Ritz values, f(0) = 0.

    Ritz pairs whose residual is at most `tolerance` times theta are eigenpairs: their f(theta) enter every estimate
    exactly. They are properties of A, not of the probes, so the rest of the trace is estimated without bias by what a
    probe sees of the rest: tr f(A) = sum_conv f(theta_j) + E sum_other f(theta_j) (z' x_j)^2. The mean over probes is
    the estimate, their spread its error.

    Which pairs have converged depends a little on the probes: those along which they are large converge first. So with
    few probes, fewer than about 16, the estimate is somewhat low and its spread understates its error. Leaving each
    probe out of the choice for itself would mend that, and make the error several times larger.

    A block of S probes finds at most S vectors of an eigenspace. So S or more converged values that `tolerance` does
    not tell apart may stand for an eigenspace with more dimensions than were found: they stay with the rest, where a
    probe sees all of the space.

    Parameters
    ----------
    ritz
        `ritz(decomposition)`.
    function
        f, elementwise on an array of Ritz values, with f(0) = 0.
    tolerance
        The residual, relative to theta, below which a Ritz pair counts as an eigenpair, and the relative distance below
        which two values count as equal. Zero leaves everything to the probes.
    """
    values = function(ritz.values)
    exact = summed_exactly(ritz, tolerance=tolerance)
    return values[exact].sum() + (values[:, None] * ritz.weights**2)[~exact].sum(axis=0)


def summed_exactly(ritz: Ritz, *, tolerance: float = 1e-2) -> Bool[np.ndarray, " m"]:
    """Which Ritz pairs `trace_forms` takes for eigenpairs.

    Parameters
    ----------
    ritz, tolerance
        As for `trace_forms`.
    """
    exact = ritz.couplings <= tolerance * ritz.values
    exact[exact] = ~_in_long_chain(ritz.values[exact], ritz.weights.shape[1], tolerance)
    return exact


def _in_long_chain(ascending: Float[np.ndarray, " m"], length: int, tolerance: float) -> np.ndarray:
    """Which values belong to a chain of `length` or more, each within `tolerance` of the next, relative to it."""
    chain = np.cumsum(np.diff(ascending, prepend=0.0) > tolerance * ascending)
    return np.bincount(chain, minlength=1)[chain] >= length if len(chain) else chain.astype(bool)


def gauss_radau(decomposition: BlockDecomposition, ritz: Ritz) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of the block Gauss-Radau rule with nodes prescribed at zero, the lower end of A's spectrum.

    For functions such as log1p, whose derivatives alternate in sign, the block Gauss rule (Ritz values and weights)
    lies above z' f(A) z and this rule below, both monotonically in depth: together they bracket it (Golub and Meurant
    1994; for blocks Zimmerling, Druskin and Simoncini 2024).

    Parameters
    ----------
    decomposition
        K blocks of a positive semidefinite A.
    ritz
        `ritz(decomposition)`.

    Returns
    -------
    nodes, weights
        Shapes (m + S,) and (m + S, S): for each probe, sum_j f(nodes_j) weights_j^2 estimates z' f(A) z.
    """
    count, size = len(decomposition.start), len(decomposition.tridiagonal)
    last = ritz.vectors[-count:]
    floor = np.finfo(np.float64).eps * size * max(ritz.values.max(), np.finfo(np.float64).tiny)
    inverse_corner = (last / np.maximum(ritz.values, floor)) @ last.T
    coupling = decomposition.residual
    extended = np.zeros((size + count,) * 2)
    extended[:size, :size] = decomposition.tridiagonal
    extended[size - count : size, size:] = coupling
    extended[size:, size - count : size] = coupling.T
    # The last block that makes T singular S times over: its Schur complement is zero.
    extended[size:, size:] = coupling.T @ inverse_corner @ coupling
    nodes, vectors = np.linalg.eigh(extended)
    return np.maximum(nodes, 0.0), vectors[:count].T @ decomposition.start.T
