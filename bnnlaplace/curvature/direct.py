"""Weights whose outputs are those of the network: the last dense layer and its bias.

If what a layer returns is only added to before it leaves the network, the derivative of output c with respect to what
the layer returns is the unit vector e_c, for all examples. Then the Jacobian of a matrix is phi' kron I, with the
layer's inputs phi, and that of a bias is I. No backward pass is needed, and sums over the outputs are those of the
likelihood's curvature alone.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import PyTree

from bnnlaplace.core.tree import num_examples
from bnnlaplace.curvature.layers import Entry, Weights, find
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec

# Equations that leave the numbers of a bias in their order.
_KEEP_ORDER = ("reshape", "broadcast_in_dim", "convert_element_type", "squeeze", "expand_dims", "copy", "copy_p")
# Numbers of all arrays of a microbatch in which there is no backward pass: few enough for a cache. But the sum over
# microbatches of a matrix as wide as the outputs takes as long as the products of hundreds of examples, so that there
# are more of them if they need not more than _MOST_NUMBERS.
_CACHED_NUMBERS, _MOST_NUMBERS, _MANY_EXAMPLES = 2**20, 2**23, 512


def direct_leaves(weights: Weights) -> frozenset[int]:
    """Find the leaves whose outputs are those of the network (M, C), in their order and without any factor."""
    jaxpr = weights.jaxpr
    (output,) = jaxpr.outputs
    if isinstance(output, Literal) or len(output.aval.shape) != 2:
        return frozenset()
    summands = _summands(output, jaxpr.equations, jaxpr.outputs)
    layers = {
        leaf
        for leaf, layer in weights.layers.items()
        if layer.positions == 1
        and layer.entry.axes == (0,)
        and jaxpr.equations[layer.entry.index].primitive.name == "dot_general"
        and jaxpr.equations[layer.entry.index].outvars[0] in summands
        and list(layer.layout.column_order) == sorted(layer.layout.column_order)
    }
    biases = {
        leaf
        for leaf, entries in weights.entries.items()
        if len(entries) == 1 and _is_bias(jaxpr.params[leaf], entries[0], jaxpr.equations, summands)
    }
    return frozenset(layers | biases)


def examples_at_once(network: Network, inputs: PyTree, microbatch: int) -> int:
    """How many examples to take at a time: more than `microbatch` if all weights are direct and need little memory.

    `inputs` are all examples.
    """
    numbers = _numbers_of_direct(NetworkSpec.of(network, inputs))
    if numbers is None:
        return microbatch
    at_once = max(_CACHED_NUMBERS // numbers, min(_MANY_EXAMPLES, _MOST_NUMBERS // numbers))
    return max(microbatch, min(num_examples(inputs), at_once))


@lru_cache(maxsize=64)
def _numbers_of_direct(spec: NetworkSpec) -> int | None:
    """How many numbers the forward pass of an example has; None unless all weights are direct."""
    weights = find(spec.network(), spec.example.batch(2))
    if len(direct_leaves(weights)) < len(weights.jaxpr.params):
        return None
    variables = (
        *weights.jaxpr.inputs,
        *(result for equation in weights.jaxpr.equations for result in equation.outvars),
    )
    return sum(math.prod(variable.aval.shape[1:]) for variable in variables if variable.aval.shape[:1] == (2,))


def _summands(output: Var, equations: Sequence[JaxprEqn], outputs: Sequence[Var | Literal]) -> set[Var]:
    """The variables of the shape of the output that enter it once, by additions alone, and nothing else."""
    uses = Counter(atom for equation in equations for atom in equation.invars if not isinstance(atom, Literal))
    uses.update(atom for atom in outputs if not isinstance(atom, Literal))
    summands = {output} if uses[output] == 1 else set()
    for equation in reversed(equations):
        if len(equation.outvars) != 1 or equation.outvars[0] not in summands:
            continue
        name, operands = equation.primitive.name, equation.invars
        if name == "sub":
            operands = operands[:1]
        elif name not in ("add", "add_any", "convert_element_type", "copy", "copy_p"):
            continue
        summands |= {
            atom
            for atom in operands
            if not isinstance(atom, Literal) and uses[atom] == 1 and _is_like(atom, equation.outvars[0])
        }
    return summands


def _is_like(atom: Var, other: Var) -> bool:
    return atom.aval.shape == other.aval.shape and jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _is_bias(leaf: Var, entry: Entry, equations: Sequence[JaxprEqn], summands: set[Var]) -> bool:
    """Whether the leaf is a vector that is added to each row of the output, or repeated for each and then added."""
    equation = equations[entry.index]
    name, (result, *_) = equation.primitive.name, equation.outvars
    if name not in ("add", "add_any", "broadcast_in_dim") or entry.axes != (0,) or result not in summands:
        return False
    of_examples = [index for index, _ in entry.operands]
    others = [atom for index, atom in enumerate(equation.invars) if index not in of_examples]
    if len(others) != 1 or isinstance(others[0], Literal):
        return False
    way = [equations[index] for index in entry.before]
    keeps_order = all(step.primitive.name in _KEEP_ORDER and len(step.invars) == 1 for step in way)
    # An axis of length one in front, or none, is repeated.
    width, shape = result.aval.shape[1], others[0].aval.shape
    is_row = shape == (1, width) or (name == "broadcast_in_dim" and shape == (width,))
    if name == "broadcast_in_dim" and equation.params["broadcast_dimensions"][-1] != 1:
        return False
    sizes = {math.prod(variable.aval.shape) for variable in (leaf, *(step.outvars[0] for step in way))}
    return keeps_order and is_row and sizes <= {width}
