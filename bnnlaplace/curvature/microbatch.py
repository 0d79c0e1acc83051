"""Data cut into equal microbatches, so that a scan over them compiles once and bounds the memory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Real, Shaped

from bnnlaplace.core.summation import Sum
from bnnlaplace.core.tree import examples, num_examples
from bnnlaplace.core.types import AnyArray
from bnnlaplace.model.batched import check_microbatch


class Microbatches(NamedTuple):
    """Examples in microbatches of equal size.

    Attributes
    ----------
    inputs
        An array (num, size, ...), or a pytree of such arrays.
    weights
        One weight for each example, or for each position of its outputs; zero for padding.
    points
        Where the likelihood's curvature is evaluated, if that is not at the outputs of the network.
    """

    inputs: PyTree[Shaped[Array, "num size ..."]]
    weights: Float[Array, "num size ..."]
    points: Float[Array, "num size ..."] | None = None

    def at(self, outputs: Float[Array, "size ..."]) -> Float[Array, "size ..."]:
        """Return the points of one microbatch, by default its outputs."""
        return outputs if self.points is None else self.points


def over_outputs(weights: Float[Array, "M ..."], outputs: Shaped[Array, "M ..."]) -> Float[Array, "M ..."]:
    """Shape the weights of M examples so that they multiply `outputs`, or any array with a row for each example.

    Weights of positions (M, T) multiply arrays (M, T, ...).
    """
    return weights.reshape(*weights.shape, *[1] * (outputs.ndim - weights.ndim))


def within_factor(
    weights: Float[Array, "M ..."],
    factor_mv: Callable[[Array, Array], Array],
    points: Float[Array, "M ..."] | None = None,
) -> tuple[Float[Array, " M"], Callable[[Array, Array], Array]]:
    """Move weights of positions into the likelihood's factor, so that what is left are weights of examples.

    If there are `points`, the factor that is returned is evaluated there, whatever outputs it is called with.

    An example has the largest weight of its positions, and so none if none of them counts. Weights of examples stay as
    they are.
    """
    if points is not None:
        at_outputs = factor_mv
        factor_mv = lambda outputs, column: at_outputs(points, column)  # noqa: E731
    if weights.ndim == 1:
        return weights, factor_mv
    of_examples = jnp.max(weights.reshape(len(weights), -1), axis=1)
    relative = jnp.sqrt(weights / over_outputs(jnp.where(of_examples > 0, of_examples, 1), weights))
    return of_examples, lambda outputs, column: factor_mv(outputs, over_outputs(relative, column) * column)


def summed(
    function: Callable[[Any], PyTree], parts: PyTree[Shaped[ArrayLike, "num ..."]], *, has_aux: bool = False
) -> PyTree:
    """Sum `function` over parts along the leading axis, one after another. Call it inside `jit`.

    The rounding of the sum does not grow with the number of parts. Memory: the sum three times, and what `function`
    takes for one part.

    Parameters
    ----------
    function
        A function from one part to a pytree of arrays.
    parts
        A pytree of arrays with leading axes of equal length, such as microbatches.
    has_aux
        Whether `function` returns a second pytree, which is not summed. The result then is the sum and the second
        pytrees of all parts, stacked along a new leading axis.
    """

    def with_aux(part: PyTree) -> tuple[PyTree, PyTree]:
        return function(part) if has_aux else (function(part), None)

    if len(jax.tree.leaves(parts)[0]) == 1:  # which needs no loop
        total, aux = with_aux(examples(parts, 0))
        return (total, jax.tree.map(lambda leaf: leaf[None], aux)) if has_aux else total
    shapes, _ = jax.eval_shape(with_aux, examples(parts, 0))
    joined, separated = _joining(shapes)
    # The sums start at zeros: to start at the first part would compile the function a second time.
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(joined, shapes))

    def plainly(total: PyTree, part: PyTree) -> tuple[PyTree, PyTree]:
        terms, aux = with_aux(part)
        return jax.tree.map(jnp.add, total, joined(terms)), aux

    def with_rounding(total: Sum, run: PyTree) -> tuple[Sum, PyTree]:
        terms, aux = jax.lax.scan(plainly, zeros, run)
        return total.plus(terms), aux

    total, aux = jax.lax.scan(with_rounding, Sum.zeros(zeros), jax.tree.map(_in_runs, parts))
    total = separated(total.value())
    return (total, jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), aux)) if has_aux else total


# Parts that are added up before the rounding of an addition is summed, too. That takes six more passes over the sum,
# and a sum of so few parts loses little.
_LONGEST_RUN = 8


def _in_runs(leaf: Shaped[AnyArray, "num ..."]) -> Shaped[AnyArray, "runs length ..."]:
    """Divide the leading axis into runs of equal length, as long as they may be."""
    number = len(leaf)
    length = max(length for length in range(1, _LONGEST_RUN + 1) if number % length == 0)
    return leaf.reshape(number // length, length, *leaf.shape[1:])


def _joining(shapes: PyTree[jax.ShapeDtypeStruct]) -> tuple[Callable[[PyTree], Any], Callable[[Any], PyTree]]:
    """Return a function that joins arrays of these shapes to one vector, and its inverse.

    The addition of one vector compiles several times as fast as that of many arrays. Few arrays stay as they are, as
    joining them is a copy.
    """
    leaves, structure = jax.tree.flatten(shapes)
    if len(leaves) <= 4 or len({leaf.dtype for leaf in leaves}) > 1:
        return (lambda tree: tree), (lambda tree: tree)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def joined(tree: PyTree) -> Float[Array, " n"]:
        vector = jnp.concatenate([leaf.reshape(-1) for leaf in jax.tree.leaves(tree)])
        # Fused into the addition, the concatenation would ask for each number in which array it is.
        return jax.lax.optimization_barrier(vector)

    def separated(vector: Float[Array, " n"]) -> PyTree:
        pieces = zip(jnp.split(vector, ends), leaves, strict=True)
        return jax.tree.unflatten(structure, [piece.reshape(leaf.shape) for piece, leaf in pieces])

    return joined, separated


def split(
    inputs: PyTree[Shaped[ArrayLike, "N ..."]],
    size: int,
    dtype: Any,
    weights: Real[ArrayLike, "N ..."] | None = None,
    points: Float[ArrayLike, "N ..."] | None = None,
) -> Microbatches:
    """Cut `inputs` into microbatches of at most `size` examples, as equal as possible.

    The last microbatch is padded with copies of the last example at weight zero, which change nothing. The number of
    microbatches is chosen first and their size follows from it, so that padding stays below one example a microbatch.
    They form runs of equal length, of up to eight: see `summed`.

    Parameters
    ----------
    inputs
        An array, or a pytree of arrays, with examples along the leading axis.
    size
        The largest number of examples in a microbatch.
    dtype
        The type of the weights.
    weights
        How many times each example counts, or each position of its outputs. By default all count once.
    points
        Where the curvature of the likelihood is evaluated; by default at the outputs.

    Raises
    ------
    ValueError
        If there are no examples, or `size` is below one.
    """
    count = num_examples(inputs)
    if count == 0:
        raise ValueError("curvature needs at least one example; got an empty batch; check the data")
    check_microbatch(size)
    num_runs = math.ceil(math.ceil(count / size) / _LONGEST_RUN)
    num = num_runs * math.ceil(math.ceil(count / size) / num_runs)
    size = math.ceil(count / num)
    # Padding repeats a real example: zeros could make a network return NaN, and NaN times weight zero is NaN.
    index = np.minimum(np.arange(num * size), count - 1).reshape(num, size)
    padded_weights = jnp.asarray((np.arange(num * size) < count).reshape(num, size), dtype)
    if weights is not None:
        weights = jnp.asarray(weights, dtype)[index]
        padded_weights = padded_weights.reshape(*index.shape, *[1] * (weights.ndim - 2)) * weights
    inputs, points = jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), (inputs, points))
    return Microbatches(inputs, padded_weights, points)
