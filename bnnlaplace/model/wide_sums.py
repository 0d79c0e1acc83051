"""Networks in 16 bits whose derivatives in the weights are summed in float32.

A bias is broadcast to all examples and positions, and the transpose of that is a sum. JAX makes it in the type of the
bias. On CPU a long sum in bfloat16 is then far too small, because the total soon is so large that a summand no longer
changes it. The derivative in an embedding is such a sum, too. Products and convolutions are summed in float32 by XLA.
"""

from collections.abc import Callable
from functools import lru_cache
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import PyTree

# Equations that copy entries of an operand, so that their transpose adds. The others do so if operands differ in shape.
_COPYING = ("broadcast_in_dim", "gather")
_ENTRYWISE = ("add", "add_any", "atan2", "div", "max", "min", "mul", "pow", "rem", "sub")
# Calls and loops. Functions with a derivative rule of their own, and kernels, stay as they are.
_CALLING = ("checkpoint", "closed_call", "cond", "core_call", "jit", "pjit", "remat2", "scan", "while")


def with_wide_sums(function: Callable[..., Any], *arguments: PyTree) -> Any:
    """Call a hashable function with the sums of its transpose in float32. The result is the same but for rounding."""
    leaves, structure = jax.tree.flatten(arguments)
    kinds = tuple((getattr(leaf, "dtype", type(leaf)), jnp.ndim(leaf)) for leaf in leaves)
    findings = _remembered(function, structure, kinds)
    if findings == [False]:  # without numbers of 16 bits there is nothing to do, and no need to trace twice
        return function(*arguments)
    closed, shapes = jax.make_jaxpr(function, return_shape=True)(*arguments)
    if not findings:
        findings.append(_has_short(closed.jaxpr))
    if findings == [False]:
        return function(*arguments)
    widened = ClosedJaxpr(_widened(closed.jaxpr), closed.consts)
    return jax.tree.unflatten(jax.tree.structure(shapes), jaxpr_as_fun(widened)(*leaves))


@lru_cache(maxsize=256)
def _remembered(function: Callable[..., Any], structure: Any, kinds: tuple[Any, ...]) -> list[bool]:
    """Return whether the function computes in 16 bits, as far as that is known. It does not depend on lengths."""
    return []


def _has_short(jaxpr: Jaxpr) -> bool:
    inside = (_has_short(function) for equation in jaxpr.eqns for function in functions_of(equation))
    return any(_is_short(variable.aval) for equation in jaxpr.eqns for variable in equation.outvars) or any(inside)


def functions_of(equation: JaxprEqn) -> list[Jaxpr]:
    """The functions that an equation calls, such as the body of a loop."""
    values = [each if isinstance(each, (tuple, list)) else [each] for each in equation.params.values()]
    return [getattr(each, "jaxpr", each) for each in chain(*values) if isinstance(each, (Jaxpr, ClosedJaxpr))]


def _widened(jaxpr: Jaxpr) -> Jaxpr:
    equations: list[JaxprEqn] = []
    for equation in jaxpr.eqns:
        equations += _through_float32(equation) if _copies_short(equation) else [_with_widened_functions(equation)]
    return jaxpr.replace(eqns=equations)


def _copies_short(equation: JaxprEqn) -> bool:
    name, result = equation.primitive.name, equation.outvars[0].aval if equation.outvars else None
    if name not in (*_COPYING, *_ENTRYWISE) or not _is_short(result):
        return False
    shapes = {atom.aval.shape for atom in equation.invars if not isinstance(atom, Literal)}
    return name in _COPYING or not shapes <= {result.shape}


def _through_float32(equation: JaxprEqn) -> list[JaxprEqn]:
    """Compute an equation in float32, and round its result. XLA does the same."""

    def wide(*operands: Any) -> Any:
        operands = [each.astype(jnp.float32) if _is_short(each) else each for each in operands]
        return equation.primitive.bind(*operands, **equation.params).astype(equation.outvars[0].aval.dtype)

    inner = jax.make_jaxpr(wide)(*(jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in equation.invars))
    renamed = dict(zip(inner.jaxpr.invars, equation.invars, strict=True))
    renamed.update(zip(inner.jaxpr.outvars, equation.outvars, strict=True))

    def read(atom: Var | Literal) -> Var | Literal:
        return atom if isinstance(atom, Literal) else renamed.setdefault(atom, Var(atom.aval))

    return [
        step.replace(invars=[read(atom) for atom in step.invars], outvars=[read(atom) for atom in step.outvars])
        for step in inner.jaxpr.eqns
    ]


def _with_widened_functions(equation: JaxprEqn) -> JaxprEqn:
    """The same for the functions that an equation calls, if that is all it does."""
    if equation.primitive.name not in _CALLING:
        return equation

    def widened(value: Any) -> Any:
        if isinstance(value, ClosedJaxpr):
            return ClosedJaxpr(_widened(value.jaxpr), value.consts)
        if isinstance(value, Jaxpr):
            return _widened(value)
        return tuple(map(widened, value)) if type(value) is tuple else value

    return equation.replace(params={name: widened(value) for name, value in equation.params.items()})


def _is_short(array: Any) -> bool:
    return hasattr(array, "dtype") and jnp.issubdtype(array.dtype, jnp.floating) and jnp.finfo(array.dtype).bits < 32
