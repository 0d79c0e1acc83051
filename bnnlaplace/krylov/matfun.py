"""Functions of a matrix times a vector, from a Krylov decomposition, with their errors.

f(A) v is approximated in the Krylov space of v by |v| Q f(T) e_1, which is exact once the space is invariant, and for
polynomials of degree K - 1 (Saad 1992; Higham 2008, chapter 13). One Lanczos or Arnoldi run serves one vector,
differentiably; one block decomposition serves every probe of its block at every shift.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.krylov.arnoldi import arnoldi
from bnnlaplace.krylov.block_lanczos import Ritz
from bnnlaplace.krylov.lanczos import Lanczos, lanczos
from bnnlaplace.krylov.tridiagonal import function_times_first
from bnnlaplace.precise import matmul


class MatrixFunction(NamedTuple):
    """f(A) v and an estimate of its error.

    Attributes
    ----------
    value
        f(A) v, like the vector.
    error
        How much |f(A) v - value| fell over the last fifth of the steps: an estimate, no bound, of what is left, on the
        safe side where convergence is at least linear. Zero where the space is invariant. It has no gradient.
    """

    value: PyTree[Float[Array, "..."]]
    error: Float[Array, ""]


def matfun_lanczos(
    function: Callable[[Float[Array, ""]], Float[Array, ""]],
    matvec: Callable[..., PyTree],
    vector: PyTree,
    *params: Any,
    num_matvecs: int,
    reorthogonalise: Literal["full", "none"] = "full",
    gradient: Literal["adjoint", "autodiff"] = "adjoint",
    vjp_batch_size: int = 1,
) -> MatrixFunction:
    """f(A) v for a symmetric A and any scalar f, differentiable in v, A and f.

    Parameters
    ----------
    function
        f, from a scalar to a scalar, smooth on the spectrum of A: `jnp.exp`, `jnp.log`, `jnp.sqrt`, `jax.lax.rsqrt`, or
        your own. It may close over traced arrays, which are differentiated as well.
    matvec, params, num_matvecs, reorthogonalise, gradient, vjp_batch_size
        As for `lanczos`.
    vector
        v, as `start` of `lanczos`.

    Raises
    ------
    ValueError, TypeError
        As for `lanczos`.

    Notes
    -----
    Cost: that of `lanczos`, and of order K^3. Memory: K n numbers.

    Examples
    --------
    >>> d = jnp.array([1.0, 4.0, 9.0])
    >>> root = matfun_lanczos(jnp.sqrt, lambda v: d * v, jnp.ones(3), num_matvecs=3)
    >>> bool(jnp.allclose(root.value, jnp.array([1.0, 2.0, 3.0]), atol=1e-4))
    True
    """
    options = {"reorthogonalise": reorthogonalise, "gradient": gradient, "vjp_batch_size": vjp_batch_size}
    steps = lanczos(matvec, vector, *params, num_matvecs=num_matvecs, **options)
    coordinates, change = function_times_start(function, steps)
    value = jax.tree.map(lambda leaf: jnp.tensordot(coordinates, leaf, 1, precision="highest"), steps.basis)
    return MatrixFunction(value, _length(change))


def matfun_arnoldi(
    function: Callable[[Float[Array, "k k"]], Float[Array, "k k"]],
    matvec: Callable[..., PyTree],
    vector: PyTree,
    *params: Any,
    num_matvecs: int,
    reorthogonalise: Literal["full", "none"] = "full",
    gradient: Literal["adjoint", "autodiff"] = "adjoint",
    vjp_batch_size: int = 1,
) -> MatrixFunction:
    """f(A) v for any square A, with f given on dense matrices; differentiable in v, A and f.

    Parameters
    ----------
    function
        f on small dense matrices, such as `jax.scipy.linalg.expm`; it is differentiated as it is.
    matvec, params, num_matvecs, reorthogonalise, gradient, vjp_batch_size
        As for `arnoldi`.
    vector
        v, as `start` of `arnoldi`.

    Raises
    ------
    ValueError, TypeError
        As for `arnoldi`.

    Notes
    -----
    Cost: that of `arnoldi`, and `function` of two K x K matrices. Memory: K n numbers.

    Examples
    --------
    >>> quarter_turn = jnp.pi / 2 * jnp.array([[0.0, -1.0], [1.0, 0.0]])
    >>> start = jnp.array([2.0, 0.0])
    >>> turned = matfun_arnoldi(jax.scipy.linalg.expm, lambda v: quarter_turn @ v, start, num_matvecs=2)
    >>> bool(jnp.allclose(turned.value, jnp.array([0.0, 2.0]), atol=1e-4))
    True
    """
    options = {"reorthogonalise": reorthogonalise, "gradient": gradient, "vjp_batch_size": vjp_batch_size}
    steps = arnoldi(matvec, vector, *params, num_matvecs=num_matvecs, **options)
    # After a breakdown H is zero, where f need not be defined; e_1 does not reach that part.
    reached = (jnp.arange(num_matvecs) < steps.breakdown_step) | (steps.breakdown_step < 0)
    matrix = steps.hessenberg + jnp.diag(jnp.where(reached, 0, jax.lax.stop_gradient(steps.hessenberg[0, 0])))
    coordinates = steps.start_norm * function(matrix)[:, 0]
    fewer = _without_last_fifth(num_matvecs)
    before = function(jax.lax.stop_gradient(matrix[:fewer, :fewer]))[:, 0] * steps.start_norm
    change = _change(coordinates, before, steps.breakdown_step)
    value = jax.tree.map(lambda leaf: jnp.tensordot(coordinates, leaf, 1, precision="highest"), steps.basis)
    return MatrixFunction(value, _length(change))


def function_times_start(
    function: Callable[[Float[Array, ""]], Float[Array, ""]], steps: Lanczos
) -> tuple[Float[Array, " K"], Float[Array, " K"]]:
    """|v| f(T) e_1, the coordinates of f(A) v in the basis, and what of it came with the last fifth of the steps."""
    coordinates = steps.start_norm * function_times_first(
        function, steps.diagonal, steps.off_diagonal, steps.breakdown_step
    )
    fewer = _without_last_fifth(len(steps.diagonal))
    shorter = jax.lax.stop_gradient((steps.diagonal[:fewer], steps.off_diagonal[: fewer - 1], steps.breakdown_step))
    before = steps.start_norm * function_times_first(function, *shorter)
    return coordinates, _change(coordinates, before, steps.breakdown_step)


def _without_last_fifth(num_matvecs: int) -> int:
    return max(num_matvecs - max(num_matvecs // 5, 1), 1)


def _change(coordinates: Array, before: Array, breakdown_step: Array) -> Array:
    """The difference of two approximations, the shorter one padded; zero in an invariant space. It has no gradient."""
    change = coordinates - jnp.pad(before, (0, len(coordinates) - len(before)))
    # A single step has nothing before it to compare with.
    change = change if len(coordinates) > 1 else coordinates
    return jax.lax.stop_gradient(jnp.where(breakdown_step < 0, change, 0))


def _length(change: Array) -> Array:
    return jnp.sqrt(matmul(change, change))


def inverse_sqrt_coefficients(ritz: Ritz, shift: float) -> Float[np.ndarray, "S m"]:
    """Coordinates in the basis of (A + shift I)^{-1/2} z for every probe z.

    One decomposition serves every shift, since the Krylov space does not depend on it. Each probe lies in the first
    block, so its part outside the leading eigenspace is in the basis too and keeps its scale shift^{-1/2}.

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
