"""Which outputs of a network depend on some of its weights, entry by entry, read from the equations.

Two heads whose outputs are concatenated depend on different weights, although they end in one array. So a dependence is
followed for single entries through equations that move or map entries, such as a concatenation or an addition, and
through products with constants, whose zeros cut it. After any other equation, such as a product of two arrays or a
loop, all entries count as dependent if one operand has one that is. So an output may count as reached that is not, but
never the other way round.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var
from jaxtyping import Bool

from bnnlaplace.model.jaxpr import INLINED_CALLS, trace
from bnnlaplace.model.spec import NetworkSpec

# For each entry of an array whether it depends on the weights: an array, or one bool if all entries are alike.
Mask = bool | Bool[np.ndarray, "..."]

# Equations that map entries one by one. Operands have one shape, or are numbers.
_ENTRYWISE = """
    abs acos acosh add add_any asin asinh atan atan2 atanh cbrt clamp conj convert_element_type copy copy_p cos cosh
    digamma div erf erf_inv erfc exp exp2 expm1 imag integer_pow lgamma log log1p logistic max min mul name neg pow real
    reduce_precision rem rsqrt select_n sharding_constraint sin sinh sqrt square sub tan tanh
"""
# Equations that move or choose entries. They are executed on the masks themselves.
_MOVING = """
    broadcast_in_dim concatenate dynamic_slice dynamic_update_slice expand_dims gather pad reshape rev scatter
    scatter-add scatter_add select_n slice split squeeze stack tile transpose unstack
"""
# Products, in which a constant with zeros cuts the dependence.
_PRODUCTS = frozenset({"mul", "dot_general"})
# Where the function that an equation calls stands among its parameters. Its operands are those of the function.
_CALLS = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", **dict.fromkeys(INLINED_CALLS, "jaxpr")}
_ENTRYWISE, _MOVING = frozenset(_ENTRYWISE.split()), frozenset(_MOVING.split())
# Constants of up to this many numbers are computed with, to know where a scatter or a gather moves entries.
_MOST_NUMBERS = 10_000


_traced = lru_cache(maxsize=8)(lambda spec: trace(spec.network(), spec.example.batch(1)))


@lru_cache(maxsize=1024)
def reached_outputs(spec: NetworkSpec, weights: frozenset[int] | None = None) -> Bool[np.ndarray, "..."]:
    """Which outputs of one example, (..., C), depend on the weights with the numbers `weights`; None stands for all.

    Weights have the numbers of their leaves in `params`. Nothing is computed with numbers of the network.
    """
    jaxpr = _traced(spec)
    masks: dict[Var, Mask] = {v: weights is None or leaf in weights for leaf, v in enumerate(jaxpr.params)}
    known = {variable: value for variable, value in jaxpr.constants.items() if np.size(value) <= _MOST_NUMBERS}
    _follow(jaxpr.equations, masks, known)
    (output,) = jaxpr.outputs
    return np.broadcast_to(_mask(output, masks), output.aval.shape)[0].copy()


def _follow(equations: Sequence[JaxprEqn], masks: dict[Var, Mask], known: dict[Var, Any]) -> None:
    """Add the masks of the results of some equations to `masks`, and those results that are constants to `known`."""
    for equation in equations:
        operands = [_mask(atom, masks) for atom in equation.invars]
        if not any(np.any(operand) for operand in operands):
            _compute(equation, known)
            continue
        results = _results(equation, operands, known)
        for variable, mask in zip(equation.outvars, results, strict=True):
            # No derivative passes through integers and bools.
            is_smooth = jnp.issubdtype(variable.aval.dtype, jnp.inexact)
            masks[variable] = _compressed(mask) if is_smooth else False


def _results(equation: JaxprEqn, operands: list[Mask], known: dict[Var, Any]) -> list[Mask]:
    """The masks of the results of one equation."""
    name = equation.primitive.name
    shapes = [tuple(variable.aval.shape) for variable in equation.outvars]
    if name == "stop_gradient":
        return [False] * len(shapes)
    if name in _PRODUCTS and sum(np.any(operand) for operand in operands) == 1:
        cut = _cut_by_zeros(equation, operands, known)
        if cut is not None:
            return cut
    if all(operand is True for operand in operands if operand is not False) and name not in _MOVING:
        return [True] * len(shapes)
    if name == "optimization_barrier":
        return operands
    if name in _MOVING:
        moved = _moved(equation, operands, known)
        if moved is not None:
            return moved
    if name in _ENTRYWISE:
        return [np.any([np.broadcast_to(operand, shapes[0]) for operand in operands], axis=0)]
    if name in _CALLS and _CALLS[name] in equation.params:
        results = _of_call(equation.params[_CALLS[name]], operands)
        if len(results) == len(shapes):
            return results
    return [True] * len(shapes)


def _of_call(function: Jaxpr | ClosedJaxpr, operands: list[Mask]) -> list[Mask]:
    """The masks of the results of a function with a derivative rule of its own; none if it takes other operands."""
    closed = function if isinstance(function, ClosedJaxpr) else ClosedJaxpr(function, ())
    if len(closed.jaxpr.invars) != len(operands):
        return []
    masks = dict(zip(closed.jaxpr.invars, operands, strict=True))
    _follow(closed.jaxpr.eqns, masks, dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)))
    return [_mask(atom, masks) for atom in closed.jaxpr.outvars]


def _cut_by_zeros(equation: JaxprEqn, operands: list[Mask], known: dict[Var, Any]) -> list[Mask] | None:
    """The mask of a product of dependent entries with a constant that has zeros. None if there is no such constant."""
    factors = []
    for atom, operand in zip(equation.invars, operands, strict=True):
        if np.any(operand):
            factors.append(np.broadcast_to(operand, atom.aval.shape))
            continue
        if not (isinstance(atom, Literal) or atom in known):
            return None
        constant = np.asarray(atom.val if isinstance(atom, Literal) else known[atom])
        if constant.all():
            return None
        factors.append(constant != 0)
    left, right = (factor.astype(np.float32) for factor in factors)
    if equation.primitive.name == "mul":
        return [np.broadcast_to(left * right > 0, equation.outvars[0].aval.shape)]
    ((summed_left, summed_right), (batch_left, batch_right)) = equation.params["dimension_numbers"]
    with jax.ensure_compile_time_eval():
        product = jax.lax.dot_general(left, right, (((summed_left, summed_right)), (batch_left, batch_right)))
    return [np.asarray(product) > 0]


def _moved(equation: JaxprEqn, operands: list[Mask], known: dict[Var, Any]) -> list[Mask] | None:
    """Move the entries of masks as the equation moves those of arrays. None if it is not known where to."""
    values = []
    for atom, operand in zip(equation.invars, operands, strict=True):
        if jnp.issubdtype(atom.aval.dtype, jnp.inexact):
            values.append(np.broadcast_to(operand, atom.aval.shape).astype(np.float32))
        elif isinstance(atom, Literal) or atom in known:  # the indices of a gather or a scatter
            values.append(np.asarray(atom.val if isinstance(atom, Literal) else known[atom], atom.aval.dtype))
        else:
            return None
    return [np.asarray(result) > 0 for result in _execute(equation, values)]


def _compute(equation: JaxprEqn, known: dict[Var, Any]) -> None:
    """Compute the results of an equation whose operands are small constants."""
    is_known = all(isinstance(atom, Literal) or atom in known for atom in equation.invars)
    sizes = [np.prod(variable.aval.shape) for variable in equation.outvars]
    if not (is_known and max(sizes, default=0) <= _MOST_NUMBERS):
        return
    values = [atom.val if isinstance(atom, Literal) else known[atom] for atom in equation.invars]
    known.update(zip(equation.outvars, _execute(equation, values), strict=True))


def _execute(equation: JaxprEqn, values: Sequence[Any]) -> Sequence[Any]:
    params = equation.params
    # A convolution that is written as shifted sums has hundreds of these two, and JAX would compile each of them.
    if equation.primitive.name == "slice":
        strides = params["strides"] or [1] * values[0].ndim
        return [values[0][tuple(map(slice, params["start_indices"], params["limit_indices"], strides))]]
    if equation.primitive.name == "pad":
        config = params["padding_config"]
        if all(min(low, high) >= 0 and interior == 0 for low, high, interior in config):
            return [np.pad(values[0], [lengths[:2] for lengths in config], constant_values=values[1])]
    with jax.ensure_compile_time_eval():
        results = equation.primitive.bind(*values, **params)
    return results if equation.primitive.multiple_results else [results]


def _mask(atom: Var | Literal, masks: dict[Var, Mask]) -> Mask:
    return False if isinstance(atom, Literal) else masks.get(atom, False)


def _compressed(mask: Mask) -> Mask:
    """One bool in place of a mask whose entries are alike."""
    if isinstance(mask, bool) or mask.size == 0:
        return bool(np.any(mask))
    first = bool(mask.flat[0])
    return first if (mask == first).all() else mask
