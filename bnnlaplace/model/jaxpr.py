"""The forward pass of a network as one flat list of JAX equations.

JAX traces Linen modules, NNX modules and plain functions to the same equations. Which weights enter last, and what can
be computed before any weight that has a posterior enters, is read from the equations. Modules need not announce their
layers.
"""

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import PyTree

from bnnlaplace.core import rounding
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec
from bnnlaplace.model.wide_sums import functions_of

# Calls that are replaced by the equations of the function they call. All others stay, such as loops and functions with
# a derivative rule of their own.
INLINED_CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")


class FlatJaxpr(NamedTuple):
    """A traced forward pass without inner calls, in which every variable is assigned once.

    Attributes
    ----------
    equations
        The equations in the order of execution.
    params, frozen, inputs
        The variables of the three arguments, leaf by leaf.
    constants
        The variables of the arrays that the forward pass closes over, with these arrays.
    outputs
        The variables or literals of the result.
    debug_info
        Where the equations come from, for JAX's own messages.
    """

    equations: list[JaxprEqn]
    params: list[Var]
    frozen: list[Var]
    inputs: list[Var]
    constants: dict[Var, Any]
    outputs: list[Var | Literal]
    debug_info: Any


def trace(network: Network, inputs: PyTree) -> FlatJaxpr:
    """Trace the forward pass of a network. Only shape and type of `inputs` are used; they may be abstract."""

    def forward(params: PyTree, frozen: PyTree, inputs: PyTree) -> Any:
        return Network(network.forward, params, frozen)(params, inputs)

    closed = jax.make_jaxpr(forward)(network.params, network.frozen, inputs)
    arguments = [Var(variable.aval) for variable in closed.jaxpr.invars]
    equations: list[JaxprEqn] = []
    constants: dict[Var, Any] = {}

    def inline(closed: ClosedJaxpr, arguments: Sequence[Var | Literal]) -> list[Var | Literal]:
        """Append the equations of a function that is called with `arguments`, and return its results.

        A function may be called several times, so every call gets variables of its own.
        """
        renamed = dict(zip(closed.jaxpr.invars, arguments, strict=True))

        def read(atom: Var | Literal) -> Var | Literal:
            return atom if isinstance(atom, Literal) else renamed[atom]

        for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            renamed[variable] = Var(variable.aval)
            constants[renamed[variable]] = value
        for equation in closed.jaxpr.eqns:
            operands = [read(atom) for atom in equation.invars]
            if equation.primitive.name in INLINED_CALLS:
                inner = equation.params["jaxpr"]
                results = inline(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), operands)
            else:
                results = [Var(variable.aval) for variable in equation.outvars]
                equations.append(equation.replace(invars=operands, outvars=results))
            renamed.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    outputs = inline(closed, arguments)
    num_params, num_frozen = len(jax.tree.leaves(network.params)), len(jax.tree.leaves(network.frozen))
    params, others = arguments[:num_params], arguments[num_params:]
    frozen, examples = others[:num_frozen], others[num_frozen:]
    return FlatJaxpr(equations, params, frozen, examples, constants, outputs, closed.jaxpr.debug_info)


@lru_cache(maxsize=64)
def numbers_of_example(spec: NetworkSpec) -> int:
    """Count the numbers that the forward pass of one example computes. Only some of them are in memory at a time."""
    equations = trace(spec.network(), spec.example.batch(1)).equations
    return sum(math.prod(variable.aval.shape) for equation in equations for variable in equation.outvars)


@lru_cache(maxsize=64)
def multiplications_of_convolutions(spec: NetworkSpec) -> int:
    """Count the multiplications within the convolutions of the forward pass of one example."""
    equations = trace(spec.network(), spec.example.batch(1)).equations
    return sum(_multiplications(each) for each in equations if each.primitive.name == "conv_general_dilated")


def _multiplications(convolution: JaxprEqn) -> int:
    kernel, out_features = convolution.invars[1].aval.shape, convolution.params["dimension_numbers"].rhs_spec[0]
    of_output = math.prod(kernel) // max(1, kernel[out_features])
    return of_output * math.prod(convolution.outvars[0].aval.shape)


@lru_cache(maxsize=64)
def derivative_rounding(spec: NetworkSpec) -> float:
    """Relative error of the derivatives in the weights, from the shortest type between weights and outputs.

    Equations that depend on no weight do not count, as derivatives do not pass through them, and neither do those that
    reach no output. Of a loop, or a function with a derivative rule of its own, all numbers count.
    """
    jaxpr = trace(spec.network(), spec.example.batch(1))
    dependent, between = set(jaxpr.params), []
    for equation in jaxpr.equations:
        if dependent.isdisjoint(_variables(equation.invars)) or equation.primitive.name == "stop_gradient":
            continue
        between.append(equation)
        dependent.update(variable for variable in equation.outvars if _is_smooth(variable))
    needed, found = set(_variables(jaxpr.outputs)), []
    for equation in reversed(between):
        if needed.isdisjoint(equation.outvars):
            continue
        operands = dependent.intersection(_variables(equation.invars))
        needed |= operands
        found += _spacings((*operands, *dependent.intersection(equation.outvars))) + _spacings_inside(equation)
    return rounding.of_eps(max(found, default=0.0))


def _spacings_inside(equation: JaxprEqn) -> list[float]:
    """The relative spacings of the numbers that an equation computes on the way, in functions that it calls."""
    if equation.primitive.name == "reduce_precision":
        return [2.0 ** -equation.params["mantissa_bits"]]
    inner = [step for function in functions_of(equation) for step in function.eqns]
    results = [variable for step in inner for variable in step.outvars if _is_smooth(variable)]
    return _spacings(results) + [spacing for step in inner for spacing in _spacings_inside(step)]


def _spacings(variables: Iterable[Var]) -> list[float]:
    return [float(jnp.finfo(variable.aval.dtype).eps) for variable in variables]


def _variables(atoms: Sequence[Var | Literal]) -> list[Var]:
    return [atom for atom in atoms if not isinstance(atom, Literal)]


def _is_smooth(variable: Var) -> bool:
    return jnp.issubdtype(variable.aval.dtype, jnp.floating)


def run(
    jaxpr: FlatJaxpr, equations: Sequence[JaxprEqn], known: dict[Var, Any], wanted: Sequence[Var | Literal]
) -> list[Any]:
    """Execute some equations of `jaxpr` and return the values of the `wanted` variables.

    `known` holds the values of all variables that these equations read and do not assign. The call can be traced and
    differentiated.
    """
    program = Jaxpr([], list(known), list(wanted), list(equations), debug_info=jaxpr.debug_info)
    return jaxpr_as_fun(ClosedJaxpr(program, []))(*known.values())
