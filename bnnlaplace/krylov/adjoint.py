"""The adjoint equations of Lanczos and Arnoldi, their multipliers, and the gradients that come out of them.

Both decompositions are differentiated by the method of Lagrange multipliers, and this file holds what they share.
`lanczos.py` and `arnoldi.py` each solve the equations in their own recurrence.

Forward. K steps from a vector v give an orthonormal basis, the columns q_1..q_K of Q, with

    A Q = Q H + r e_K',    Q' Q = I,    Q' r = 0,    q_1 = v / |v|,                                            (F)

H upper Hessenberg; for a symmetric A it is the tridiagonal T. Let rho be a scalar function of Q, H, r and |v| with
cotangents dQ, dH (on i <= j + 1), dr, dc. Its Lagrangian adds <L, A Q - Q H - r e_K'>, <g, Q' r> and <S, Q' Q - I> / 2,
S symmetric. It is stationary in the outputs where (Krämer, Moreno-Muñoz, Roy and Hauberg 2024, arXiv 2405.17277,
sections 3 and 4 and the appendix)

    dr - l_K + Q g = 0                                                                                         (r)
    q_i' l_j = dH_ij    for i <= j + 1                                                                         (H)
    dQ + A' L - L H' + r g' + Q S = 0                                                                          (Q)

with l_k the columns of L. They are solved backwards. (r) with (H) gives g = dH e_K - Q' dr and l_K. Column k of (Q)
then gives l_{k-1} from those after it:

    H_{k,k-1} l_{k-1} = dq_k + A' l_k - sum_{j >= k} H_kj l_j + g_k r + Q s_k.                                 (Qk)

Multipliers. The paper finds S step by step, from inner products of the right-hand side of (Qk). But S is known before
the recurrence starts: multiply column k of (Q) by q_i', i <= k, and use (F) for A q_i. Every product q_m' l_j that
appears has m <= j + 1, so (H) prescribes it:

    S_ik = -(Q' dQ + H' D - D H' + (r' dr) e_K e_K')_ik    for i <= k,                                         (S)

D being dH with zeros below the subdiagonal. The rest of S follows by symmetry. So Q S is one product of matrices, and
the recurrence itself needs no inner products with the basis.

Projection. In floating point l_{k-1} drifts away from (H), and the division by a small H_{k,k-1} magnifies the drift,
just as the forward recurrence loses orthogonality. If the forward recurrence reorthogonalises, the adjoint projects
l_{k-1} back onto (H): it changes l_{k-1} within the span of q_1..q_k so that its products with them are column k - 1
of D.

Breakdown. If m steps found an invariant subspace, r is zero and all later outputs are constant zeros. Their cotangents
are ignored, and (Qk) starts anew at k = m with g = D e_m.

Gradients. In the direction dA of the operator, sum_k l_k' dA q_k: one vector-Jacobian product of theta -> sum_k l_k'
A(theta) q_k. In v, with w the right-hand side of (Qk) at k = 1: dc q_1 + (I - q_1 q_1') w / |v|.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.tree import floating


def sources(
    basis: Float[Array, "K n"],
    hessenberg: Float[Array, "K K"],
    residual: Float[Array, " n"],
    d_basis: Float[Array, "K n"],
    d_hessenberg: Float[Array, "K K"],
    d_residual: Float[Array, " n"],
) -> tuple[Float[Array, "K n"], Float[Array, " n"]]:
    """Return the terms dq_k + g_k r + Q s_k of (Qk), one row for each k, and l_K."""
    # Equation (S). The rows of `basis` are the columns of Q, so `basis @ d_basis.T` is Q' dQ.
    products = matmul(basis, d_basis.T) + matmul(hessenberg.T, d_hessenberg) - matmul(d_hessenberg, hessenberg.T)
    products = products.at[-1, -1].add(matmul(residual, d_residual))
    multipliers = -(jnp.triu(products) + jnp.triu(products, 1).T)
    # Equation (r), multiplied by Q' and with column K of (H) for Q' l_K.
    g = d_hessenberg[:, -1] - matmul(basis, d_residual)
    return d_basis + g[:, None] * residual + matmul(multipliers, basis), d_residual + matmul(g, basis)


def start_cotangent(
    right_hand_side: Float[Array, " n"],
    first: Float[Array, " n"],
    norm: Float[Array, ""],
    d_norm: Float[Array, ""],
) -> Float[Array, " n"]:
    """Return the cotangent of v, given those of q_1 = v / |v| and of |v|."""
    # q_1 has length one, so only what is orthogonal to it counts.
    tangent = right_hand_side - first * matmul(first, right_hand_side)
    return d_norm * first + tangent / jnp.where(norm > 0, norm, 1)


def operator_cotangent(
    matvec: Callable[..., Float[Array, " n"]],
    arguments: tuple[Any, ...],
    basis: Float[Array, "K n"],
    multipliers: Float[Array, "K n"],
    batch_size: int,
) -> tuple[Any, ...]:
    """Return the cotangent of `arguments`: the gradient of sum_k l_k' A(arguments) q_k.

    `batch_size` terms are differentiated at a time. Leaves of `arguments` that are not floating point get None. Memory:
    what the derivative of `batch_size` products saves, and one copy of `arguments`.
    """
    active, fill, cotangent = floating(arguments)
    if not active:
        return cotangent([])

    def pairing(active: list[Array], rows: Array, weights: Array) -> Array:
        arguments = fill(active)
        return jnp.sum(jax.vmap(lambda row: matvec(row, *arguments))(rows) * weights)

    def add(total: list[Array], first: Any, size: int) -> list[Array]:
        rows, weights = (jax.lax.dynamic_slice_in_dim(x, first, size) for x in (basis, multipliers))
        return jax.tree.map(jnp.add, total, jax.grad(pairing)(active, rows, weights))

    # Each batch is cut out of the rows when it is needed: a `scan` over rows laid out in batches would copy them all.
    num_batches, rest = divmod(len(basis), batch_size)
    total = jax.tree.map(jnp.zeros_like, active)
    if num_batches:
        total = jax.lax.fori_loop(0, num_batches, lambda i, total: add(total, i * batch_size, batch_size), total)
    return cotangent(add(total, num_batches * batch_size, rest) if rest else total)
