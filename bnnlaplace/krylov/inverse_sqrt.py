"""(A + shift I)^{-1/2} z for every probe of a block decomposition, at every shift, with a bound of the error."""

import numpy as np
from jaxtyping import Float

from bnnlaplace.krylov.block_lanczos import Ritz


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
