"""Arnoldi: the Hessenberg factorisation of any square operator, and its adjoint.

Forward: A Q = Q H + r e_K' with H upper Hessenberg, by Gram-Schmidt of each A q_k against the vectors found so far.
Full reorthogonalisation makes two passes: "twice is enough" (Giraud, Langou, Rozloznik and van den Eshof 2005).

Adjoint: the equations of `adjoint.py`. Without reorthogonalisation the recurrence does not impose Q' Q = I, so the
adjoint is that of a single pass of classical Gram-Schmidt. As for Lanczos, it is the derivative of what was computed as
long as the loss of orthogonality is small.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bnnlaplace.core.linalg import matmul
from bnnlaplace.krylov import adjoint, breakdown, gram_schmidt
from bnnlaplace.krylov.derivative_modes import once_where
from bnnlaplace.krylov.gram_schmidt import safe_norm
from bnnlaplace.krylov.operator import Settings, decompose


class Arnoldi(NamedTuple):
    """A factorisation A Q = Q H + r e_K' of a square operator.

    Attributes
    ----------
    basis
        q_1..q_K along the leading axis of each leaf, otherwise like the start vector. Zero after a breakdown.
    hessenberg
        H, zero below the subdiagonal. Its columns after a breakdown are zero.
    residual
        r, like the start vector, orthogonal to the basis. Zero after a breakdown.
    start_norm
        |v|.
    breakdown_step
        The number m of basis vectors that span an invariant subspace, after which nothing follows. It is 0 for a zero
        start vector and -1 if there was no breakdown.
    """

    basis: PyTree[Float[Array, "K ..."]]
    hessenberg: Float[Array, "K K"]
    residual: PyTree[Float[Array, "..."]]
    start_norm: Float[Array, ""]
    breakdown_step: Int[Array, ""]


def arnoldi(
    matvec: Callable[..., PyTree],
    start: PyTree,
    *params: Any,
    num_matvecs: int,
    reorthogonalise: Literal["full", "none"] = "full",
    gradient: Literal["adjoint", "autodiff"] = "adjoint",
    vjp_batch_size: int = 1,
    breakdown_tolerance: float | None = None,
) -> Arnoldi:
    """Factorise a square `matvec(v, *params)` from `start`, differentiably.

    Parameters
    ----------
    matvec
        v, *params -> A v, linear in v. It may close over traced arrays, which are differentiated as well.
    start
        The start vector v: an array or a pytree of arrays of one real floating-point dtype, with n numbers together.
        It must not be zero.
    params
        Further arguments of `matvec`, any pytrees. Floating-point leaves are differentiable.
    num_matvecs
        The number of steps K, between 1 and n.
    reorthogonalise
        "full" makes two passes of Gram-Schmidt, which keep the basis orthogonal to rounding. "none" makes one pass: it
        loses orthogonality where A q_k lies almost in the span of the basis.
    gradient
        "adjoint" works in reverse mode only, with K products with the transposed operator and a vector-Jacobian product
        of K terms. "autodiff" differentiates the loop, in any mode, with memory of order K^2 n.
    vjp_batch_size
        How many of those K terms are computed at once. One at a time takes the least memory. More are faster if
        products gain from batching.
    breakdown_tolerance
        A residual |r| of at most this times max_k |A q_k| counts as rounding in an invariant space, and ends the
        recurrence. The default is 10 eps.

    Returns
    -------
    Arnoldi
        A breakdown ends the recurrence, as for `lanczos`.

    Raises
    ------
    ValueError, TypeError
        As for `lanczos`.

    Notes
    -----
    Cost: K products. Gram-Schmidt adds 4 K^2 n multiplications for "full" and 2 K^2 n for "none", and about 5 K^2 n and
    4 K^2 n in the adjoint. Memory is that of `lanczos`, with K n numbers more in the adjoint of "none". Products with
    the transposed operator come from `jax.vjp` of `matvec`. Second derivatives are as for `lanczos`.

    Source: Krämer et al. 2024, arXiv 2405.17277, section 4; the derivation is in `krylov/adjoint.py`.

    Examples
    --------
    >>> rotation = jnp.array([[0.0, -1.0], [1.0, 0.0]])
    >>> arnoldi(lambda v, a: a @ v, jnp.array([2.0, 0.0]), rotation, num_matvecs=2).hessenberg
    Array([[ 0., -1.],
           [ 1.,  0.]], dtype=float32)
    """
    options = {"reorthogonalise": reorthogonalise, "vjp_batch_size": vjp_batch_size}
    options |= {"num_matvecs": num_matvecs, "breakdown_tolerance": breakdown_tolerance}
    return decompose("arnoldi", arnoldi_forward, arnoldi_adjoint, gradient, matvec, start, params, **options)


def arnoldi_forward(matvec: Callable, settings: Settings, start: Array, arguments: tuple[Any, ...]) -> Arnoldi:
    """Arnoldi on a flat operator, as a loop that JAX differentiates like any other."""
    num = settings.num_matvecs
    first, start_norm = breakdown.first_vector(start)
    empty = jnp.zeros_like(start, shape=(num, start.size))
    # "none" promises one pass of *classical* Gram-Schmidt, which its adjoint relies on. Blocks would make it a modified
    # one.
    blocks = gram_schmidt.split(empty) if settings.reorthogonalise else (empty,)
    wanted = jnp.zeros_like(start, shape=num)

    def step(carry, k):
        blocks, vector, scale, _ = carry
        blocks = gram_schmidt.set_row(blocks, k, vector)
        image = matvec(vector, *arguments)
        # The largest |A q_k| so far stands for |A|: rounding of the early, large products stays in all later vectors.
        scale = jnp.maximum(scale, safe_norm(image))
        residual, column = gram_schmidt.impose(blocks, k, image, wanted)
        if settings.reorthogonalise:
            residual, correction = gram_schmidt.impose(blocks, k, residual, wanted)
            column = column + correction
        length = safe_norm(residual)
        following, coupling, residual = breakdown.normalise(residual, length, scale, settings.breakdown_tolerance)
        return (blocks, following, scale, residual), (column, coupling)

    carry = blocks, first, jnp.zeros_like(start_norm), jnp.zeros_like(start)
    (blocks, *_, residual), (columns, couplings) = jax.lax.scan(step, carry, jnp.arange(num))
    hessenberg = columns.T + jnp.diag(couplings[:-1], -1)
    breakdown_step = breakdown.step(start_norm, couplings)
    return Arnoldi(gram_schmidt.join(blocks), hessenberg, residual, start_norm, breakdown_step)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def arnoldi_adjoint(matvec: Callable, settings: Settings, start: Array, arguments: tuple[Any, ...]) -> Arnoldi:
    """Arnoldi on a flat operator that closes over no traced array, differentiated by its adjoint."""
    return arnoldi_forward(matvec, settings, start, arguments)


def _adjoint_forward(
    matvec: Callable, settings: Settings, start: Array, arguments: tuple[Any, ...]
) -> tuple[Arnoldi, tuple[Arnoldi, tuple[Any, ...]]]:
    result = arnoldi_forward(matvec, settings, start, arguments)
    return result, (result, arguments)


def _adjoint_backward(
    matvec: Callable, settings: Settings, saved: tuple[Arnoldi, tuple[Any, ...]], cotangent: Arnoldi
) -> tuple[Array, tuple[Any, ...]]:
    result, arguments = saved
    num = settings.num_matvecs
    alive = breakdown.reached(result.breakdown_step, num)
    # Cotangents count for what Arnoldi computes: entries on and above the subdiagonal, before a breakdown.
    computed = jnp.triu(jnp.ones((num, num), bool), -1) & alive & alive[:, None]
    cotangent = Arnoldi(
        jnp.where(alive[:, None], cotangent.basis, 0),
        jnp.where(computed, cotangent.hessenberg, 0),
        jnp.where(result.breakdown_step < 0, cotangent.residual, 0),
        cotangent.start_norm,
        cotangent.breakdown_step,
    )
    # A is linear, so its transpose is the same at every point. It is linearised once, outside of the loop.
    transpose = jax.vjp(lambda v: matvec(v, *arguments), result.basis[0])[1]
    solve = _full_multipliers if settings.reorthogonalise else _single_pass_multipliers
    multipliers, start = solve(lambda v: transpose(v)[0], result, cotangent, settings)
    gradient = adjoint.operator_cotangent(matvec, arguments, result.basis, multipliers, settings.vjp_batch_size)
    return once_where((start, gradient), breakdown.at_the_end(result.breakdown_step, num))


arnoldi_adjoint.defvjp(_adjoint_forward, _adjoint_backward)


def _full_multipliers(
    transpose: Callable, result: Arnoldi, cotangent: Arnoldi, settings: Settings
) -> tuple[Float[Array, "K n"], Float[Array, " n"]]:
    """Solve (r), (H) and (Q) of `adjoint.py` backwards; return L as rows and the cotangent of the start vector."""
    num, matrix, d_matrix = settings.num_matvecs, result.hessenberg, cotangent.hessenberg
    terms, last = adjoint.sources(result.basis, matrix, result.residual, cotangent.basis, d_matrix, cotangent.residual)
    blocks = gram_schmidt.split(result.basis)
    couplings = jnp.append(jnp.zeros_like(result.start_norm), jnp.diag(matrix, -1))

    def step(carry, inputs):
        rows, row, _ = carry
        k, matrix_row, coupling, wanted = inputs
        rows = jax.lax.dynamic_update_index_in_dim(rows, row, k, 0)
        # Rows before k are still zero, so the product is the sum over j >= k in (Qk).
        right = terms[k] + transpose(row) - matmul(matrix_row, rows)
        # A coupling of zero is a breakdown. The recurrence starts anew there from (r) with r = 0, by the projection.
        before = jnp.where(coupling != 0, right / jnp.where(coupling != 0, coupling, 1), 0)
        if settings.project:
            before, _ = gram_schmidt.impose(blocks, k, before, wanted)
        return (rows, before, right), None

    # The last step, at q_1, has no multiplier before it. It is there for its right-hand side.
    inputs = jnp.arange(num), matrix, couplings, jnp.roll(d_matrix, 1, axis=1).T
    (rows, _, right), _ = jax.lax.scan(step, (jnp.zeros_like(result.basis), last, last), inputs, reverse=True)
    return rows, adjoint.start_cotangent(right, result.basis[0], result.start_norm, cotangent.start_norm)


def _single_pass_multipliers(
    transpose: Callable, result: Arnoldi, cotangent: Arnoldi, settings: Settings
) -> tuple[Float[Array, "K n"], Float[Array, " n"]]:
    """Solve the adjoint of one pass of classical Gram-Schmidt.

    Forward, with h_ik = q_i' A q_k: u_k = A q_k - sum_{i <= k} h_ik q_i, b_k = |u_k|, q_{k+1} = u_k / b_k. Backward
    over k, where the cotangent x_k of q_k is complete once all steps j >= k are done:

        du_k = (I - q_{k+1} q_{k+1}') x_{k+1} / b_k + db_k q_{k+1},   du_K = dr,
        m_ik = dh_ik - q_i' du_k    for i <= k,
        l_k  = du_k + sum_{i <= k} m_ik q_i,                          the cotangent of A q_k
        x_k  = dq_k + A' l_k + sum_{j >= k} (m_kj A q_j - h_kj du_j).
    """
    num, basis, matrix = settings.num_matvecs, result.basis, result.hessenberg
    couplings = jnp.diag(matrix, -1)
    index = jnp.arange(num)
    upper = jnp.triu(matrix)

    def step(carry, inputs):
        d_residuals, weights, du, _ = carry
        k, matrix_row, column, d_coupling, coupling = inputs
        vector = basis[k]
        d_residuals = jax.lax.dynamic_update_index_in_dim(d_residuals, du, k, 0)
        m = jnp.where(index <= k, column - matmul(basis, du), 0)
        weights = jax.lax.dynamic_update_index_in_dim(weights, m, k, 1)
        row = du + matmul(m, basis)
        # The images A q_j are not stored: they are the columns of Q H, plus r for the last one.
        images = matmul(matmul(weights[k], matrix.T), basis) + weights[k, -1] * result.residual
        x = cotangent.basis[k] + transpose(row) + images - matmul(matrix_row, d_residuals)
        tangent = (x - vector * matmul(vector, x)) / jnp.where(coupling != 0, coupling, 1)
        before = jnp.where(coupling != 0, tangent + d_coupling * vector, 0)
        return (d_residuals, weights, before, x), row

    zero = jnp.zeros_like(result.start_norm)[None]
    # Arrays of K n numbers are indexed inside the loop. As inputs of `scan` they would be copied.
    inputs = (
        index,
        upper,
        jnp.triu(cotangent.hessenberg).T,
        jnp.concatenate([zero, jnp.diag(cotangent.hessenberg, -1)]),
        jnp.concatenate([zero, couplings]),
    )
    carry = jnp.zeros_like(basis), jnp.zeros_like(matrix), cotangent.residual, jnp.zeros_like(result.residual)
    (*_, right), rows = jax.lax.scan(step, carry, inputs, reverse=True)
    return rows, adjoint.start_cotangent(right, basis[0], result.start_norm, cotangent.start_norm)
