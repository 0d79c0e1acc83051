"""Data cut into equal microbatches, so that a scan over them compiles once and bounds memory."""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


class Microbatches(NamedTuple):
    """Inputs of shape (num, size, ...) and a weight per example: one, or zero for the padding of the last batch."""

    inputs: Float[Array, "num size ..."]
    weights: Float[Array, "num size"]


def over_outputs(weights: Float[Array, " M"], outputs: Float[Array, "M ..."]) -> Float[Array, "M ..."]:
    """Weights of examples, shaped so that they multiply outputs or what is computed from each of them."""
    return weights.reshape(-1, *[1] * (outputs.ndim - 1))


def split(inputs: Float[Array, "N ..."], size: int, dtype: jnp.dtype) -> Microbatches:
    """Cut `inputs` into microbatches of at most `size` examples, as equal as they can be.

    The last one is padded with copies of the last example, at weight zero: they cost time and change nothing. The
    number of microbatches is fixed first and the size follows, so that padding stays below one example a microbatch.

    Raises
    ------
    ValueError
        If there are no examples, or `size` is below one.
    """
    count = inputs.shape[0]
    if count == 0:
        raise ValueError("curvature needs at least one example; got an empty batch; check the data")
    if size < 1:
        raise ValueError(f"microbatch=... must be at least 1; got {size}; try 128")
    num = math.ceil(count / size)
    size = math.ceil(count / num)
    index = np.minimum(np.arange(num * size), count - 1).reshape(num, size)
    weights = (np.arange(num * size) < count).reshape(num, size)
    return Microbatches(jnp.take(inputs, index, axis=0), jnp.asarray(weights, dtype))
