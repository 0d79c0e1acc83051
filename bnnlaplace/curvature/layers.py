"""Where weights meet examples in a forward pass, and which of these meetings are matrix products.

A network is traced with two and with three examples. An array that belongs to single examples has one axis whose length
follows their number; every other array is computed from weights alone. The equations in which the two kinds meet are
the *entries* of the weights: a product of matrices, the addition of a bias, a depthwise convolution. A small change of
the output of an entry shows how every output of the network depends on the weights that enter there (`tapped.py`), so
nothing else of the forward pass need be known.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, PyTree

from bnnlaplace.curvature.layout import Layout, find_layout
from bnnlaplace.model.jaxpr import FlatJaxpr, trace
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Shapes


class Entry(NamedTuple):
    """An equation in which weights meet arrays of examples.

    Attributes
    ----------
    index
        Its index among the equations.
    before
        The indices of the equations that prepare its weights, such as the reshaping of a bias.
    operands
        The operands that belong to examples, as pairs (index of the operand, its axis of examples).
    axes
        The axis of examples of each result.
    """

    index: int
    before: tuple[int, ...]
    operands: tuple[tuple[int, int], ...]
    axes: tuple[int, ...]


class Layer(NamedTuple):
    """The single entry of a weight, if it is a matrix product or a convolution with arrays of examples.

    Attributes
    ----------
    entry
        The entry.
    kernel
        Which of its two operands is made of the weight: 0 or 1.
    layout
        How the numbers of the weight form a matrix from inputs to outputs.
    positions
        How often the matrix is applied to one example, such as once for each pixel of an image.
    """

    entry: Entry
    kernel: int
    layout: Layout
    positions: int


class Weights(NamedTuple):
    """How each leaf of `network.params` enters. Leaves have the numbers that `jax.tree.leaves` gives them.

    Attributes
    ----------
    layers
        The leaves that enter once, as the matrix of a linear map.
    entries
        All entries of every other leaf whose entries are known.
    rest
        The leaves whose entries cannot be told apart by examples. They belong to loops or to functions with derivatives
        of their own, or they enter where examples and positions share an axis.
    jaxpr
        The forward pass of as many examples as `find` was given.
    """

    layers: dict[int, Layer]
    entries: dict[int, tuple[Entry, ...]]
    rest: tuple[int, ...]
    jaxpr: FlatJaxpr


def find(network: Network, inputs: PyTree) -> Weights:
    """Find how the weights enter a forward pass of `inputs`.

    Dense layers are found under any name and in any module: they are products of matrices with the weight as one
    operand. The weight may be on either side, may be reshaped and transposed before, and the other operand may have its
    examples along any axis. Convolutions without groups are layers, too. Grouped convolutions, biases, scales, weights
    that enter twice and operations that JAX does not know are entries.

    Cost: three traces of the forward pass, and no arithmetic.

    Parameters
    ----------
    network
        The network whose `params` are looked for. A linearised network has the entries of the network that was
        expanded.
    inputs
        Examples along the leading axis; only their shapes and types are used.
    """
    network = network.unlinearised()
    example = Shapes.of_example(inputs)
    small, large = (trace(network, example.batch(count)) for count in (2, 3))
    jaxpr = trace(network, Shapes.of(inputs).arrays())
    leaves = range(len(jaxpr.params))
    if not (_same_equations(small, large) and _same_equations(small, jaxpr)):
        return Weights({}, {}, tuple(leaves), jaxpr)
    axes = _example_axes(small, large)
    depends = _dependence(small)
    layers: dict[int, Layer] = {}
    entries: dict[int, tuple[Entry, ...]] = {}
    for leaf in leaves:
        entries_of_leaf = _entries_of(leaf, small, axes, depends)
        if entries_of_leaf is None:
            continue
        layer = _as_layer(small, leaf, entries_of_leaf)
        if layer is None:
            entries[leaf] = entries_of_leaf
        else:
            layers[leaf] = layer
    rest = tuple(leaf for leaf in leaves if leaf not in layers and leaf not in entries)
    return Weights(layers, entries, rest, jaxpr)


def at_one_example(equation: JaxprEqn, axes: Sequence[int]) -> JaxprEqn:
    """Rewrite an equation for a single example, if the number of examples is one of its parameters.

    Parameters
    ----------
    equation
        The equation of an `Entry`.
    axes
        The axis of examples of each of its results.
    """
    if equation.primitive.name != "broadcast_in_dim":
        return equation
    shape = list(equation.params["shape"])
    shape[axes[0]] = 1
    return equation.replace(params={**equation.params, "shape": tuple(shape)})


def is_matrix(weights: Weights, leaf: int, num_axes: int) -> bool:
    """Whether a leaf that is not a layer acts on vectors all the same, so that its derivatives are matrices.

    A product of matrices, a lookup in a table and a convolution without groups mix the numbers of the last axis with
    those of the others. A product number by number, and a convolution with groups, do not.

    Parameters
    ----------
    weights, leaf
        What `find` returned, and the number of a leaf.
    num_axes
        The number of its axes that are longer than one. Within a loop nothing else is known of a leaf: it counts as a
        matrix if it has two, as more may be a stack of matrices, or a depthwise convolution.
    """
    if leaf not in weights.entries:
        return num_axes == 2
    equations = (weights.jaxpr.equations[entry.index] for entry in weights.entries[leaf])
    return any(
        equation.primitive.name in ("dot_general", "gather") or equation.params.get("feature_group_count") == 1
        for equation in equations
    )


# --- examples ---------------------------------------------------------------------------------------------------

# The axis of examples of a variable. STATIC: its shape does not depend on their number. MIXED: the shape depends on the
# number in any other way than by one axis of just that length.
STATIC, MIXED = -1, -2


def _same_equations(one: FlatJaxpr, other: FlatJaxpr) -> bool:
    return [e.primitive.name for e in one.equations] == [e.primitive.name for e in other.equations]


def _variables(jaxpr: FlatJaxpr) -> Iterable[Var]:
    yield from (*jaxpr.params, *jaxpr.frozen, *jaxpr.inputs, *jaxpr.constants)
    for equation in jaxpr.equations:
        yield from equation.outvars


def _example_axes(small: FlatJaxpr, large: FlatJaxpr) -> dict[Var, int]:
    """Find the axis of examples of every variable of `small`, from its shapes with two and with three examples."""
    return {
        variable: _example_axis(variable.aval.shape, twin.aval.shape)
        for variable, twin in zip(_variables(small), _variables(large), strict=True)
    }


def _example_axis(two: tuple[int, ...], three: tuple[int, ...]) -> int:
    if two == three:
        return STATIC
    differing = [axis for axis, sizes in enumerate(zip(two, three, strict=False)) if sizes[0] != sizes[1]]
    if len(two) == len(three) and len(differing) == 1 and (two[differing[0]], three[differing[0]]) == (2, 3):
        return differing[0]
    return MIXED


# In `_dependence`, what stands for the inputs beside the numbers of leaves.
_INPUTS = -1


def _dependence(jaxpr: FlatJaxpr) -> dict[Var, frozenset[int]]:
    """Find the leaves of the weights, and the inputs, that each variable is computed from."""
    depends = {variable: frozenset([leaf]) for leaf, variable in enumerate(jaxpr.params)}
    depends |= dict.fromkeys(jaxpr.inputs, frozenset([_INPUTS]))
    for equation in jaxpr.equations:
        sources = frozenset().union(*(depends.get(atom, frozenset()) for atom in _operands(equation)))
        depends |= dict.fromkeys(equation.outvars, sources)
    return depends


def _operands(equation: JaxprEqn) -> list[Var]:
    """The operands that are not literals."""
    return [atom for atom in equation.invars if not isinstance(atom, Literal)]


def _other_operands(equation: JaxprEqn, example_axes: Sequence[tuple[int, int]]) -> list[Var]:
    """The operands of an entry that are neither literals nor arrays of examples."""
    indices = [index for index, _ in example_axes]
    others = [atom for index, atom in enumerate(equation.invars) if index not in indices]
    return [atom for atom in others if not isinstance(atom, Literal)]


def _see_inputs(variables: Sequence[Var], depends: dict[Var, frozenset[int]]) -> bool:
    """Whether arrays that should belong to weights alone depend on the inputs of all examples together."""
    return any(_INPUTS in depends.get(variable, ()) for variable in variables)


# --- entries ----------------------------------------------------------------------------------------------------


def _entries_of(
    leaf: int, jaxpr: FlatJaxpr, axes: dict[Var, int], depends: dict[Var, frozenset[int]]
) -> tuple[Entry, ...] | None:
    """Find all entries of a leaf. Return None if one of them, or an equation on the way to it, is not understood."""
    # Variables that are computed from this leaf, and perhaps from other weights, without any example.
    from_weights = {jaxpr.params[leaf]}
    entries: list[Entry] = []
    for index, equation in enumerate(jaxpr.equations):
        if not from_weights.intersection(_operands(equation)):
            continue
        if all(axes[result] == STATIC for result in equation.outvars):
            if _see_inputs(_operands(equation), depends):
                return None
            from_weights.update(equation.outvars)
            continue
        entry = _entry(index, jaxpr, axes)
        if entry is None or _see_inputs(_other_operands(equation, entry.operands), depends):
            return None
        entries.append(entry)
    # A weight that is an output without any example is not seen by an entry.
    if from_weights.intersection(atom for atom in jaxpr.outputs if not isinstance(atom, Literal)):
        return None
    return tuple(entries)


def _entry(index: int, jaxpr: FlatJaxpr, axes: dict[Var, int]) -> Entry | None:
    """Describe an equation as an entry, if it can be evaluated for one example alone."""
    equation = jaxpr.equations[index]
    result_axes = [axes[result] for result in equation.outvars]
    operands = [
        (operand, axes[atom])
        for operand, atom in enumerate(equation.invars)
        if not isinstance(atom, Literal) and axes[atom] != STATIC
    ]
    # Both STATIC and MIXED are below zero.
    if min(result_axes) < 0 or any(axis < 0 for _, axis in operands) or _has_inner_program(equation):
        return None
    if not all(jnp.issubdtype(result.aval.dtype, jnp.floating) for result in equation.outvars):
        return None
    entry = Entry(index, _equations_before(index, jaxpr, operands), tuple(operands), tuple(result_axes))
    return entry if _works_alone(equation, entry) else None


def _has_inner_program(equation: JaxprEqn) -> bool:
    """Whether it is a loop or a call. The number of examples may be written into their equations."""
    params = jax.tree.leaves(equation.params, is_leaf=lambda param: hasattr(param, "eqns") or hasattr(param, "jaxpr"))
    return any(hasattr(param, "eqns") or hasattr(param, "jaxpr") or callable(param) for param in params)


def _works_alone(equation: JaxprEqn, entry: Entry) -> bool:
    """Whether the equation turns one example into one result of the expected shape."""
    single = at_one_example(equation, entry.axes)
    shapes = [jax.ShapeDtypeStruct(atom.aval.shape, atom.aval.dtype) for atom in equation.invars]
    for index, axis in entry.operands:
        shapes[index] = jax.ShapeDtypeStruct(_with_length(shapes[index].shape, axis, 1), shapes[index].dtype)

    def bind(*operands: Array) -> list[Array]:
        results = single.primitive.bind(*operands, **single.params)
        return list(results) if single.primitive.multiple_results else [results]

    try:
        result_shapes = [result.shape for result in jax.eval_shape(bind, *shapes)]
    except Exception:  # whatever the rule of an unknown operation raises
        return False
    results = zip(equation.outvars, entry.axes, strict=True)
    return result_shapes == [_with_length(result.aval.shape, axis, 1) for result, axis in results]


def _with_length(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])


def _equations_before(index: int, jaxpr: FlatJaxpr, example_axes: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The indices of the equations that compute the operands of an entry besides its arrays of examples."""
    wanted = set(_other_operands(jaxpr.equations[index], example_axes))
    before = []
    for earlier in range(index - 1, -1, -1):
        equation = jaxpr.equations[earlier]
        if wanted.intersection(equation.outvars):
            before.append(earlier)
            wanted.update(_operands(equation))
    return tuple(reversed(before))


# --- layers -----------------------------------------------------------------------------------------------------


def _as_layer(jaxpr: FlatJaxpr, leaf: int, entries: tuple[Entry, ...]) -> Layer | None:
    """Describe a leaf with one entry as the matrix of a layer, if it is one."""
    if len(entries) != 1 or len(entries[0].operands) != 1:
        return None
    entry = entries[0]
    equation = jaxpr.equations[entry.index]
    kernel = 1 - entry.operands[0][0]
    kernel_axes = _kernel_axes(equation, kernel, entry)
    if kernel_axes is None:
        return None
    summed, left = kernel_axes
    operand = equation.invars[kernel]
    layout = find_layout(jaxpr.params[leaf], operand, [jaxpr.equations[i] for i in entry.before], summed, left)
    if layout is None:
        return None
    (result,) = equation.outvars
    columns = math.prod(operand.aval.shape[axis] for axis in left)
    num_examples = 2  # those of `jaxpr`
    return Layer(entry, kernel, layout, math.prod(result.aval.shape) // (num_examples * columns))


def _kernel_axes(equation: JaxprEqn, kernel: int, entry: Entry) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """The axes of the kernel that a product sums over, and those that are left. None if it is not a layer."""
    if equation.primitive.name == "dot_general":
        contracted, batched = equation.params["dimension_numbers"]
        if any(batched) or entry.operands[0][1] in contracted[1 - kernel]:
            return None
        left = (axis for axis in range(len(equation.invars[kernel].aval.shape)) if axis not in contracted[kernel])
        return tuple(contracted[kernel]), tuple(left)
    if equation.primitive.name == "conv_general_dilated":
        dimensions, params = equation.params["dimension_numbers"], equation.params
        grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
        if grouped or kernel != 1 or entry.operands[0][1] != dimensions.lhs_spec[0]:
            return None
        out_channels, in_channels, *window = dimensions.rhs_spec
        return (in_channels, *window), (out_channels,)
    return None
