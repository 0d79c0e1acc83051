"""Lanczos tridiagonalisation of a symmetric operator, and its adjoint.

Forward: A Q = Q T + r e_K' with T tridiagonal, a_1..a_K on its diagonal and b_1..b_{K-1} beside it, by

    b_k q_{k+1} = A q_k - a_k q_k - b_{k-1} q_{k-1}.                                                           (L)

Full reorthogonalisation adds a pass of Gram-Schmidt over the vectors found so far to (L), which serves as the first.
All other products of A q_k with the basis are rounding of the size of eps |A|, and the added pass removes it. If that
pass removes more than it keeps, `gram_schmidt.orthogonalise` makes another one. If the product is symmetric to
rounding, this happens only next to a breakdown. `breakdown.py` decides when the recurrence ends.

Adjoint: the equations of `adjoint.py`. For a symmetric A, A' = A, and the sum in (Qk) has only the terms j = k and
j = k + 1. Without reorthogonalisation the recurrence does not impose Q' Q = I, so the adjoint is that of (L) itself. It
is the derivative of what was computed as long as the loss of orthogonality is small. Once a Ritz value has been found
twice, single basis vectors depend on rounding, and so do their gradients. Traces and f(A) v keep their digits, in
values and in gradients.
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
from bnnlaplace.krylov.tridiagonal import tridiagonal_matrix


class Lanczos(NamedTuple):
    """A decomposition A Q = Q T + r e_K' of a symmetric operator.

    Attributes
    ----------
    basis
        q_1..q_K along the leading axis of each leaf, otherwise like the start vector. Zero after a breakdown.
    diagonal, off_diagonal
        The entries of T. Zero after a breakdown.
    residual
        r, like the start vector, orthogonal to the basis. Zero after a breakdown.
    start_norm
        |v|.
    breakdown_step
        The number m of basis vectors that span an invariant subspace, after which nothing follows. It is 0 for a zero
        start vector and -1 if there was no breakdown.
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
        v, *params -> A v, linear in v, with a symmetric A (`check_symmetric` tests whether it is). It may close over
        traced arrays, which are differentiated as well.
    start
        The start vector v: an array or a pytree of arrays of one real floating-point dtype, with n numbers together.
        It must not be zero.
    params
        Further arguments of `matvec`, any pytrees. Floating-point leaves are differentiable.
    num_matvecs
        The number of steps K, between 1 and n.
    reorthogonalise
        "full" keeps the basis orthogonal to rounding. "none" is the three-term recurrence alone: it loses orthogonality
        as Ritz values converge, and then finds them again.
    gradient
        "adjoint" works in reverse mode only, with K further products and a vector-Jacobian product of K terms.
        "autodiff" differentiates the loop, in any mode, with memory of order K^2 n.
    vjp_batch_size
        How many of those K terms are computed at once. One at a time takes the least memory. More are faster if
        products gain from batching.
    breakdown_tolerance
        A residual |r| of at most this times max_k |A q_k| counts as rounding in an invariant space, and ends the
        recurrence. The default is 10 eps.

    Returns
    -------
    Lanczos
        A breakdown ends the recurrence: everything after it is zero, and gradients are those of what came before it.

        The recurrence can magnify rounding until the residual of an invariant space exceeds the tolerance
        (`krylov/breakdown.py` gives numbers). It then continues in the rest of the space. z' f(A) z and f(A) z keep
        their digits, but T has further Ritz values, for vectors along which z has no component; some are copies of
        others. Raise `breakdown_tolerance` if that is worse for you than to lose what a small coupling carries.

    Raises
    ------
    ValueError
        If an option is out of range or unknown, or if `start` is zero or not finite. Inside of `jit`, where its values
        are not known, a zero `start` gives `breakdown_step` 0, and one that is not finite gives NaN.
    TypeError
        If the leaves of `start` do not have one real floating-point dtype, if `matvec` is not a function or returns
        another structure, shape or dtype than it takes, if a numerical option has the wrong type or is traced, or if a
        forward-mode derivative of the adjoint is asked for.

    Notes
    -----
    Cost: K products. "full" adds about 2 K^2 n multiplications, and about 4 K^2 n in the adjoint.

    Peak memory: K n numbers, or 3.3 K n with the adjoint; K n more in both cases if the basis exceeds 8 MB. Derivatives
    of "autodiff" take 1.5 K^2 n numbers.

    Everything is computed in the dtype of `start`. Call it inside of `jit`: outside, each call compiles its loop again.

    Second derivatives are those of the adjoint, differentiated again. After a breakdown they would need directions that
    the recurrence has not seen, and are NaN: lower `num_matvecs` to `breakdown_step`.

    If A is passed as a matrix, the gradient in an entry differs from that in its mirror image, as it does through the
    loop. Only their sum has a meaning.

    Source: Krämer et al. 2024, arXiv 2405.17277, section 4; the derivation is in `krylov/adjoint.py`.

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
    """Lanczos on a flat operator, as a loop that JAX differentiates like any other."""
    num = settings.num_matvecs
    first, start_norm = breakdown.first_vector(start)
    blocks = gram_schmidt.split(jnp.zeros_like(start, shape=(num, start.size)))

    def step(carry, k):
        blocks, previous, vector, coupling, scale, _ = carry
        blocks = gram_schmidt.set_row(blocks, k, vector)
        image = matvec(vector, *arguments)
        # The largest |A q_k| so far stands for |A|: rounding of the early, large products stays in all later vectors.
        scale = jnp.maximum(scale, safe_norm(image))
        diagonal = matmul(vector, image)
        residual = image - diagonal * vector - coupling * previous
        if settings.reorthogonalise:
            residual, length = gram_schmidt.orthogonalise(blocks, k, residual)
        else:
            length = safe_norm(residual)
        following, coupling, residual = breakdown.normalise(residual, length, scale, settings.breakdown_tolerance)
        return (blocks, vector, following, coupling, scale, residual), (diagonal, coupling)

    none, zero = jnp.zeros_like(start), jnp.zeros_like(start_norm)
    carry = blocks, none, first, zero, zero, none
    (blocks, *_, residual), (diagonal, couplings) = jax.lax.scan(step, carry, jnp.arange(num))
    breakdown_step = breakdown.step(start_norm, couplings)
    return Lanczos(gram_schmidt.join(blocks), diagonal, couplings[:-1], residual, start_norm, breakdown_step)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def lanczos_adjoint(matvec: Callable, settings: Settings, start: Array, arguments: tuple[Any, ...]) -> Lanczos:
    """Lanczos on a flat operator that closes over no traced array, differentiated by its adjoint."""
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
    # Outputs after a breakdown are constants: their cotangents are ignored.
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
    """Solve (r), (H) and (Q) of `adjoint.py` backwards; return L as rows and the cotangent of the start vector."""
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
        # A coupling of zero is a breakdown. The recurrence starts anew there from (r) with r = 0, by the projection.
        before = jnp.where(coupling != 0, right / jnp.where(coupling != 0, coupling, 1), 0)
        if settings.project:
            before, _ = gram_schmidt.impose(blocks, k, before, wanted)
        return (before, row, right), row

    # Arrays of K n numbers are indexed inside the loop. As inputs of `scan` they would be copied.
    # The last step, at q_1, has no multiplier before it. It is there for its right-hand side.
    off_diagonal = jnp.append(result.off_diagonal, 0)
    inputs = jnp.arange(num), result.diagonal, off_diagonal, couplings, jnp.roll(d_matrix, 1, axis=1).T
    zero = jnp.zeros_like(last)
    (*_, right), rows = jax.lax.scan(step, (last, zero, zero), inputs, reverse=True)
    return rows, adjoint.start_cotangent(right, result.basis[0], result.start_norm, cotangent.start_norm)


def _local_multipliers(
    matvec: Callable, result: Lanczos, cotangent: Lanczos, settings: Settings
) -> tuple[Float[Array, "K n"], Float[Array, " n"]]:
    """Solve the adjoint of (L) alone, with a_k = q_k' A q_k and b_k = |A q_k - a_k q_k - b_{k-1} q_{k-1}|.

    Step k receives the cotangents x of q_{k+1}, y of q_k and db of b_k, collected from their later uses in the
    recurrence. With u = b_k q_{k+1} it finds

        du = (I - q_{k+1} q_{k+1}') x / b_k + db q_{k+1},
        l_k = du + (da_k - q_k' du) q_k,                       the cotangent of A q_k
        dq_k <- y + A l_k - a_k du + (da_k - q_k' du) A q_k,   dq_{k-1} <- -b_{k-1} du,   db_{k-1} <- -q_{k-1}' du.
    """
    basis = result.basis
    zero = jnp.zeros_like(result.start_norm)[None]
    couplings = jnp.concatenate([zero, result.off_diagonal])
    # Arrays of K n numbers are indexed inside the loop. As inputs of `scan` they would be copied.
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
        # `following` is u, which is not normalised, so that the last residual can stand for it as well.
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
