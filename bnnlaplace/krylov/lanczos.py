"""Lanczos tridiagonalisation of a symmetric operator, and its adjoint.

Forward: A Q = Q T + r e_K' with T tridiagonal, a_1..a_K on its diagonal and b_1..b_{K-1} beside it, by

    b_k q_{k+1} = A q_k - a_k q_k - b_{k-1} q_{k-1}.                                                           (L)

Full reorthogonalisation makes two passes over the vectors found so far. (L) is the first: all other products of A q_k
with the basis vanish but for rounding, of the size of eps |A|. The second pass removes that. It leaves an error of eps
times what it removed, so where it removed more than it kept a third one follows (Kahan's criterion, Parlett 1998,
section 6.9). For a product that is symmetric to rounding this happens next to a breakdown only.
What ends the recurrence stands in `breakdown.py`.

Adjoint: the equations of `adjoint.py`, in which a symmetric A leaves in (Qk) only j = k and j = k + 1 of the sum, and
A' = A. Without reorthogonalisation Q' Q = I is not what the recurrence imposes, and the adjoint of (L) itself is taken:
the derivative of what was computed while the loss of orthogonality is small. Once Ritz values were found twice, single
basis vectors depend on rounding, and their gradients with them; traces and f(A) v keep their digits, values and
gradients.
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
from bnnlaplace.krylov.gram_schmidt import anywhere, safe_norm
from bnnlaplace.krylov.operator import Settings, decompose
from bnnlaplace.krylov.tridiagonal import tridiagonal_matrix


class Lanczos(NamedTuple):
    """A decomposition A Q = Q T + r e_K' of a symmetric operator.

    Attributes
    ----------
    basis
        q_1..q_K along the leading axis of each leaf, otherwise like the start vector; zero after a breakdown.
    diagonal, off_diagonal
        T; zero after a breakdown.
    residual
        r, like the start vector, orthogonal to the basis; zero after a breakdown.
    start_norm
        |v|.
    breakdown_step
        m where the first m basis vectors span an invariant subspace, so that nothing follows them; 0 for a zero start
        vector; -1 where there was no breakdown.
    """

    basis: PyTree[Float[Array, "K ..."]]
    diagonal: Float[Array, " K"]
    off_diagonal: Float[Array, " K-1"]
    residual: PyTree[Float[Array, "..."]]
    start_norm: Float[Array, ""]
    breakdown_step: Int[Array, ""]


def lanczos(
    matvec: Callable[..., PyTree],
    start: PyTree,
    *params: Any,
    num_matvecs: int,
    reorthogonalise: Literal["full", "none"] = "full",
    gradient: Literal["adjoint", "autodiff"] = "adjoint",
    vjp_batch_size: int = 1,
    breakdown_tolerance: float | None = None,
) -> Lanczos:
    """Decompose a symmetric `matvec(v, *params)` from `start`, differentiably.

    Parameters
    ----------
    matvec
        v, *params -> A v, linear in v, with a symmetric A: `check_symmetric` finds one that is not. It may close over
        traced arrays, which are differentiated as well.
    start
        v: an array or a pytree of arrays of one real floating-point dtype, n numbers together, not zero.
    params
        Arguments of `matvec`, any pytrees; floating-point leaves are differentiable.
    num_matvecs
        K, between 1 and n.
    reorthogonalise
        "full": the basis is orthogonal to rounding. "none": the three-term recurrence alone, which loses
        orthogonality as Ritz values converge and then finds them again.
    gradient
        "adjoint": reverse mode only, K further products and a vector-Jacobian product of K terms. "autodiff": through
        the loop, in any mode, with memory of order K^2 n.
    vjp_batch_size
        How many of those K terms at once. One at a time takes the least memory; more are faster where products gain
        from batching.
    breakdown_tolerance
        A residual |r| of at most this times max_k |A q_k| is taken for rounding in an invariant space, and is a
        breakdown; 10 eps unless given.

    Returns
    -------
    Lanczos
        A breakdown ends the recurrence: everything after it is zero, and gradients are those of what came before it.

        The recurrence can magnify rounding, so that an invariant space leaves a residual above the tolerance (the
        numbers stand in `krylov/breakdown.py`). The recurrence then goes on in the rest of the space: z' f(A) z and
        f(A) z keep their digits, but T has Ritz values of vectors that z has no component along, copies of others among
        them. Raise `breakdown_tolerance` where that matters more than what a small coupling carries.

    Raises
    ------
    ValueError
        If an option is out of range or unknown, or, outside of `jit`, `start` is zero or not finite. Inside of `jit` a
        zero `start` gives `breakdown_step` 0, one that is not finite NaN.
    TypeError
        If `start` is not real floating point of one dtype, `matvec` is no function or returns another structure, shape
        or dtype than it takes, a number among the options is of the wrong type or traced, or a forward-mode derivative
        of the adjoint is asked for.

    Notes
    -----
    Cost: K products; for "full" in addition about 2 K^2 n multiplications, and about 4 K^2 n in the adjoint. Memory at
    its peak: K n numbers, 3.3 K n with the adjoint, and K n more in both where the basis exceeds 8 MB; 1.5 K^2 n for
    the derivatives of "autodiff". Everything is computed in the dtype of `start`. Call it within `jit`: outside of it
    each call compiles its loop again.

    Second derivatives are the adjoint differentiated again. Past a breakdown, where they would need directions that the
    recurrence has not seen, they are NaN: lower `num_matvecs` to `breakdown_step`.

    Where A is a matrix that is passed as it is, gradients in an entry and in its mirror image differ, as through the
    loop: only their sum has a meaning.

    Source: Krämer et al. 2024, arXiv 2405.17277, section 4; the derivation stands in `krylov/adjoint.py`.

    Examples
    --------
    >>> result = lanczos(lambda v, d: d * v, jnp.ones(3), jnp.array([1.0, 2.0, 4.0]), num_matvecs=3)
    >>> ritz_values = jnp.linalg.eigvalsh(tridiagonal_matrix(result.diagonal, result.off_diagonal))
    >>> bool(jnp.allclose(ritz_values, jnp.array([1.0, 2.0, 4.0]), atol=1e-4))
    True
    """
    options = {"reorthogonalise": reorthogonalise, "vjp_batch_size": vjp_batch_size}
    options |= {"num_matvecs": num_matvecs, "breakdown_tolerance": breakdown_tolerance}
    return decompose("lanczos", lanczos_forward, lanczos_adjoint, gradient, matvec, start, params, **options)


def lanczos_forward(
    matvec: Callable, settings: Settings, start: Float[Array, " n"], arguments: tuple[Any, ...]
) -> Lanczos:
    """Lanczos of a flat operator, as a loop that JAX differentiates like any other."""
    num = settings.num_matvecs
    first, start_norm = breakdown.first_vector(start)
    blocks = gram_schmidt.split(jnp.zeros_like(start, shape=(num, start.size)))

    def step(carry, k):
        blocks, previous, vector, coupling, scale, _ = carry
        blocks = gram_schmidt.set_row(blocks, k, vector)
        image = matvec(vector, *arguments)
        scale = jnp.maximum(scale, safe_norm(image))
        diagonal = matmul(vector, image)
        residual = image - diagonal * vector - coupling * previous
        if settings.reorthogonalise:
            residual, length = _reorthogonalise(blocks, k, residual)
        else:
            length = safe_norm(residual)
        following, coupling, residual = breakdown.normalise(residual, length, scale, settings.breakdown_tolerance)
        return (blocks, vector, following, coupling, scale, residual), (diagonal, coupling)

    none, zero = jnp.zeros_like(start), jnp.zeros_like(start_norm)
    carry = blocks, none, first, zero, zero, none
    (blocks, *_, residual), (diagonal, couplings) = jax.lax.scan(step, carry, jnp.arange(num))
    breakdown_step = breakdown.step(start_norm, couplings)
    return Lanczos(gram_schmidt.join(blocks), diagonal, couplings[:-1], residual, start_norm, breakdown_step)


@jax.checkpoint
def _reorthogonalise(blocks: gram_schmidt.Blocks, last: Array, vector: Array) -> tuple[Array, Array]:
    """`vector` without what lies along the rows, and its length."""
    wanted = jnp.zeros_like(vector, shape=sum(map(len, blocks)))
    kept, removed = gram_schmidt.impose(blocks, last, vector, wanted)
    length = safe_norm(kept)

    def once_more() -> tuple[Array, Array]:
        again, _ = gram_schmidt.impose(blocks, last, kept, wanted)
        return again, safe_norm(again)

    return jax.lax.cond(anywhere(safe_norm(removed) > length), once_more, lambda: (kept, length))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def lanczos_adjoint(matvec: Callable, settings: Settings, start: Array, arguments: tuple[Any, ...]) -> Lanczos:
    """Lanczos of a flat operator that closes over nothing, differentiated by its adjoint."""
    return lanczos_forward(matvec, settings, start, arguments)


def _adjoint_forward(
    matvec: Callable, settings: Settings, start: Array, arguments: tuple[Any, ...]
) -> tuple[Lanczos, tuple[Lanczos, tuple[Any, ...]]]:
    result = lanczos_forward(matvec, settings, start, arguments)
    return result, (result, arguments)


def _adjoint_backward(
    matvec: Callable, settings: Settings, saved: tuple[Lanczos, tuple[Any, ...]], cotangent: Lanczos
) -> tuple[Array, tuple[Any, ...]]:
    result, arguments = saved
    alive = breakdown.reached(result.breakdown_step, settings.num_matvecs)
    cotangent = Lanczos(
        jnp.where(alive[:, None], cotangent.basis, 0),
        jnp.where(alive, cotangent.diagonal, 0),
        jnp.where(result.off_diagonal != 0, cotangent.off_diagonal, 0),
        jnp.where(result.breakdown_step < 0, cotangent.residual, 0),
        cotangent.start_norm,
        cotangent.breakdown_step,
    )
    solve = _full_multipliers if settings.reorthogonalise else _local_multipliers
    multipliers, start = solve(lambda v: matvec(v, *arguments), result, cotangent, settings)
    gradient = adjoint.operator_cotangent(matvec, arguments, result.basis, multipliers, settings.vjp_batch_size)
    return once_where((start, gradient), breakdown.at_the_end(result.breakdown_step, settings.num_matvecs))


lanczos_adjoint.defvjp(_adjoint_forward, _adjoint_backward)


def _full_multipliers(
    matvec: Callable, result: Lanczos, cotangent: Lanczos, settings: Settings
) -> tuple[Float[Array, "K n"], Float[Array, " n"]]:
    """Solve (r), (H), (Q) of `adjoint.py` backwards: the rows of L, and the cotangent of the start vector."""
    num = settings.num_matvecs
    matrix = tridiagonal_matrix(result.diagonal, result.off_diagonal)
    # Lanczos computes the diagonal and the subdiagonal; the superdiagonal is a copy.
    d_matrix = jnp.diag(cotangent.diagonal) + jnp.diag(cotangent.off_diagonal, -1)
    terms, last = adjoint.sources(result.basis, matrix, result.residual, cotangent.basis, d_matrix, cotangent.residual)
    blocks = gram_schmidt.split(result.basis)
    couplings = jnp.append(jnp.zeros_like(result.start_norm), result.off_diagonal)

    def step(carry, inputs):
        row, row_after, _ = carry
        k, diagonal, off_diagonal, coupling, wanted = inputs
        right = terms[k] + matvec(row) - diagonal * row - off_diagonal * row_after
        # Where the forward recurrence broke down this one starts anew, from (r) with r = 0, by the projection.
        before = jnp.where(coupling != 0, right / jnp.where(coupling != 0, coupling, 1), 0)
        if settings.project:
            before, _ = gram_schmidt.impose(blocks, k, before, wanted)
        return (before, row, right), row

    # Arrays of K n numbers are indexed within the loop: sliced for it, they would be copied. The last step, at q_1, has
    # nothing before it and is there for its right-hand side.
    off_diagonal = jnp.append(result.off_diagonal, 0)
    inputs = jnp.arange(num), result.diagonal, off_diagonal, couplings, jnp.roll(d_matrix, 1, axis=1).T
    zero = jnp.zeros_like(last)
    (*_, right), rows = jax.lax.scan(step, (last, zero, zero), inputs, reverse=True)
    return rows, adjoint.start_cotangent(right, result.basis[0], result.start_norm, cotangent.start_norm)


def _local_multipliers(
    matvec: Callable, result: Lanczos, cotangent: Lanczos, settings: Settings
) -> tuple[Float[Array, "K n"], Float[Array, " n"]]:
    """The adjoint of (L) with a_k = q_k' A q_k and b_k = |A q_k - a_k q_k - b_{k-1} q_{k-1}|, and nothing else imposed.

    Step k receives the cotangents x of q_{k+1}, y of q_k and db of b_k from their later uses in the recurrence. With
    u = b_k q_{k+1} it finds

        du = (I - q_{k+1} q_{k+1}') x / b_k + db q_{k+1},
        l_k = du + (da_k - q_k' du) q_k,                       the cotangent of A q_k
        dq_k <- y + A l_k - a_k du + (da_k - q_k' du) A q_k,   dq_{k-1} <- -b_{k-1} du,   db_{k-1} <- -q_{k-1}' du.
    """
    basis = result.basis
    zero = jnp.zeros_like(result.start_norm)[None]
    couplings = jnp.concatenate([zero, result.off_diagonal])
    # Arrays of K n numbers are indexed within the loop: sliced for it, they would be copied.
    inputs = (
        jnp.arange(settings.num_matvecs),
        result.diagonal,
        cotangent.diagonal,
        couplings,
        jnp.concatenate([zero, cotangent.off_diagonal]),
    )

    def step(carry, inputs):
        du, to_vector, following, _ = carry
        k, diagonal, d_diagonal, coupling, d_coupling = inputs
        vector = basis[k]
        previous = jnp.where(k > 0, basis[k - 1], 0)
        # `following` is u, not normalised, so that it serves the last residual as well.
        d_diagonal = d_diagonal - matmul(vector, du)
        image = following + diagonal * vector + coupling * previous
        row = du + d_diagonal * vector
        x = cotangent.basis[k] + to_vector + matvec(row) - diagonal * du + d_diagonal * image
        d_coupling = d_coupling - matmul(previous, du)
        tangent = (x - vector * matmul(vector, x)) / jnp.where(coupling != 0, coupling, 1)
        before = jnp.where(coupling != 0, tangent + d_coupling * vector, 0)
        return (before, -coupling * du, coupling * vector, x), row

    none = jnp.zeros_like(result.residual)
    carry = cotangent.residual, none, result.residual, none
    (*_, right), rows = jax.lax.scan(step, carry, inputs, reverse=True)
    return rows, adjoint.start_cotangent(right, basis[0], result.start_norm, cotangent.start_norm)
