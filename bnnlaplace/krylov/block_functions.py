"""Functions of a matrix, read off one block decomposition: traces tr f(A) and vectors (A + shift I)^{-1/2} z.

Traces: leading eigenpairs that have converged are summed exactly, which removes their share of the variance
(`trace_forms`). If the derivatives of f have known signs, the truncation error is bracketed (`gauss_radau`).

Inverse square roots: one decomposition gives the vector of every probe at every shift
(`inverse_sqrt_coefficients`), with a bound of its error (`inverse_sqrt_error`).
"""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float

from bnnlaplace.core import checks
from bnnlaplace.krylov.block_lanczos import BlockDecomposition, Ritz


def trace_forms(
    ritz: Ritz, function: Callable[[np.ndarray], np.ndarray], *, tolerance: float = 1e-2
) -> Float[np.ndarray, " S"]:
    """Estimate tr f(A) once for each probe of a block decomposition.

    Ritz pairs whose residual is at most `tolerance` times theta count as eigenpairs, and their f(theta) enter every
    estimate exactly. They are properties of A and not of the probes, so the rest of the trace is estimated without bias
    by what a probe sees of the rest: tr f(A) = sum_converged f(theta_j) + E sum_others f(theta_j) (z' x_j)^2. The mean
    over probes is the estimate, and their spread gives its error.

    Which pairs have converged depends a little on the probes: pairs along which the probes are large converge first. So
    with fewer than about 16 probes the estimate is somewhat low, and its spread understates its error. A choice of
    pairs for each probe that leaves this probe out would mend that, but would make the error several times larger.

    A block of S probes finds at most S vectors of an eigenspace. So S or more converged values that `tolerance` does
    not tell apart may stand for an eigenspace with more dimensions than were found. They stay with the rest, where a
    probe sees all of the eigenspace.

    Parameters
    ----------
    ritz
        The result of `krylov.ritz(decomposition)`.
    function
        f, elementwise on an array of Ritz values, with f(0) = 0.
    tolerance
        The residual, relative to theta, below which a Ritz pair counts as an eigenpair, and the relative distance below
        which two values count as equal. Zero leaves everything to the probes.

    Returns
    -------
    Float[np.ndarray, " S"]
        The estimate of each probe.
    """
    values = function(ritz.values)
    exact = summed_exactly(ritz, tolerance=tolerance)
    return values[exact].sum() + (values[:, None] * ritz.weights**2)[~exact].sum(axis=0)


def summed_exactly(ritz: Ritz, *, tolerance: float = 1e-2) -> Bool[np.ndarray, " m"]:
    """Mark the Ritz pairs that `trace_forms` takes for eigenpairs.

    Parameters
    ----------
    ritz, tolerance
        As for `trace_forms`.

    Returns
    -------
    Bool[np.ndarray, " m"]
        True for the pairs that are summed exactly.
    """
    exact = ritz.couplings <= tolerance * ritz.values
    # As many equal values as there are probes may be part of a larger eigenspace.
    exact[exact] = ~_in_long_chain(ritz.values[exact], ritz.weights.shape[1], tolerance)
    return exact


def _in_long_chain(ascending: Float[np.ndarray, " m"], length: int, tolerance: float) -> np.ndarray:
    """Mark runs of at least `length` values whose neighbours differ by less than the relative `tolerance`."""
    # A wide gap starts a new chain, so the running count of wide gaps numbers the chains.
    chain = np.cumsum(np.diff(ascending, prepend=0.0) > tolerance * ascending)
    return np.bincount(chain, minlength=1)[chain] >= length if len(chain) else chain.astype(bool)


def gauss_radau(decomposition: BlockDecomposition, ritz: Ritz) -> tuple[np.ndarray, np.ndarray]:
    """Compute the block Gauss-Radau rule with nodes at zero, the lower end of the spectrum of A.

    For functions such as log1p, whose derivatives alternate in sign, the block Gauss rule (the Ritz values and their
    weights) lies above z' f(A) z and this rule lies below. Both approach it monotonically with depth, so together they
    bracket it (Golub and Meurant 1994; for blocks Zimmerling, Druskin and Simoncini 2024).

    Parameters
    ----------
    decomposition
        A decomposition of a positive semidefinite A.
    ritz
        The result of `krylov.ritz(decomposition)`.

    Returns
    -------
    nodes, weights
        Shapes (m + S,) and (m + S, S): for each probe, sum_j f(nodes_j) weights_j^2 estimates z' f(A) z.
    """
    count, size = len(decomposition.start), len(decomposition.tridiagonal)
    last = ritz.vectors[-count:]
    # E_K' T^{-1} E_K, without dividing by Ritz values that are rounding of zero.
    limits = np.finfo(np.float64)
    floor = max(limits.eps * size * max(ritz.values.max(), limits.tiny), ritz.resolution)
    inverse_corner = (last / np.maximum(ritz.values, floor)) @ last.T
    coupling = decomposition.residual
    extended = np.zeros((size + count,) * 2)
    extended[:size, :size] = decomposition.tridiagonal
    extended[size - count : size, size:] = coupling
    extended[size:, size - count : size] = coupling.T
    # The last diagonal block is chosen such that its Schur complement is zero. The extended matrix then has the
    # eigenvalue zero S times.
    extended[size:, size:] = coupling.T @ inverse_corner @ coupling
    nodes, vectors = np.linalg.eigh(extended)
    return np.where(nodes > ritz.resolution, nodes, 0.0), vectors[:count].T @ decomposition.start.T


def inverse_sqrt_coefficients(ritz: Ritz, shift: float) -> Float[np.ndarray, "S m"]:
    """Compute (A + shift I)^{-1/2} z for every probe z, as coordinates in the basis of the decomposition.

    One decomposition serves every shift, since the Krylov space does not depend on the shift. Each probe lies in the
    first block. So its part outside the leading eigenspace is in the basis as well and keeps its scale shift^{-1/2}.

    Parameters
    ----------
    ritz
        The result of `krylov.ritz(decomposition)` for a positive semidefinite A.
    shift
        The positive shift s.

    Returns
    -------
    Float[np.ndarray, "S m"]
        One row for each probe. Multiply with `decomposition.basis` for the vectors.

    Raises
    ------
    ValueError
        If `shift` is not one positive, finite number.
    """
    checks.positive(shift, "inverse_sqrt_coefficients(shift=...)")
    return (ritz.vectors @ (ritz.weights / np.sqrt(ritz.values + shift)[:, None])).T


def inverse_sqrt_error(ritz: Ritz, shift: float) -> Float[np.ndarray, " S"]:
    """Bound the error e of each vector of `inverse_sqrt_coefficients` in the norm sqrt(e' (A + shift I) e).

    Start from (A + s)^{-1/2} = 2/pi int_0^inf (A + s + t^2)^{-1} dt. At each t the Krylov vector is the Galerkin
    solution of a shifted linear system, whose residual r(t) is known exactly from T. So

        |e|_{A+s} <= 2/pi int |r(t)| max_{x >= s} sqrt(x) / (x + t^2) dt,

    where the maximum is 1 / (2 t) for t^2 >= s and sqrt(s) / (s + t^2) below. This bounds the error of the Krylov
    method in exact arithmetic. Measured, the bound is at most about twice the error.

    Compare it with sqrt(n), the size of the exact vector in this norm. For posterior samples compare it with
    sqrt(tr A (A + shift I)^{-1}), the part that the data determine.

    Parameters
    ----------
    ritz
        The result of `krylov.ritz(decomposition)` for a positive semidefinite A.
    shift
        The positive shift s.

    Returns
    -------
    Float[np.ndarray, " S"]
        The bound for each probe.

    Notes
    -----
    Source: the residual bounds of Frommer and Simoncini (2009) for Stieltjes functions, taken in the energy norm.
    """
    root = np.sqrt(shift)
    # Below t = sqrt(shift) / 1000 the residual is constant, and beyond the spectrum it falls faster than 1 / t^2. So
    # this interval holds all of the integral but a rectangle at its lower end.
    times = np.geomspace(1e-3 * root, 1e2 * np.sqrt(shift + ritz.values.max()), 160)
    largest = np.where(times > root, 1 / (2 * times), root / (shift + times**2))
    norms = np.stack(
        [
            np.linalg.norm(ritz.tails @ (ritz.weights / (ritz.values + shift + time**2)[:, None]), axis=0)
            for time in times
        ]
    )
    integrand = norms * largest[:, None]
    # Over log t, in which the integrand is smooth.
    body = np.trapezoid(integrand * times[:, None], np.log(times), axis=0)
    return 2 / np.pi * (body + times[0] * integrand[0])
