"""Functions that close over traced arrays, as functions that close over none.

A custom derivative must be given everything traced as an argument. `jax.closure_convert` hands out what can be
differentiated and leaves integers, masks and random keys inside, where the index of a `scan` or of a `vmap` then leaks.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun


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
