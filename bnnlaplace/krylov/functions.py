"""Functions of the user, made to close over no traced array.

What a custom derivative differentiates must be its argument, and may not be closed over. `jax.closure_convert` hands
out only what can be differentiated. It leaves integers, masks and random keys inside, and the index of a `scan` or
`vmap` then leaks. `convert` hands out every traced array. `scalar_function` and `matrix_function` do so for the f of
f(A), which they check.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jaxtyping import Array, Float

from bnnlaplace.core.tree import floating
from bnnlaplace.krylov.checks import check_callable, first_line

# (x, constants) -> f(x), where the constants are the traced arrays that the user's f closes over.
Converted = Callable[[Array, Any], Array]


def convert(function: Callable[..., Any], *example: Any) -> tuple[Callable[..., Any], list[Any]]:
    """Return `converted` and `constants` such that converted(*args, *constants) = function(*args).

    Only shapes and dtypes of `example` are used; `args` must have the same. `constants` are the traced arrays that
    `function` closes over, of any dtype.
    """
    closed, shape = jax.make_jaxpr(function, return_shape=True)(*example)
    structure = jax.tree.structure(shape)
    is_traced = [isinstance(constant, jax.core.Tracer) for constant in closed.consts]
    known = [None if traced else constant for constant, traced in zip(closed.consts, is_traced, strict=True)]

    def converted(*args: Any) -> Any:
        args, constants = args[: len(example)], iter(args[len(example) :])
        filled = [next(constants) if traced else value for value, traced in zip(known, is_traced, strict=True)]
        leaves = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, filled))(*jax.tree.leaves(args))
        return jax.tree.unflatten(structure, leaves)

    return converted, [constant for constant, traced in zip(closed.consts, is_traced, strict=True) if traced]


def scalar_function(caller: str, function: Callable, dtype: Any) -> tuple[Converted, Any]:
    """Return f from a scalar to a scalar as a converted function, and its constants.

    Raises
    ------
    TypeError
        If `function` is not a function, cannot be traced, or does not return one number of the dtype of its argument.
    """
    check_callable(caller, "function", function, "jnp.log")
    _check_image(caller, function, jax.ShapeDtypeStruct((), dtype), "a scalar", "jnp.log")
    converted, constants = convert(function, jnp.zeros((), dtype))
    return lambda x, constants: converted(x, *constants), tuple(constants)


def matrix_function(caller: str, function: Callable, sizes: Sequence[int], dtype: Any) -> tuple[Converted, Any]:
    """Return f on square matrices of the given sizes as a converted function, and its constants.

    Raises
    ------
    TypeError
        If `function` is not a function, cannot be traced, or does not return a matrix like its argument.
    """
    check_callable(caller, "function", function, "jax.scipy.linalg.expm")
    # A traced function serves one shape, so f is traced once for each size.
    by_size = {}
    for size in sorted(set(sizes)):
        like = jax.ShapeDtypeStruct((size, size), dtype)
        _check_image(caller, function, like, f"a {size} x {size} matrix", "jax.scipy.linalg.expm")
        by_size[size] = convert(function, jnp.zeros(like.shape, dtype))

    def apply(matrix: Float[Array, "k k"], constants: Any) -> Float[Array, "k k"]:
        return by_size[len(matrix)][0](matrix, *constants[len(matrix)])

    return apply, {size: constants for size, (_, constants) in by_size.items()}


def constants_cotangent(evaluate: Callable[[Any], Array], constants: Any, cotangent: Array) -> Any:
    """Pull `cotangent` back through `evaluate` to the constants of f; None for those that are not floating point."""
    active = floating(constants)
    if not active.leaves:
        return active.cotangent([])
    _, pull = jax.vjp(lambda leaves: evaluate(active.fill(leaves)), active.leaves)
    return active.cotangent(pull(cotangent)[0])


def _check_image(caller: str, function: Callable, like: jax.ShapeDtypeStruct, what: str, example: str) -> None:
    """Raise TypeError unless `function` maps an array like `like` to another one."""
    try:
        # Wrapped in a lambda, since `eval_shape` itself fails on a NumPy ufunc before it calls it.
        image = jax.eval_shape(lambda x: function(x), like)
    except (jax.errors.TracerArrayConversionError, jax.errors.ConcretizationTypeError) as error:
        raise TypeError(
            f"{caller}(function=...) must be made of functions that JAX can trace; got one that asks for a number or a "
            f"NumPy array; use jax.numpy, such as {example}"
        ) from error
    except Exception as error:  # whatever a user's function raises
        raise TypeError(
            f"{caller}(function=...) must take {what}; got {first_line(error)}; try a function such as {example}"
        ) from error
    if not hasattr(image, "shape") or (image.shape, image.dtype) != (like.shape, like.dtype):
        got = f"{image.dtype}{image.shape}" if hasattr(image, "shape") else type(image).__name__
        raise TypeError(
            f"{caller}(function=...) must take {what} to one of the same dtype, {like.dtype}{like.shape}; got {got}; "
            f"try a function such as {example}"
        )
