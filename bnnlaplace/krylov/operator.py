"""A user's linear operator on pytrees as one on flat vectors, with the options of a decomposition, checked."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import concatenated, floating, unraveler
from bnnlaplace.krylov import breakdown
from bnnlaplace.krylov.checks import check_choice, check_count, check_number, check_product, check_vector
from bnnlaplace.krylov.derivative_modes import reverse_only
from bnnlaplace.krylov.functions import convert


class FlatOperator(NamedTuple):
    """v, *params -> A v on flat vectors, with everything that can be differentiated among its arguments.

    Attributes
    ----------
    matvec
        (vector, *arguments) -> A v; it closes over no traced array.
    start
        The start vector.
    arguments
        The user's `params`, and after them the traced arrays that the user's function closes over.
    unravel
        From a flat vector to the user's structure.
    """

    matvec: Callable[..., Float[Array, " n"]]
    start: Float[Array, " n"]
    arguments: tuple[Any, ...]
    unravel: Callable[[Float[Array, " n"]], PyTree]

    def unravel_rows(self, rows: Float[Array, "K n"]) -> PyTree:
        """Each row in the user's structure."""
        return jax.vmap(self.unravel)(rows)


def flatten(
    caller: str, argument: str, matvec: Callable[..., PyTree], start: PyTree, params: Sequence[Any]
) -> FlatOperator:
    """Check `matvec` and `start` and concatenated them; errors name `caller`, and `argument` for the start vector.

    Raises
    ------
    TypeError
        If a leaf of `start` is not real floating point or leaves differ in dtype, or `matvec` is no function or returns
        another structure, shape or dtype than it takes.
    ValueError
        If `start` is empty, or, where its values are known outside of `jit`, zero or not finite.
    """
    vector = check_vector(caller, argument, start)
    start = jax.tree.map(jnp.asarray, start)
    unravel = unraveler(start)
    check_product(caller, matvec, start, params)

    def flat(vector: Array, *params: Any) -> Array:
        return concatenated(matvec(unravel(vector), *params))

    vector, params = _vary_alike((vector, tuple(params)))
    closed, constants = convert(flat, vector, *params)
    return FlatOperator(closed, vector, (*params, *constants), unravel)


def _vary_alike(tree: Any) -> Any:
    """Let what can be differentiated vary over the devices over which any of it does.

    Within `shard_map` an array is known to vary or to be the same on all devices, and a loop whose state starts as the
    one and ends as the other is refused. Adding a zero that varies says it, and costs nothing elsewhere.
    """
    active = floating(tree)
    if not active.leaves:
        return tree
    zeros = [jnp.zeros_like(leaf, shape=()) for leaf in active.leaves]
    tied = [
        leaf + sum(zero.astype(own.dtype) for zero in zeros) for leaf, own in zip(active.leaves, zeros, strict=True)
    ]
    return active.fill(tied)


class Settings(NamedTuple):
    """The static part of a decomposition. `project` is only switched off to show what that part of an adjoint is for.

    Attributes
    ----------
    breakdown_tolerance
        In units of the size of A.
    """

    num_matvecs: int
    breakdown_tolerance: float
    reorthogonalise: bool = True
    vjp_batch_size: int = 1
    project: bool = True


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
    """Check what a user asks of a decomposition, and put it into its flat form; errors as for `flatten`."""
    check_choice(caller, "reorthogonalise", reorthogonalise, ("full", "none"))
    vjp_batch_size = check_count(caller, "vjp_batch_size", vjp_batch_size)
    operator = flatten(caller, argument, matvec, start, params)
    num_matvecs = check_count(caller, "num_matvecs", num_matvecs, operator.start.size, "the dimension")
    if breakdown_tolerance is None:
        tolerance = default_tolerance(operator.start.dtype)
    else:
        tolerance = check_number(caller, "breakdown_tolerance", breakdown_tolerance, positive=False)
    return operator, Settings(num_matvecs, tolerance, reorthogonalise == "full", vjp_batch_size)


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
    """The decomposition that a user asks for, as a loop or with its adjoint, in the user's structure."""
    check_choice(caller, "gradient", gradient, ("adjoint", "autodiff"))
    operator, settings = prepare(caller, "start", matvec, start, params, **options)
    run = partial(forward, operator.matvec, settings)
    if gradient == "adjoint":
        run = reverse_only(partial(adjoint, operator.matvec, settings), f"{caller}(gradient='adjoint')")
    result = run(operator.start, operator.arguments)
    return result._replace(basis=operator.unravel_rows(result.basis), residual=operator.unravel(result.residual))


def default_tolerance(dtype: Any) -> float:
    """Below this times the size of A a residual is rounding."""
    return breakdown.ROUNDING * float(jnp.finfo(dtype).eps)
