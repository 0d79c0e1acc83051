"""The function f of f(A), checked, as one that closes over no traced array."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from bnnlaplace.core.tree import floating
from bnnlaplace.krylov.checks import check_callable

# (argument, constants) -> f(argument), where the constants are what a user's function closes over.
Converted = Callable[[Array, Any], Array]


def scalar_function(caller: str, function: Callable, dtype: Any) -> tuple[Converted, Any]:
    """f from a scalar to a scalar, and the traced arrays that it closes over.

    Raises
    ------
    TypeError
        If it is no function, cannot be traced, or returns anything but one number of the dtype of its argument.
    """
    check_callable(caller, "function", function, "jnp.log")
    _check_image(caller, function, jax.ShapeDtypeStruct((), dtype), "a scalar", "jnp.log")
    converted, constants = convert(function, jnp.zeros((), dtype))
    return lambda x, constants: converted(x, *constants), tuple(constants)


def matrix_function(caller: str, function: Callable, sizes: Sequence[int], dtype: Any) -> tuple[Converted, Any]:
    """f on dense square matrices of some sizes, and the traced arrays that it closes over; errors as above."""
    check_callable(caller, "function", function, "jax.scipy.linalg.expm")
    by_size = {}
    for size in sorted(set(sizes)):
        like = jax.ShapeDtypeStruct((size, size), dtype)
        _check_image(caller, function, like, f"a {size} x {size} matrix", "jax.scipy.linalg.expm")
        by_size[size] = convert(function, jnp.zeros(like.shape, dtype))

    def apply(matrix: Float[Array, "k k"], constants: Any) -> Float[Array, "k k"]:
        return by_size[len(matrix)][0](matrix, *constants[len(matrix)])

    return apply, {size: constants for size, (_, constants) in by_size.items()}


def constants_cotangent(evaluate: Callable[[Any], Array], constants: Any, cotangent: Array) -> Any:
    """The gradient of `evaluate` in what f closes over; None for what cannot be differentiated."""
    active = floating(constants)
    if not active.leaves:
        return active.cotangent([])
    _, pull = jax.vjp(lambda leaves: evaluate(active.fill(leaves)), active.leaves)
    return active.cotangent(pull(cotangent)[0])


def _check_image(caller: str, function: Callable, like: jax.ShapeDtypeStruct, what: str, example: str) -> None:
    try:
        image = jax.eval_shape(lambda x: function(x), like)  # jit itself does not survive a NumPy ufunc
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(
            f"{caller}(function=...) must be made of functions that JAX can trace; got one that asks for a number or a "
            f"NumPy array; use jax.numpy, such as {example}"
        ) from error
    if not hasattr(image, "shape") or (image.shape, image.dtype) != (like.shape, like.dtype):
        got = f"{image.dtype}{image.shape}" if hasattr(image, "shape") else type(image).__name__
        raise TypeError(
            f"{caller}(function=...) must take {what} to one of the same dtype, {like.dtype}{like.shape}; got {got}; "
            f"such as {example}"
        )


# Functions that close over traced arrays, as functions that close over none.
#
# A custom derivative must be given everything traced as an argument. `jax.closure_convert` hands out what can be
# differentiated and leaves integers, masks and random keys inside, where the index of a `scan` or `vmap` then leaks.
def convert(function: Callable[..., Any], *example: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Return `converted` and `constants` with converted(*args, *constants) = function(*args).

    `args` are like `example`, of which shapes and dtypes are used alone; `constants` are the traced arrays that
    `function` closes over, whatever their dtype.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*example)
    structure = jax.tree.structure(shape)
    is_traced = [isinstance(constant, jax.core.Tracer) for constant in closed.consts]
    fixed = [None if traced else constant for constant, traced in zip(closed.consts, is_traced, strict=True)]

    def converted(*args: Any) -> Any:
        args, constants = args[: len(example)], iter(args[len(example) :])
        filled = [next(constants) if traced else c for c, traced in zip(fixed, is_traced, strict=True)]
        leaves = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, filled))(*jax.tree.leaves(args))
        return jax.tree.unflatten(structure, leaves)

    return converted, [constant for constant, traced in zip(closed.consts, is_traced, strict=True) if traced]
