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


# (A + shift I)^{-1/2} z for every probe of a block decomposition, at every shift, with a bound of the error.
def inverse_sqrt_coefficients(ritz: Ritz, shift: float) -> Float[np.ndarray, "S m"]:
    """Coordinates in the basis of (A + shift I)^{-1/2} z for every probe z.

    One decomposition serves every shift, since the Krylov space does not depend on it. Each probe lies in the first
    block, so its part outside the leading eigenspace is in the basis too and keeps its scale shift^{-1/2}.

    Parameters
    ----------
    ritz
        `bnnlaplace.krylov.ritz(decomposition)` of a positive semidefinite A.
    shift
        s > 0.

    Raises
    ------
    ValueError
        If `shift` is not positive.
    """
    if not shift > 0:
        raise ValueError(f"inverse_sqrt_coefficients(shift=...) must be positive; got {shift}")
    return (ritz.vectors @ (ritz.weights / np.sqrt(ritz.values + shift)[:, None])).T


def inverse_sqrt_error(ritz: Ritz, shift: float) -> Float[np.ndarray, " S"]:
    """Bound the error e of each `inverse_sqrt_coefficients` vector in the norm sqrt(e' (A + shift I) e), A >= 0.

    From (A + s)^{-1/2} = 2/pi int_0^inf (A + s + t^2)^{-1} dt: at each t the Krylov vector is the Galerkin solution of
    a shifted linear system, whose residual r(t) is known exactly from T, so

        |e|_{A+s} <= 2/pi int |r(t)| max_{x >= s} sqrt(x) / (x + t^2) dt,

    where the maximum is 1 / (2 t) for t^2 >= s and sqrt(s) / (s + t^2) below. It bounds the error of the Krylov method
    in exact arithmetic; measured, it lies within a factor of about two of the error.

    Compare it with sqrt(n), the size of the exact vector in this norm, or, for posterior samples, with
    sqrt(tr A (A + shift I)^{-1}), the part that the data determine. Source: the residual bounds of Frommer and
    Simoncini (2009) for Stieltjes functions, taken in the energy norm.

    Parameters
    ----------
    ritz
        `bnnlaplace.krylov.ritz(decomposition)` of a positive semidefinite A.
    shift
        s > 0.
    """
    root = np.sqrt(shift)
    # The residual is flat below t = sqrt(shift) / 1000 and, beyond the spectrum, falls faster than 1 / t^2.
    times = np.geomspace(1e-3 * root, 1e2 * np.sqrt(shift + ritz.values.max()), 160)
    largest = np.where(times > root, 1 / (2 * times), root / (shift + times**2))
    norms = np.stack(
        [
            np.linalg.norm(ritz.tails @ (ritz.weights / (ritz.values + shift + time**2)[:, None]), axis=0)
            for time in times
        ]
    )
    integrand = norms * largest[:, None]
    body = np.trapezoid(integrand * times[:, None], np.log(times), axis=0)
    return 2 / np.pi * (body + times[0] * integrand[0])
