"""The user's operator on pytrees as one on flat vectors, and the options of a decomposition, both checked.

Everything that can be differentiated becomes an argument of the flat operator, and everything static goes into
`Settings`. `lanczos` and `arnoldi` share `decompose`; the functions of a matrix start from `prepare`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import concatenated, floating, unraveler
from bnnlaplace.krylov import breakdown, finite
from bnnlaplace.krylov.checks import check_count, check_number, check_product, check_vector
from bnnlaplace.krylov.derivative_modes import reverse_only
from bnnlaplace.krylov.functions import convert


class FlatOperator(NamedTuple):
    """The products v, *params -> A v on flat vectors, with everything that can be differentiated as an argument.

    Attributes
    ----------
    matvec
        (vector, *arguments) -> A v; it closes over no traced array.
    start
        The start vector.
    arguments
        The user's `params`, and after them the traced arrays that the user's function closes over.
    unravel
        The map from a flat vector to the user's structure.
    """

    matvec: Callable[..., Float[Array, " n"]]
    start: Float[Array, " n"]
    arguments: tuple[Any, ...]
    unravel: Callable[[Float[Array, " n"]], PyTree]

    def unravel_rows(self, rows: Float[Array, "K n"]) -> PyTree:
        """Put each row into the user's structure, with the rows along the leading axis of each leaf."""
        return jax.vmap(self.unravel)(rows)


class Settings(NamedTuple):
    """The static options of a decomposition.

    Attributes
    ----------
    num_matvecs
        K, the number of products with A.
    breakdown_tolerance
        The residual that counts as rounding, in units of the size of A.
    reorthogonalise
        Whether each vector is orthogonalised against all before it.
    vjp_batch_size
        How many terms of the gradient in the operator are computed at once.
    project
        Whether the adjoint projects its multipliers (see `adjoint.py`). It is switched off only to show what the
        projection is for.
    """

    num_matvecs: int
    breakdown_tolerance: float
    reorthogonalise: bool = True
    vjp_batch_size: int = 1
    project: bool = True


def decompose(
    caller: str,
    forward: Callable[..., Any],
    adjoint: Callable[..., Any],
    gradient: str,
    matvec: Callable[..., PyTree],
    start: PyTree,
    params: Sequence[Any],
    **options: Any,
) -> Any:
    """Run a decomposition as a loop or with its adjoint, and return it in the user's structure."""
    checks.choice(gradient, f"{caller}(gradient=...)", ("adjoint", "autodiff"))
    operator, settings = prepare(caller, "start", matvec, start, params, **options)
    # JAX differentiates the loop in any mode, the adjoint in reverse mode only.
    run = partial(forward, operator.matvec, settings)
    if gradient == "adjoint":
        run = reverse_only(partial(adjoint, operator.matvec, settings), f"{caller}(gradient='adjoint')")
    result = run(operator.start, operator.arguments)
    cause = partial(finite.cause_of_products, operator.start.dtype)
    finite.warn_unless_finite(caller, "a decomposition", (result.start_norm, result[1:4]), cause)
    return result._replace(basis=operator.unravel_rows(result.basis), residual=operator.unravel(result.residual))


def prepare(
    caller: str,
    argument: str,
    matvec: Callable[..., PyTree],
    start: PyTree,
    params: Sequence[Any],
    *,
    num_matvecs: int,
    reorthogonalise: str = "full",
    vjp_batch_size: int = 1,
    breakdown_tolerance: float | None = None,
) -> tuple[FlatOperator, Settings]:
    """Check an operator and the options of its decomposition; errors are those of `flatten` and of each option."""
    checks.choice(reorthogonalise, f"{caller}(reorthogonalise=...)", ("full", "none"))
    vjp_batch_size = check_count(caller, "vjp_batch_size", vjp_batch_size)
    operator = flatten(caller, argument, matvec, start, params)
    # Only now is the dimension known, which bounds the number of steps.
    num_matvecs = check_count(caller, "num_matvecs", num_matvecs, operator.start.size, "the dimension")
    if breakdown_tolerance is None:
        tolerance = default_tolerance(operator.start.dtype)
    else:
        tolerance = check_number(caller, "breakdown_tolerance", breakdown_tolerance, positive=False)
    return operator, Settings(num_matvecs, tolerance, reorthogonalise == "full", vjp_batch_size)


def flatten(
    caller: str, argument: str, matvec: Callable[..., PyTree], start: PyTree, params: Sequence[Any]
) -> FlatOperator:
    """Check `matvec` and `start` and make them flat; errors name `caller`, and `argument` for the start vector.

    Raises
    ------
    TypeError
        If the leaves of `start` do not have one real floating-point dtype, if `matvec` is not a function, or if it
        returns another structure, shape or dtype than it takes.
    ValueError
        If `start` is empty, or is known to be zero or not finite.
    """
    vector = check_vector(caller, argument, start)
    start = jax.tree.map(jnp.asarray, start)
    unravel = unraveler(start)
    check_product(caller, matvec, start, params)

    def flat(vector: Array, *params: Any) -> Array:
        return concatenated(matvec(unravel(vector), *params))

    # The traced arrays that `matvec` closes over become arguments, so that a custom derivative reaches them.
    vector, params = _vary_alike((vector, tuple(params)))
    closed, constants = convert(flat, vector, *params)
    return FlatOperator(closed, vector, (*params, *constants), unravel)


def default_tolerance(dtype: Any) -> float:
    """The residual that counts as rounding in `dtype`, in units of the size of A."""
    return breakdown.ROUNDING * float(jnp.finfo(dtype).eps)


def _vary_alike(tree: Any) -> Any:
    """Let all leaves that can be differentiated vary over the same devices.

    Within `shard_map` JAX knows of each array whether it varies over the devices or is the same on all. It refuses a
    loop whose state starts as the one and ends as the other. Adding a zero that varies makes an array a varying one,
    and costs nothing outside of `shard_map`.
    """
    active = floating(tree)
    if not active.leaves:
        return tree
    zeros = [jnp.zeros_like(leaf, shape=()) for leaf in active.leaves]
    tied = [
        leaf + sum(zero.astype(own.dtype) for zero in zeros) for leaf, own in zip(active.leaves, zeros, strict=True)
    ]
    return active.fill(tied)
