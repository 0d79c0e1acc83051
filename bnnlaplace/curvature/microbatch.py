"""Data cut into equal microbatches, so that a scan over them compiles once and bounds memory."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import examples, num_examples


class Microbatches(NamedTuple):
    """Examples in microbatches of equal size.

    Attributes
    ----------
    inputs
        (num, size, ...), or a pytree of such arrays.
    weights
        One for each example; zero for padding.
    """

    inputs: PyTree[Float[Array, "num size ..."]]
    weights: Float[Array, "num size"]


def over_outputs(weights: Float[Array, " M"], outputs: Float[Array, "M ..."]) -> Float[Array, "M ..."]:
    """Weights of examples, shaped so that they multiply outputs or what is computed from each of them.

    Parameters
    ----------
    weights
        One for each of M examples.
    outputs
        Whose number of dimensions the result is to have.
    """
    return weights.reshape(-1, *[1] * (outputs.ndim - 1))


def summed(function: Callable[[Any], PyTree], parts: PyTree[Float[Array, "num ..."]]) -> PyTree:
    """The sum of `function` over parts along the leading axis, one after another. Call it inside `jit`.

    Memory: the sum, and what `function` takes for one part.

    Parameters
    ----------
    function
        One part -> a pytree of arrays.
    parts
        A pytree of arrays, of equal length along the leading axis; microbatches, for instance.
    """

    def add(total: PyTree, part: Any) -> tuple[PyTree, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    shapes = jax.eval_shape(function, examples(parts, 0))
    return jax.lax.scan(add, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes), parts)[0]


def split(
    inputs: PyTree[Float[Array, "N ..."]], size: int, dtype: jnp.dtype, weights: Float[Array, " N"] | None = None
) -> Microbatches:
    """Cut `inputs` into microbatches of at most `size` examples, as equal as they can be.

    The last one is padded with copies of the last example, at weight zero: they cost time and change nothing. The
    number of microbatches is fixed first and the size follows, so that padding stays below one example a microbatch.

    Parameters
    ----------
    inputs
        An array, or a pytree of arrays, with examples along the leading axis.
    size
        The largest number of examples in a microbatch.
    dtype
        Of the weights.
    weights
        Of the examples: one, or zero for those that do not count; by default all ones.

    Raises
    ------
    ValueError
        If there are no examples, or `size` is below one.
    """
    count = num_examples(inputs)
    if count == 0:
        raise ValueError("curvature needs at least one example; got an empty batch; check the data")
    if size < 1:
        raise ValueError(f"microbatch=... must be at least 1; got {size}; try 128")
    num = math.ceil(count / size)
    size = math.ceil(count / num)
    index = np.minimum(np.arange(num * size), count - 1).reshape(num, size)
    counted = jnp.asarray((np.arange(num * size) < count).reshape(num, size), dtype)
    if weights is not None:
        counted = counted * jnp.asarray(weights, dtype)[index]
    return Microbatches(jax.tree.map(lambda leaf: jnp.take(leaf, index, axis=0), inputs), counted)
