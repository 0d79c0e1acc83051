"""Derivatives of the outputs of single examples, from one backward pass for all of them.

A zero is added to every array in which weights meet examples. The cotangent of that zero is the derivative with respect
to the array, example by example; what the weights have to do with it is a small function of one example, which needs
no pass through the network.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, Float, Int, PyTree

from bnnlaplace.core.linalg import all_products
from bnnlaplace.core.tree import examples, summed_type
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature.layers import Entry, Layer, Weights, at_one_example, find
from bnnlaplace.model.jaxpr import run
from bnnlaplace.model.network import Network


class Pass(NamedTuple):
    """A forward pass of M examples that is ready to be differentiated.

    Attributes
    ----------
    weights
        How the leaves of the weights enter.
    outputs
        f(params, x_m); of a linearised network those of the expansion, while all else is that of its centre.
    layer_inputs
        Leaf -> what its matrix multiplies, for each example and position, in the order of the matrix's rows.
    gradients
        Cotangents of the outputs -> for each leaf, one example after another: of a layer the derivative with respect to
        its outputs at each position, (M, T, O); of any other weight the derivative with respect to itself, (M, ...).
    """

    weights: Weights
    outputs: Float[Array, "M ... C"]
    layer_inputs: dict[int, Float[Array, "M T I"]]
    gradients: Callable[[Float[Array, "M ... C"]], dict[int, Array]]


def forward(network: Network, params: PyTree, inputs: PyTree[Float[Array, "M ..."]]) -> Pass:
    """Run a network, tapped where its weights enter.

    With a the inputs of a layer and g the derivative with respect to its outputs, the derivative of an example's output
    with respect to the layer's matrix is sum_t a_t g_t' over positions.

    Cost: a forward pass, and for each call of `gradients` a backward pass that stops at activations. Weights of
    `Weights.rest` take another forward and backward pass for each call. Memory: activations of M examples, the patches
    of convolutions, and with each call M derivatives of the weights that are no layers.

    Parameters
    ----------
    network, params
        What is run, and at which weights.
    inputs
        M examples.
    """
    if network.is_linearised:
        base = network.unlinearised()
        return forward(base, base.params, inputs)._replace(outputs=network(params, inputs))
    weights = find(network, inputs)
    equations = weights.equations
    known = dict(equations.constants)
    leaves = jax.tree.leaves(params)
    for variables, tree in ((equations.params, params), (equations.frozen, network.frozen), (equations.inputs, inputs)):
        known |= dict(zip(variables, jax.tree.leaves(tree), strict=True))
    entries = {entry.step: entry for entry in _all_entries(weights)}
    steps, taps = _tapped(equations.steps, sorted(entries))
    saved = list(dict.fromkeys(_operands(equations.steps, entries.values())))

    def tapped(zeros: list[Array]) -> tuple[Array, list[Array]]:
        with all_products():
            outputs, *values = run(
                equations, steps, known | dict(zip(taps, zeros, strict=True)), [*equations.outputs, *saved]
            )
        return outputs, values

    zeros = [jnp.zeros(tap.aval.shape, tap.aval.dtype) for tap in taps]
    outputs, pullback, values = jax.vjp(tapped, zeros, has_aux=True)
    value_of = known | dict(zip(saved, values, strict=True))
    tapped_results = [result for step in sorted(entries) for result in equations.steps[step].outvars]

    def gradients(cotangent: Float[Array, "M ... C"]) -> dict[int, Array]:
        with all_products():
            (found,) = pullback(cotangent)
            at = dict(zip(tapped_results, found, strict=True))
            derivatives = {
                leaf: _as_columns(layer, equations.steps[layer.entry.step], at)
                for leaf, layer in weights.layers.items()
            }
            for leaf, met in weights.entries.items():
                parts = [_per_example(weights, leaf, entry, value_of, at) for entry in met]
                zero = jnp.zeros((len(outputs), *leaves[leaf].shape), leaves[leaf].dtype)
                derivatives[leaf] = sum(parts, zero)
            if weights.rest:
                derivatives |= _by_whole_network(network, params, inputs, weights.rest, cotangent)
        return {leaf: derivatives[leaf].astype(summed_type(leaves[leaf].dtype)) for leaf in sorted(derivatives)}

    layer_inputs = {
        leaf: _as_rows(layer, equations.steps[layer.entry.step], value_of).astype(summed_type(leaves[leaf].dtype))
        for leaf, layer in weights.layers.items()
    }
    return Pass(weights, outputs, layer_inputs, gradients)


def over_columns(function: Callable[[Float[Array, "M ... C"]], PyTree], outputs: Float[Array, "M ... C"]) -> PyTree:
    """The sum of `function` over the unit vectors of one example's outputs, each given for all examples at once.

    Parameters
    ----------
    function
        From a cotangent of the outputs to a pytree.
    outputs
        Of which shape and dtype are used.
    """
    return mb.summed(lambda number: function(_column(outputs, number)), jnp.arange(math.prod(outputs.shape[1:])))


def at_columns(
    function: Callable[[Float[Array, "M ... C"]], PyTree],
    outputs: Float[Array, "M ... C"],
    numbers: Int[Array, " K"],
    at_once: int | None = None,
) -> PyTree:
    """`function` of some of the unit vectors of one example's outputs, each given for all examples at once.

    Parameters
    ----------
    function
        From a cotangent of the outputs to a pytree, whose leaves get a leading axis.
    outputs
        Of which shape and dtype are used.
    numbers
        Which unit vectors; zero in place of one that there is not.
    at_once
        How many go through `function` together; by default all.
    """

    def of_column(number: Int[Array, ""]) -> PyTree:
        return function(_column(outputs, number))

    if at_once is None or at_once >= len(numbers):
        return jax.vmap(of_column)(jnp.asarray(numbers))
    at_once = math.ceil(len(numbers) / math.ceil(len(numbers) / at_once))  # in parts as equal as can be
    return lax.map(of_column, jnp.asarray(numbers), batch_size=at_once)


def _column(outputs: Float[Array, "M ... C"], number: Int[Array, ""]) -> Float[Array, "M ... C"]:
    shape = outputs.shape[1:]
    column = jax.nn.one_hot(number, math.prod(shape), dtype=outputs.dtype).reshape(shape)
    return jnp.broadcast_to(column, outputs.shape)


def _all_entries(weights: Weights) -> list[Entry]:
    return [layer.entry for layer in weights.layers.values()] + [
        entry for entries in weights.entries.values() for entry in entries
    ]


def _operands(steps: Sequence[JaxprEqn], entries: Sequence[Entry]) -> list[Var]:
    return [steps[entry.step].invars[index] for entry in entries for index, _ in entry.operands]


def _tapped(steps: Sequence[JaxprEqn], entries: Sequence[int]) -> tuple[list[JaxprEqn], list[Var]]:
    """The equations with a new variable added to every result of the entries."""
    changed, taps = list(steps), []
    for position in reversed(entries):
        equation = steps[position]
        plain = [Var(result.aval) for result in equation.outvars]
        new = [Var(result.aval) for result in equation.outvars]
        additions = [
            equation.replace(primitive=lax.add_p, params={}, invars=[before, tap], outvars=[after])
            for before, tap, after in zip(plain, new, equation.outvars, strict=True)
        ]
        changed[position : position + 1] = [equation.replace(outvars=plain), *additions]
        taps = new + taps
    return changed, taps


# Layers ---------------------------------------------------------------------------------------------------------------


def _as_columns(layer: Layer, equation: JaxprEqn, at: dict[Var, Array]) -> Float[Array, "M T O"]:
    """Derivatives with respect to the outputs of a layer: examples, positions, and columns of its matrix."""
    derivative, (axis,) = at[equation.outvars[0]], layer.entry.axes
    if equation.primitive.name == "conv_general_dilated":
        columns = [equation.params["dimension_numbers"].out_spec[1]]
    else:
        # The free axes of the left operand come first.
        count, other = (_count_free(equation, side) for side in (layer.kernel, 1 - layer.kernel))
        columns = range(count) if layer.kernel == 0 else range(other, other + count)
    matrix = _three_axes(derivative, axis, list(columns))
    return layer.layout.columns(matrix)


def _as_rows(layer: Layer, equation: JaxprEqn, value_of: dict[Var, Array]) -> Float[Array, "M T I"]:
    """What a layer multiplies: examples, positions, and rows of its matrix."""
    ((index, axis),) = layer.entry.operands
    array = value_of[equation.invars[index]]
    if equation.primitive.name == "conv_general_dilated":
        matrix = _patches(array, equation)
    else:
        matrix = _three_axes(array, axis, list(equation.params["dimension_numbers"][0][index]))
    return layer.layout.rows(matrix)


def _count_free(equation: JaxprEqn, side: int) -> int:
    return len(equation.invars[side].aval.shape) - len(equation.params["dimension_numbers"][0][side])


def _three_axes(array: Array, example: int, last: list[int]) -> Float[Array, "M T D"]:
    """The axis of examples first, then all others as one, then those of `last` as one."""
    middle = [axis for axis in range(array.ndim) if axis != example and axis not in last]
    sizes = (math.prod(array.shape[axis] for axis in axes) for axes in ([example], middle, last))
    return jnp.transpose(array, (example, *middle, *last)).reshape(*sizes)


def _patches(images: Array, equation: JaxprEqn) -> Float[Array, "M T I"]:
    """The window of a convolution at each position of its output, input channels slowest.

    By slices, one for each number in a channel's window: they move numbers and multiply none.
    """
    params, dimensions = equation.params, equation.params["dimension_numbers"]
    images = jnp.transpose(images, dimensions.lhs_spec)  # examples, channels, then space
    result, kernel = equation.outvars[0].aval.shape, equation.invars[1].aval.shape
    extent = [result[axis] for axis in dimensions.out_spec[2:]]
    window = [kernel[axis] for axis in dimensions.rhs_spec[2:]]
    margins = [(low, high, gap - 1) for (low, high), gap in zip(params["padding"], params["lhs_dilation"], strict=True)]
    padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), (0, 0, 0), *margins])
    strides = params["window_strides"]

    def shifted(tap: tuple[int, ...]) -> Array:
        first = [offset * apart for offset, apart in zip(tap, params["rhs_dilation"], strict=True)]
        last = [f + (size - 1) * stride + 1 for f, size, stride in zip(first, extent, strides, strict=True)]
        return lax.slice(padded, (0, 0, *first), (*padded.shape[:2], *last), (1, 1, *strides))

    taps = jnp.stack([shifted(tap) for tap in product(*map(range, window))], axis=2)
    count, channels = images.shape[:2]
    rows = taps.reshape(count, channels * math.prod(window), math.prod(extent))
    return jnp.swapaxes(rows, 1, 2)


# Other weights --------------------------------------------------------------------------------------------------------


def _per_example(
    weights: Weights, leaf: int, entry: Entry, value_of: dict[Var, Array], at: dict[Var, Array]
) -> Float[Array, "M ..."]:
    """The derivative of each example's outputs with respect to a weight through one of its entries."""
    equations = weights.equations
    equation = equations.steps[entry.step]
    before = [equations.steps[index] for index in entry.before]
    taken = dict.fromkeys(a for step in (*before, equation) for a in step.invars if not isinstance(a, Literal))
    operands = [equation.invars[index] for index, _ in entry.operands]
    known = {variable: value_of[variable] for variable in taken if variable in value_of and variable not in operands}
    weight = equations.params[leaf]

    def one(values: list[Array], cotangents: list[Array]) -> Array:
        expanded = [jnp.expand_dims(value, axis) for value, (_, axis) in zip(values, entry.operands, strict=True)]

        def entering(value: Array) -> list[Array]:
            given = known | dict(zip(operands, expanded, strict=True)) | {weight: value}
            return run(equations, [*before, at_one_example(equation, entry.axes)], given, equation.outvars)

        _, pullback = jax.vjp(entering, value_of[weight])
        results = zip(cotangents, entry.axes, strict=True)
        return pullback([jnp.expand_dims(cotangent, axis) for cotangent, axis in results])[0]

    axes = [axis for _, axis in entry.operands], list(entry.axes)
    return jax.vmap(one, in_axes=axes)([value_of[o] for o in operands], [at[result] for result in equation.outvars])


def _by_whole_network(
    network: Network, params: PyTree, inputs: PyTree, numbers: Sequence[int], cotangent: Float[Array, "M ... C"]
) -> dict[int, Float[Array, "M ..."]]:
    """The derivatives with respect to some leaves by a backward pass through the network for each example."""
    leaves, structure = jax.tree.flatten(params)

    def one(example: PyTree, cotangent: Float[Array, "... C"]) -> list[Array]:
        def outputs(some: list[Array]) -> Float[Array, "... C"]:
            filled = list(leaves)
            for number, leaf in zip(numbers, some, strict=True):
                filled[number] = leaf
            return network(jax.tree.unflatten(structure, filled), examples(example, None))[0]

        return jax.vjp(outputs, [leaves[number] for number in numbers])[1](cotangent)[0]

    return dict(zip(numbers, jax.vmap(one)(inputs, cotangent), strict=True))
