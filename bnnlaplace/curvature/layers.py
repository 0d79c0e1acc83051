"""Where weights meet examples in a forward pass, and which of these meetings are matrix products.

Tracing a network with two and with three examples tells which of its arrays belong to single examples, and along which
axis: the one whose length follows the number of examples. Everything that does not is computed from weights alone. The
equations in which the two meet are the *entries* of the weights: a product of matrices, the addition of a bias, a
depthwise convolution. An entry whose output is disturbed shows how every output of the network depends on the weights
that enter there (`tapped.py`), so nothing else of the forward pass need be known.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, Float, PyTree

from bnnlaplace.curvature.layout import Layout, find_layout
from bnnlaplace.model.jaxpr import Equations, trace
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Shapes


class Entry(NamedTuple):
    """An equation in which weights meet arrays of examples.

    Attributes
    ----------
    step
        Its position among the equations.
    before
        Positions of the equations that prepare its weights, such as the reshaping of a bias.
    operands
        Of the operands that belong to examples: (which operand, its axis of examples).
    axes
        The axis of examples of each result.
    """

    step: int
    before: tuple[int, ...]
    operands: tuple[tuple[int, int], ...]
    axes: tuple[int, ...]


class Layer(NamedTuple):
    """The one entry of a weight that is a matrix product or a convolution of it with arrays of examples.

    Attributes
    ----------
    entry
        That entry.
    kernel
        Which of the two operands is made of the weight.
    layout
        How the numbers of the weight form a matrix from inputs to outputs.
    positions
        How often the matrix is applied to one example: once for each pixel of an image, say.
    """

    entry: Entry
    kernel: int
    layout: Layout
    positions: int


class Weights(NamedTuple):
    """How each leaf of `network.params` enters, by its number in the order of `jax.tree.leaves`.

    Attributes
    ----------
    layers
        The leaves that enter once, as the matrix of a linear map.
    entries
        The others, and all their entries.
    rest
        Those whose entries cannot be told apart by examples: weights of loops and of functions with derivatives of
        their own, and weights that enter where examples and positions share an axis.
    equations
        The forward pass of as many examples as `find` was given.
    """

    layers: dict[int, Layer]
    entries: dict[int, tuple[Entry, ...]]
    rest: tuple[int, ...]
    equations: Equations


def find(network: Network, inputs: PyTree[Float[Array, "N ..."]]) -> Weights:
    """Find how the weights enter a forward pass of `inputs`, of which shape and dtype are used alone.

    Dense layers are found by any name and in any module: products of matrices in which the weight is one operand, on
    either side, possibly reshaped and transposed before, with examples along any axis of the other one. So are
    convolutions without groups. Grouped ones, biases, scales, weights that enter twice and operations that JAX does not
    know are entries.

    Cost: three traces of the forward pass, and no arithmetic.

    Parameters
    ----------
    network
        Whose `params` are looked for; of a linearised one the entries are those of the network that was expanded.
    inputs
        Examples along the leading axis.
    """
    network = network.unlinearised()
    example = Shapes.of_example(inputs)
    small, large = (trace(network, example.batch(count)) for count in (2, 3))
    equations = trace(network, Shapes.of(inputs).arrays())
    count = len(equations.params)
    if not (_same_steps(small, large) and _same_steps(small, equations)):
        return Weights({}, {}, tuple(range(count)), equations)
    axes = _example_axes(small, large)
    depends = _dependence(small)
    layers: dict[int, Layer] = {}
    entries: dict[int, tuple[Entry, ...]] = {}
    for leaf in range(count):
        found = _entries_of(leaf, small, axes, depends)
        if found is None:
            continue
        layer = _as_layer(small, leaf, found, axes)
        if layer is None:
            entries[leaf] = found
        else:
            layers[leaf] = layer
    rest = tuple(leaf for leaf in range(count) if leaf not in layers and leaf not in entries)
    return Weights(layers, entries, rest, equations)


def at_one_example(equation: JaxprEqn, axes: Sequence[int]) -> JaxprEqn:
    """The equation for a single example, where the number of examples is written into it.

    Parameters
    ----------
    equation
        One of an `Entry`.
    axes
        The axis of examples of each of its results.
    """
    if equation.primitive.name != "broadcast_in_dim":
        return equation
    shape = list(equation.params["shape"])
    shape[axes[0]] = 1
    return equation.replace(params={**equation.params, "shape": tuple(shape)})


def convolved_axes(equation: JaxprEqn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which axes of a convolution's kernel are summed over, input channels first, and which one is left.

    Parameters
    ----------
    equation
        The convolution.
    """
    out_channels, in_channels, *window = equation.params["dimension_numbers"].rhs_spec
    return (in_channels, *window), (out_channels,)


# Examples -------------------------------------------------------------------------------------------------------------

# The axis of examples of a variable; STATIC where its shape does not depend on their number, MIXED where it does in
# any other way than by one axis of just that length.
STATIC, MIXED = -1, -2


def _same_steps(one: Equations, other: Equations) -> bool:
    return [e.primitive.name for e in one.steps] == [e.primitive.name for e in other.steps]


def _variables(equations: Equations) -> Iterable[Var]:
    yield from (*equations.params, *equations.frozen, *equations.inputs, *equations.constants)
    for equation in equations.steps:
        yield from equation.outvars


def _example_axes(small: Equations, large: Equations) -> dict[Var, int]:
    """The axis of examples of every variable of `small`, from the shapes with two and with three examples."""
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


def _dependence(equations: Equations) -> dict[Var, frozenset[int]]:
    """The leaves of the weights that a variable is computed from without any array of examples; inputs count as -1."""
    depends = {variable: frozenset([leaf]) for leaf, variable in enumerate(equations.params)}
    depends |= dict.fromkeys(equations.inputs, frozenset([-1]))
    for equation in equations.steps:
        joined = frozenset().union(*(depends.get(atom, frozenset()) for atom in _taken(equation)))
        depends |= dict.fromkeys(equation.outvars, joined)
    return depends


def _taken(equation: JaxprEqn) -> list[Var]:
    return [atom for atom in equation.invars if not isinstance(atom, Literal)]


def _static(equation: JaxprEqn, operands: Sequence[tuple[int, int]]) -> list[Var]:
    """What an entry takes besides arrays of examples."""
    of_examples = [index for index, _ in operands]
    invars = [atom for index, atom in enumerate(equation.invars) if index not in of_examples]
    return [atom for atom in invars if not isinstance(atom, Literal)]


def _sees_inputs(variables: list[Var], depends: dict[Var, frozenset[int]]) -> bool:
    """Whether the inputs of all examples together are in what should belong to weights alone."""
    return any(-1 in depends.get(variable, ()) for variable in variables)


# Entries --------------------------------------------------------------------------------------------------------------


def _entries_of(
    leaf: int, equations: Equations, axes: dict[Var, int], depends: dict[Var, frozenset[int]]
) -> tuple[Entry, ...] | None:
    """All entries of a leaf; None where one of them, or the way to it, is not understood."""
    alone = {equations.params[leaf]}  # what is computed from this leaf, other weights perhaps, and no example
    entries: list[Entry] = []
    for step, equation in enumerate(equations.steps):
        if not alone.intersection(_taken(equation)):
            continue
        if all(axes[result] == STATIC for result in equation.outvars):
            if _sees_inputs(_taken(equation), depends):
                return None
            alone.update(equation.outvars)
            continue
        entry = _entry(step, equations, axes)
        if entry is None or _sees_inputs(_static(equation, entry.operands), depends):
            return None
        entries.append(entry)
    if alone.intersection(atom for atom in equations.outputs if not isinstance(atom, Literal)):
        return None
    return tuple(entries)


def _entry(step: int, equations: Equations, axes: dict[Var, int]) -> Entry | None:
    """The equation as an entry, if it can be evaluated for one example alone."""
    equation = equations.steps[step]
    found = [axes[result] for result in equation.outvars]
    operands = [
        (index, axes[atom])
        for index, atom in enumerate(equation.invars)
        if not isinstance(atom, Literal) and axes[atom] != STATIC
    ]
    if min(found) < 0 or any(axis < 0 for _, axis in operands) or _has_inner_program(equation):
        return None
    if not all(jnp.issubdtype(result.aval.dtype, jnp.floating) for result in equation.outvars):
        return None
    entry = Entry(step, _steps_before(step, equations, operands), tuple(operands), tuple(found))
    return entry if _works_alone(equation, entry) else None


def _has_inner_program(equation: JaxprEqn) -> bool:
    """Whether it is a loop or a call, into which the number of examples may be written."""
    parts = jax.tree.leaves(equation.params, is_leaf=lambda part: hasattr(part, "eqns") or hasattr(part, "jaxpr"))
    return any(hasattr(part, "eqns") or hasattr(part, "jaxpr") or callable(part) for part in parts)


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
        found = [result.shape for result in jax.eval_shape(bind, *shapes)]
    except Exception:  # whatever the rule of an unknown operation objects with
        return False
    pairs = zip(equation.outvars, entry.axes, strict=True)
    return found == [_with_length(result.aval.shape, axis, 1) for result, axis in pairs]


def _with_length(shape: tuple[int, ...], axis: int, length: int) -> tuple[int, ...]:
    return (*shape[:axis], length, *shape[axis + 1 :])


def _steps_before(step: int, equations: Equations, operands: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """The equations that compute what a step takes besides arrays of examples."""
    wanted = set(_static(equations.steps[step], operands))
    before = []
    for index in range(step - 1, -1, -1):
        equation = equations.steps[index]
        if wanted.intersection(equation.outvars):
            before.append(index)
            wanted.update(_taken(equation))
    return tuple(reversed(before))


# Layers ---------------------------------------------------------------------------------------------------------------


def _as_layer(equations: Equations, leaf: int, entries: tuple[Entry, ...], axes: dict[Var, int]) -> Layer | None:
    """The layer that a leaf with one entry is the matrix of, if it is one."""
    if len(entries) != 1 or len(entries[0].operands) != 1:
        return None
    entry = entries[0]
    equation = equations.steps[entry.step]
    kernel = 1 - entry.operands[0][0]
    summed = _summed_axes(equation, kernel, entry)
    if summed is None:
        return None
    atom = equation.invars[kernel]
    layout = find_layout(equations.params[leaf], atom, [equations.steps[index] for index in entry.before], *summed)
    if layout is None:
        return None
    (result,) = equation.outvars
    columns = math.prod(atom.aval.shape[axis] for axis in summed[1])
    return Layer(entry, kernel, layout, math.prod(result.aval.shape) // (2 * columns))


def _summed_axes(equation: JaxprEqn, kernel: int, entry: Entry) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Which axes of the kernel a product sums over, and which are left; None where it is no layer."""
    if equation.primitive.name == "dot_general":
        contracted, batched = equation.params["dimension_numbers"]
        if any(batched) or entry.operands[0][1] in contracted[1 - kernel]:
            return None
        rest = (axis for axis in range(len(equation.invars[kernel].aval.shape)) if axis not in contracted[kernel])
        return tuple(contracted[kernel]), tuple(rest)
    if equation.primitive.name == "conv_general_dilated":
        dimensions, params = equation.params["dimension_numbers"], equation.params
        grouped = params["feature_group_count"] != 1 or params["batch_group_count"] != 1
        if grouped or kernel != 1 or entry.operands[0][1] != dimensions.lhs_spec[0]:
            return None
        return convolved_axes(equation)
    return None
