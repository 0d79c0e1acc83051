"""Lanczos tridiagonalisation with full reorthogonalisation, and its adjoint.

Forward. For symmetric A, a start vector v of norm c and K products:

    A Q = Q T + r e_K',    Q' Q = I,    Q' r = 0,    Q e_1 c = v,                                             (F)

with T tridiagonal: diagonal a_1..a_K, off-diagonal b_1..b_{K-1}.

Adjoint (Krämer, Moreno-Muñoz, Roy, Hauberg 2024, arXiv 2405.17277, section 3 and appendix, specialised to a
symmetric A). Let rho be a function of (Q, T, r, c) with cotangents dQ, dT (on the tridiagonal), dr, dc. The Lagrangian
adds <L, A Q - Q T - r e_K'>, <g, Q' r> and <S, Q' Q - I> with S symmetric. Stationarity in the outputs gives

    dr - L e_K + Q g = 0                                                                                     (r)
    (Q' L)_ij = dT_ij           for i <= j + 1: the part of T that Lanczos computes                           (T)
    dQ + A L - L T + r g' + Q S = 0,                                                                          (Q)

solved backwards: column K of L from (r), where (T) determines g = dT e_K - Q' dr; then column k of (Q) gives

    b_{k-1} L_{k-1} = [dQ_k + A L_k - a_k L_k - b_k L_{k+1} + r g_k] + Q S_k,

whose unknown S_k is a combination of the columns of Q: the bracket is projected so that (T) holds for column k - 1. The
components along q_1..q_k are so fixed by (T). Those along q_{k+1}..q_K follow in exact arithmetic from the symmetry of
S; they are used as that: S_jk = S_kj is known from the columns done before. This projection is what keeps the adjoint
accurate when rounding would otherwise feed on itself; it is the mirror image of reorthogonalisation.

The gradients: with respect to A in direction dA it is <L, dA Q>, one batched vector-Jacobian product; with respect
to v, from the bracket at k = 1, w, it is dc q_1 + (I - q_1 q_1') w / c.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.precise import matmul


class Lanczos(NamedTuple):
    """A Lanczos decomposition A Q' = Q' T + r e_K' with the basis vectors as rows of Q.

    Attributes
    ----------
    basis
        Q: K orthonormal rows; rows after a breakdown are zero.
    diagonal, off_diagonal
        T; entries after a breakdown are zero.
    residual
        r, orthogonal to the basis; zero after a breakdown.
    start_norm
        |v|.
    """

    basis: Float[Array, "K n"]
    diagonal: Float[Array, " K"]
    off_diagonal: Float[Array, " K-1"]
    residual: Float[Array, " n"]
    start_norm: Float[Array, ""]


def lanczos(
    matvec: Callable[..., Float[Array, " n"]],
    start: Float[Array, " n"],
    *params: Any,
    num_matvecs: int,
    gradient: Literal["adjoint", "autodiff"] = "adjoint",
) -> Lanczos:
    """Decompose a symmetric `matvec(v, *params)` from `start`, differentiably.

    Parameters
    ----------
    matvec
        v, *params -> A v. It may close over traced arrays: those are differentiated as well.
    start
        The start vector, not zero.
    params
        Differentiable arguments of `matvec`, any pytrees.
    num_matvecs
        K, between 1 and n.
    gradient
        "adjoint": K further products and one batched vector-Jacobian product. "autodiff": through the loop.

    Raises
    ------
    ValueError
        If `num_matvecs` is out of range or `gradient` unknown.

    Notes
    -----
    Cost: K products and two passes of orthogonalisation, 4 K^2 n multiplications; memory K n numbers. A breakdown (an
    invariant subspace was found) ends the recurrence: everything after it is zero, so no spurious Ritz value appears
    with any weight.
    """
    if not 1 <= num_matvecs <= start.size:
        raise ValueError(
            f"lanczos(num_matvecs=...) must lie between 1 and the dimension {start.size}; got {num_matvecs}; lower it"
        )
    if gradient == "autodiff":
        return _forward(lambda v: matvec(v, *params), start, num_matvecs)
    if gradient != "adjoint":
        raise ValueError(f"lanczos(gradient=...) must be 'adjoint' or 'autodiff'; got {gradient!r}")
    closed, consts = jax.closure_convert(matvec, start, *params)
    return _lanczos_adjoint(closed, num_matvecs, start, (params, consts))


def _forward(matvec: Callable, start: Array, num_matvecs: int) -> Lanczos:
    norm = _norm(start)
    basis = jnp.zeros((num_matvecs, start.size), start.dtype)
    first = start / jnp.where(norm > 0, norm, 1)

    def step(carry, k):
        basis, vector, scale = carry
        basis = basis.at[k].set(vector)
        image = matvec(vector)
        diagonal = matmul(vector, image)
        scale = jnp.maximum(scale, _norm(image))
        residual = _orthogonalise(basis, _orthogonalise(basis, image))
        off_diagonal = _norm(residual)
        # Below this the residual is rounding: the Krylov space is invariant, and normalising noise would reinsert
        # directions already found as spurious Ritz values.
        alive = off_diagonal > 10 * jnp.finfo(start.dtype).eps * scale
        residual = jnp.where(alive, residual, 0)
        off_diagonal = jnp.where(alive, off_diagonal, 0)
        return (basis, residual / jnp.where(alive, off_diagonal, 1), scale), (diagonal, off_diagonal, residual)

    carry = basis, first, jnp.zeros((), start.dtype)
    (basis, *_), (diagonal, off_diagonal, residuals) = jax.lax.scan(step, carry, jnp.arange(num_matvecs))
    return Lanczos(basis, diagonal, off_diagonal[:-1], residuals[-1], norm)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _lanczos_adjoint(matvec: Callable, num_matvecs: int, start: Array, arguments: Any) -> Lanczos:
    params, consts = arguments
    return _forward(lambda v: matvec(v, *params, *consts), start, num_matvecs)


def _adjoint_forward(
    matvec: Callable, num_matvecs: int, start: Array, arguments: Any
) -> tuple[Lanczos, tuple[Lanczos, Any]]:
    result = _lanczos_adjoint(matvec, num_matvecs, start, arguments)
    return result, (result, arguments)


def _adjoint_backward(
    matvec: Callable, num_matvecs: int, saved: tuple[Lanczos, Any], cotangent: Lanczos
) -> tuple[Array, Any]:
    result, (params, consts) = saved
    multipliers, start_cotangent = _adjoint_multipliers(
        lambda v: matvec(v, *params, *consts), result, cotangent, num_matvecs
    )

    def pairing(arguments):
        params, consts = arguments
        # Checkpointed: otherwise what each of the K products saves for its derivative is alive at once.
        images = jax.lax.map(jax.checkpoint(lambda q: matvec(q, *params, *consts)), result.basis)
        return jnp.sum(images * multipliers)

    (arguments_cotangent,) = jax.vjp(pairing, (params, consts))[1](jnp.ones((), multipliers.dtype))
    return start_cotangent, arguments_cotangent


_lanczos_adjoint.defvjp(_adjoint_forward, _adjoint_backward)


def _adjoint_multipliers(
    matvec: Callable, result: Lanczos, cotangent: Lanczos, num: int
) -> tuple[Float[Array, "K n"], Float[Array, " n"]]:
    """Solve the adjoint system backwards for the rows of L; return L and the cotangent of the start vector."""
    basis, diagonal, residual = result.basis, result.diagonal, result.residual
    off_diagonal = jnp.append(result.off_diagonal, 0)
    d_off = jnp.append(cotangent.off_diagonal, 0)
    index = jnp.arange(num)

    def computed_column(k):
        # dT_ik for i <= k + 1, the entries that (T) prescribes: zero above the diagonal
        return cotangent.diagonal[k] * (index == k) + d_off[k] * (index == k + 1)

    # A residual that broke down is a constant zero: what is asked of it reaches nothing.
    d_residual = jnp.where(matmul(residual, residual) > 0, cotangent.residual, 0)
    g = computed_column(num - 1) - matmul(basis, d_residual)
    last = d_residual + matmul(g, basis)

    def step(carry, k):
        row, row_above, symmetric = carry
        bracket = cotangent.basis[k] + matvec(row) - diagonal[k] * row - off_diagonal[k] * row_above + g[k] * residual
        b = off_diagonal[k - 1]
        along = matmul(basis, bracket)
        # Rows i <= k of Q' L_{k-1} are prescribed; the others follow from the symmetry of S.
        wanted = jnp.where(index <= k, b * computed_column(k - 1) - along, symmetric[:, k])
        symmetric = symmetric.at[k].set(jnp.where(index <= k, wanted, symmetric[k]))
        below = bracket + matmul(wanted, basis)
        # Where the forward recurrence broke down the backward one starts anew, from (r) with r = 0.
        below = jnp.where(b > 0, below / jnp.where(b > 0, b, 1), matmul(computed_column(k - 1), basis))
        return (below, row, symmetric), row

    carry = last, jnp.zeros_like(last), jnp.zeros((num, num), basis.dtype)
    carry, rows = jax.lax.scan(step, carry, jnp.arange(num - 1, 0, -1))
    row, row_above, symmetric = carry
    multipliers = jnp.concatenate([row[None], rows[::-1]])
    bracket = cotangent.basis[0] + matvec(row) - diagonal[0] * row - off_diagonal[0] * row_above + g[0] * residual
    free = bracket + matmul(jnp.where(index == 0, 0, symmetric[:, 0]), basis)
    first = basis[0]
    tangent = (free - first * matmul(first, free)) / jnp.where(result.start_norm > 0, result.start_norm, 1)
    return multipliers, cotangent.start_norm * first + tangent


def _orthogonalise(basis: Float[Array, "K n"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    return vector - matmul(matmul(basis, vector), basis)


def _norm(vector: Array) -> Array:
    # The gradient of a plain norm is NaN at zero, where a breakdown ends up.
    square = matmul(vector, vector)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
