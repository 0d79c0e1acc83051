"""Derivatives of the outputs of single examples, from one backward pass for all examples.

A zero is added to every array in which weights meet examples. The cotangent of that zero is the derivative with respect
to the array, example by example. From there to the weights leads a small function of one example, which needs no pass
through the network.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import product
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Shaped

from bnnlaplace.core.linalg import all_products, einsum
from bnnlaplace.core.tree import examples, summed_type
from bnnlaplace.curvature.direct import direct_leaves
from bnnlaplace.curvature.head import Head, head_layer
from bnnlaplace.curvature.layers import Entry, Layer, Weights, at_one_example, find
from bnnlaplace.curvature.layout import as_matrix
from bnnlaplace.model.jaxpr import run
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network


class Pass(NamedTuple):
    """A forward pass of M examples that can be differentiated.

    Attributes
    ----------
    weights
        How the leaves of the weights enter.
    outputs
        f(params, x_m). If the network is linearised, these are the outputs of the expansion, and all other attributes
        are those of the network at the centre of the expansion.
    layer_inputs
        For each leaf that is a layer: what its matrix multiplies at each of T positions of each example, in the order
        of the matrix's rows.
    gradients
        A function from cotangents of the outputs to a derivative for each leaf, example by example. If the leaf is a
        layer, it is the derivative with respect to the layer's outputs (M, T, O). For any other leaf it is the
        derivative with respect to the leaf itself (M, ...).
    direct
        The leaves whose derivatives are the cotangents themselves; see `bnnlaplace.curvature.direct`.
    head
        The last dense layer, if all other weights reach the outputs through it alone; see `bnnlaplace.curvature.head`.
    """

    weights: Weights
    outputs: Float[Array, "M ... C"]
    layer_inputs: dict[int, Float[Array, "M T I"]]
    gradients: Callable[[Float[Array, "M ... C"]], dict[int, Float[Array, "M ..."]]]
    direct: frozenset[int]
    head: Head | None = None


def forward(network: Network, params: PyTree, inputs: PyTree[Shaped[ArrayLike, "M ..."]]) -> Pass:
    """Run a network that is tapped where its weights enter.

    With a the inputs of a layer and g the derivative with respect to its outputs, the derivative of an example's output
    with respect to the layer's matrix is sum_t a_t g_t' over positions.

    Cost: a forward pass, and for each call of `gradients` a backward pass that stops at activations. Weights of
    `Weights.rest` take another forward and backward pass in each call. Memory: the activations of M examples, the
    patches of convolutions, and in each call M derivatives of the weights that are not layers.

    Parameters
    ----------
    network, params
        The network, and the weights at which it is run.
    inputs
        M examples.
    """
    if network.is_linearised:
        base = network.unlinearised()
        return forward(base, base.params, inputs)._replace(outputs=network(params, inputs))
    weights = find(network, inputs)
    jaxpr = weights.jaxpr
    known: dict[Var, Any] = dict(jaxpr.constants)
    leaves = jax.tree.leaves(params)
    for variables, tree in ((jaxpr.params, params), (jaxpr.frozen, network.frozen), (jaxpr.inputs, inputs)):
        known |= dict(zip(variables, jax.tree.leaves(tree), strict=True))
    entries = {entry.index: entry for entry in _all_entries(weights)}
    tapped_equations, taps = _tapped(jaxpr.equations, sorted(entries))
    saved = list(dict.fromkeys(_operands(jaxpr.equations, entries.values())))

    def tapped(zeros: list[Array]) -> tuple[Array, list[Any]]:
        given = known | dict(zip(taps, zeros, strict=True))
        with all_products():
            outputs, *values = run(jaxpr, tapped_equations, given, [*jaxpr.outputs, *saved])
        return outputs, values

    zeros = [jnp.zeros(tap.aval.shape, tap.aval.dtype) for tap in taps]
    outputs, pullback, values = jax.vjp(tapped, zeros, has_aux=True)
    value_of = known | dict(zip(saved, values, strict=True))
    entry_results = [result for index in sorted(entries) for result in jaxpr.equations[index].outvars]

    def by_leaf(derivatives_at_taps: list[Array]) -> dict[int, Float[Array, "M ..."]]:
        at = dict(zip(entry_results, derivatives_at_taps, strict=True))
        derivatives = {
            leaf: _as_columns(layer, jaxpr.equations[layer.entry.index], at) for leaf, layer in weights.layers.items()
        }
        for leaf, entries_of_leaf in weights.entries.items():
            summands = [_per_example(weights, leaf, entry, value_of, at) for entry in entries_of_leaf]
            # A leaf without any entry has no effect: its derivative is zero.
            zero = jnp.zeros((len(outputs), *leaves[leaf].shape), leaves[leaf].dtype)
            derivatives[leaf] = sum(summands, zero)
        return derivatives

    def in_summed_type(derivatives: dict[int, Array]) -> dict[int, Float[Array, "M ..."]]:
        return {leaf: derivatives[leaf].astype(summed_type(leaves[leaf].dtype)) for leaf in sorted(derivatives)}

    def gradients(cotangent: Float[Array, "M ... C"]) -> dict[int, Float[Array, "M ..."]]:
        with all_products():
            derivatives = by_leaf(pullback(cotangent)[0])
            if weights.rest:
                derivatives |= _by_whole_network(network, params, inputs, weights.rest, cotangent)
        return in_summed_type(derivatives)

    layer_inputs = {
        leaf: _as_rows(layer, jaxpr.equations[layer.entry.index], value_of).astype(summed_type(leaves[leaf].dtype))
        for leaf, layer in weights.layers.items()
    }
    direct = direct_leaves(weights)
    leaf = head_layer(weights, direct)
    if leaf is None:
        return Pass(weights, outputs, layer_inputs, gradients, direct)
    layer = weights.layers[leaf]

    def differentiate() -> Callable[[Float[Array, "M H"]], dict[int, Float[Array, "M ..."]]]:
        def features(zeros: list[Array]) -> Array:
            (operand, _), *_ = layer.entry.operands
            equation = jaxpr.equations[layer.entry.index]
            with all_products():
                given = known | dict(zip(taps, zeros, strict=True))
                (value,) = run(jaxpr, tapped_equations, given, [equation.invars[operand]])
            return _as_rows(layer, equation, {equation.invars[operand]: value})

        at, pullback_of_features = jax.vjp(features, zeros)

        def at_features(cotangent: Float[Array, "M H"]) -> dict[int, Float[Array, "M ..."]]:
            with all_products():
                derivatives = by_leaf(pullback_of_features(cotangent[:, None].astype(at.dtype))[0])
            return in_summed_type({leaf: derivatives[leaf] for leaf in derivatives if leaf not in direct})

        return at_features

    flat = jnp.asarray(leaves[leaf], summed_type(leaves[leaf].dtype)).reshape(-1)
    kernel = as_matrix(flat, layer.layout.segments)
    return Pass(weights, outputs, layer_inputs, gradients, direct, Head(kernel, differentiate))


def over_factor(
    passed: Pass,
    likelihood: Likelihood,
    factor_mv: Callable[[Float[Array, "M ... C"], Float[Array, "M ... C"]], Float[Array, "M ... C"]],
    points: Float[Array, "M ..."],
    function: Callable[[dict[int, Float[Array, "M ..."]]], PyTree],
) -> PyTree:
    """Sum `function` over the columns of a factor of the curvature of the outputs.

    It gets the derivatives of all leaves that are not direct along a column. If the network has a narrow head, the
    columns are those of a root of the curvature of its features.

    Parameters
    ----------
    passed
        The forward pass.
    likelihood, points
        The likelihood, and where its curvature is evaluated.
    factor_mv
        (outputs, u) -> B u, with the weights of positions in it.
    function
        A function from derivatives by leaf to a pytree.
    """
    if passed.head is None or not passed.head.is_narrow:
        return over_columns(
            lambda column: function(passed.gradients(factor_mv(passed.outputs, column))), passed.outputs
        )
    root, gradients = passed.head.root(likelihood, points), passed.head.differentiate()

    def along(column: Float[Array, "M H"]) -> PyTree:
        return function(gradients(einsum("mhk,mk->mh", root, column)))

    return over_columns(along, root[:, 0])


def over_columns(function: Callable[[Float[Array, "M ... C"]], PyTree], outputs: Float[Array, "M ... C"]) -> PyTree:
    """Sum `function` over the unit vectors of one example's outputs. Each is given for all examples at once.

    Parameters
    ----------
    function
        A function from a cotangent of the outputs to a pytree.
    outputs
        The outputs; only their shape and type are used.
    """

    def add(total: PyTree, number: Int[Array, ""]) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(_column(outputs, number))), None

    # A plain sum: there are few outputs beside the examples, over which the rounding is carried along.
    numbers = jnp.arange(math.prod(outputs.shape[1:]))
    shapes = jax.eval_shape(lambda number: function(_column(outputs, number)), numbers[0])
    return jax.lax.scan(add, jax.tree.map(jnp.zeros_like, shapes), numbers)[0]


def at_columns(
    function: Callable[[Float[Array, "M ... C"]], PyTree],
    outputs: Float[Array, "M ... C"],
    numbers: Int[ArrayLike, " K"],
    at_once: int | None = None,
) -> PyTree:
    """Apply `function` to some unit vectors of one example's outputs. Each is given for all examples at once.

    Parameters
    ----------
    function
        A function from a cotangent of the outputs to a pytree. Its results are stacked along a leading axis.
    outputs
        The outputs; only their shape and type are used.
    numbers
        Which unit vectors. A number past the last output stands for a zero vector.
    at_once
        How many go through `function` together; by default all.
    """

    def at_column(number: Int[Array, ""]) -> PyTree:
        return function(_column(outputs, number))

    if at_once is None or at_once >= len(numbers):
        return jax.vmap(at_column)(jnp.asarray(numbers))
    at_once = math.ceil(len(numbers) / math.ceil(len(numbers) / at_once))  # groups as equal as possible
    return lax.map(at_column, jnp.asarray(numbers), batch_size=at_once)


def _column(outputs: Float[Array, "M ... C"], number: Int[Array, ""]) -> Float[Array, "M ... C"]:
    shape = outputs.shape[1:]
    column = jax.nn.one_hot(number, math.prod(shape), dtype=outputs.dtype).reshape(shape)
    return jnp.broadcast_to(column, outputs.shape)


def _all_entries(weights: Weights) -> list[Entry]:
    return [layer.entry for layer in weights.layers.values()] + [
        entry for entries in weights.entries.values() for entry in entries
    ]


def _operands(equations: Sequence[JaxprEqn], entries: Iterable[Entry]) -> list[Var]:
    """The operands of entries that are arrays of examples."""
    return [equations[entry.index].invars[index] for entry in entries for index, _ in entry.operands]


def _tapped(equations: Sequence[JaxprEqn], entries: Sequence[int]) -> tuple[list[JaxprEqn], list[Var]]:
    """Add a new variable, the tap, to every result of the entries. Return the new equations, and the taps in order."""
    changed, taps = list(equations), []
    # From the last entry to the first one, so that insertions do not move the entries that are still to come.
    for index in reversed(entries):
        equation = equations[index]
        untapped = [Var(result.aval) for result in equation.outvars]
        new_taps = [Var(result.aval) for result in equation.outvars]
        additions = [
            equation.replace(primitive=lax.add_p, params={}, invars=[before, tap], outvars=[after])
            for before, tap, after in zip(untapped, new_taps, equation.outvars, strict=True)
        ]
        changed[index : index + 1] = [equation.replace(outvars=untapped), *additions]
        taps = new_taps + taps
    return changed, taps


# --- layers -----------------------------------------------------------------------------------------------------


def _as_columns(layer: Layer, equation: JaxprEqn, at: dict[Var, Any]) -> Float[Array, "M T O"]:
    """Arrange the derivatives with respect to a layer's outputs by examples, positions, and columns of its matrix."""
    derivative, (axis,) = at[equation.outvars[0]], layer.entry.axes
    if equation.primitive.name == "conv_general_dilated":
        columns = [equation.params["dimension_numbers"].out_spec[1]]
    else:
        # In the result of a product, the axes of the left operand come first.
        count, other = (_count_free(equation, side) for side in (layer.kernel, 1 - layer.kernel))
        columns = range(count) if layer.kernel == 0 else range(other, other + count)
    matrix = _three_axes(derivative, axis, list(columns))
    return layer.layout.columns(matrix)


def _as_rows(layer: Layer, equation: JaxprEqn, value_of: dict[Var, Any]) -> Float[Array, "M T I"]:
    """Arrange what a layer multiplies by examples, positions, and rows of its matrix."""
    ((index, axis),) = layer.entry.operands
    array = value_of[equation.invars[index]]
    if equation.primitive.name == "conv_general_dilated":
        matrix = _patches(array, equation)
    else:
        matrix = _three_axes(array, axis, list(equation.params["dimension_numbers"][0][index]))
    return layer.layout.rows(matrix)


def _count_free(equation: JaxprEqn, side: int) -> int:
    """Number of axes of an operand that a product does not sum over."""
    return len(equation.invars[side].aval.shape) - len(equation.params["dimension_numbers"][0][side])


def _three_axes(array: Shaped[ArrayLike, "..."], example: int, last: list[int]) -> Shaped[Array, "M T D"]:
    """Bring the axis of examples first, then join all others to one, and those of `last` to one behind it."""
    middle = [axis for axis in range(array.ndim) if axis != example and axis not in last]
    sizes = (math.prod(array.shape[axis] for axis in axes) for axes in ([example], middle, last))
    return jnp.transpose(array, (example, *middle, *last)).reshape(*sizes)


def _patches(images: Shaped[ArrayLike, "..."], equation: JaxprEqn) -> Shaped[Array, "M T I"]:
    """Cut out the window of a convolution at each position of its output, with input channels slowest."""
    params, dimensions = equation.params, equation.params["dimension_numbers"]
    images = jnp.transpose(images, dimensions.lhs_spec)  # examples, channels, then space
    result, kernel = equation.outvars[0].aval.shape, equation.invars[1].aval.shape
    extent = [result[axis] for axis in dimensions.out_spec[2:]]
    window = [kernel[axis] for axis in dimensions.rhs_spec[2:]]
    margins = [(low, high, gap - 1) for (low, high), gap in zip(params["padding"], params["lhs_dilation"], strict=True)]
    padded = lax.pad(images, jnp.zeros((), images.dtype), [(0, 0, 0), (0, 0, 0), *margins])
    strides = params["window_strides"]

    # A slice for each place in the window. Slices only move numbers; a convolution with unit vectors would multiply.
    def at_place(place: tuple[int, ...]) -> Array:
        first = [offset * apart for offset, apart in zip(place, params["rhs_dilation"], strict=True)]
        last = [f + (size - 1) * stride + 1 for f, size, stride in zip(first, extent, strides, strict=True)]
        return lax.slice(padded, (0, 0, *first), (*padded.shape[:2], *last), (1, 1, *strides))

    windows = jnp.stack([at_place(place) for place in product(*map(range, window))], axis=2)
    count, channels = images.shape[:2]
    rows = windows.reshape(count, channels * math.prod(window), math.prod(extent))
    return jnp.swapaxes(rows, 1, 2)


# --- other weights ----------------------------------------------------------------------------------------------


def _per_example(
    weights: Weights, leaf: int, entry: Entry, value_of: dict[Var, Any], at: dict[Var, Any]
) -> Float[Array, "M ..."]:
    """Differentiate each example's outputs with respect to a weight, through one of its entries."""
    jaxpr = weights.jaxpr
    equation = jaxpr.equations[entry.index]
    before = [jaxpr.equations[index] for index in entry.before]
    atoms = [atom for step in (*before, equation) for atom in step.invars]
    read = dict.fromkeys(atom for atom in atoms if not isinstance(atom, Literal))
    operands = [equation.invars[index] for index, _ in entry.operands]
    known = {variable: value_of[variable] for variable in read if variable in value_of and variable not in operands}
    weight = jaxpr.params[leaf]

    def example_gradients(values: list[Array], cotangents: list[Array]) -> Array:
        # Batches of one example, because the equation expects an axis of examples.
        expanded = [jnp.expand_dims(value, axis) for value, (_, axis) in zip(values, entry.operands, strict=True)]

        def results(value: Array) -> list[Array]:
            given = known | dict(zip(operands, expanded, strict=True)) | {weight: value}
            return run(jaxpr, [*before, at_one_example(equation, entry.axes)], given, equation.outvars)

        _, pullback = jax.vjp(results, value_of[weight])
        with_axes = zip(cotangents, entry.axes, strict=True)
        return pullback([jnp.expand_dims(cotangent, axis) for cotangent, axis in with_axes])[0]

    axes = [axis for _, axis in entry.operands], list(entry.axes)
    values, cotangents = [value_of[operand] for operand in operands], [at[result] for result in equation.outvars]
    return jax.vmap(example_gradients, in_axes=axes)(values, cotangents)


def _by_whole_network(
    network: Network, params: PyTree, inputs: PyTree, numbers: Sequence[int], cotangent: Float[Array, "M ... C"]
) -> dict[int, Float[Array, "M ..."]]:
    """Differentiate with respect to some leaves by a backward pass through the network for each example."""
    leaves, structure = jax.tree.flatten(params)

    def example_gradients(example: PyTree, cotangent: Float[Array, "... C"]) -> list[Array]:
        def outputs(some: list[Array]) -> Float[Array, "... C"]:
            filled = list(leaves)
            for number, leaf in zip(numbers, some, strict=True):
                filled[number] = leaf
            return network(jax.tree.unflatten(structure, filled), examples(example, None))[0]

        return jax.vjp(outputs, [leaves[number] for number in numbers])[1](cotangent)[0]

    return dict(zip(numbers, jax.vmap(example_gradients)(inputs, cotangent), strict=True))
