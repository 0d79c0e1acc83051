"""The forward pass of a network as a flat list of equations.

JAX traces Linen and NNX modules and plain functions to the same equations. So which weights come last, and what can be
computed before any weight with a posterior enters, is found there, and no module has to announce its layers.
"""

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal, Var, jaxpr_as_fun
from jaxtyping import Array, Float, PyTree

from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Outline

# Calls whose equations are put in their place; others, such as loops and functions with derivatives of their own, stay.
CALLS = ("jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2")


class Equations(NamedTuple):
    """A traced forward pass; every variable is assigned once.

    Attributes
    ----------
    steps
        The equations, in the order of execution.
    params, frozen, inputs
        The variables of the arguments, leaf by leaf.
    constants
        Variables of arrays that the forward pass closes over, and those arrays.
    outputs
        Variables or literals of the result.
    debug_info
        What JAX knows about where the equations come from.
    """

    steps: list[JaxprEqn]
    params: list[Var]
    frozen: list[Var]
    inputs: list[Var]
    constants: dict[Var, Array]
    outputs: list[Var | Literal]
    debug_info: Any


def trace(network: Network, inputs: PyTree[Float[Array, "B ..."] | jax.ShapeDtypeStruct]) -> Equations:
    """Trace a forward pass; of `inputs` shape and dtype are used alone."""

    def forward(params: Any, frozen: Any, inputs: Any) -> Array:
        return Network(network.forward, params, frozen)(params, inputs)

    closed = jax.make_jaxpr(forward)(network.params, network.frozen, inputs)
    variables = [Var(variable.aval) for variable in closed.jaxpr.invars]
    equations: list[JaxprEqn] = []
    constants: dict[Var, Array] = {}

    def inline(closed: ClosedJaxpr, arguments: Sequence[Var | Literal]) -> list[Var | Literal]:
        """Append the equations of a function called with `arguments`, with variables of their own for each call."""
        here = dict(zip(closed.jaxpr.invars, arguments, strict=True))

        def read(atom: Var | Literal) -> Var | Literal:
            return atom if isinstance(atom, Literal) else here[atom]

        for variable, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
            here[variable] = Var(variable.aval)
            constants[here[variable]] = value
        for equation in closed.jaxpr.eqns:
            taken = [read(atom) for atom in equation.invars]
            if equation.primitive.name in CALLS:
                inner = equation.params["jaxpr"]
                results = inline(inner if isinstance(inner, ClosedJaxpr) else ClosedJaxpr(inner, ()), taken)
            else:
                results = [Var(variable.aval) for variable in equation.outvars]
                equations.append(equation.replace(invars=taken, outvars=results))
            here.update(zip(equation.outvars, results, strict=True))
        return [read(atom) for atom in closed.jaxpr.outvars]

    outputs = inline(closed, variables)
    ends = len(jax.tree.leaves(network.params)), len(variables) - len(jax.tree.leaves(inputs))
    arguments = variables[: ends[0]], variables[ends[0] : ends[1]], variables[ends[1] :]
    return Equations(equations, *arguments, constants, outputs, closed.jaxpr.debug_info)


@lru_cache(maxsize=64)
def numbers_of_example(outline: Outline) -> int:
    """How many numbers the forward pass of one example computes, of which some are alive at a time."""
    steps = trace(outline.network(), outline.example.batch(1)).steps
    return sum(math.prod(variable.aval.shape) for step in steps for variable in step.outvars)


def run(equations: Equations, part: list[JaxprEqn], known: dict[Var, Array], wanted: Sequence[Var | Literal]) -> list:
    """Execute a part of `equations` with values of the variables that it does not assign; traceable, differentiable."""
    program = Jaxpr([], list(known), list(wanted), part, debug_info=equations.debug_info)
    return jaxpr_as_fun(ClosedJaxpr(program, []))(*known.values())
