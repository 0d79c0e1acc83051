"""Whether rows of the Jacobian are kept in memory for later products, and how they are formed."""

import math
from functools import lru_cache, partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, Int, PyTree

from bnnlaplace.core import memory
from bnnlaplace.core.tree import num_examples, number_type, ravel, size
from bnnlaplace.core.types import Inputs
from bnnlaplace.curvature.kept import KeptRows
from bnnlaplace.curvature.rows import (
    FORWARD_DERIVATIVES,
    RowSizes,
    are_smaller,
    in_parts,
    row_sizes,
    sizes_in_memory,
)
from bnnlaplace.model.batched import outputs
from bnnlaplace.model.data import Data
from bnnlaplace.model.jaxpr import multiplications_of_convolutions
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec, output_shape

# The part of the free memory that rows may take.
SHARE_OF_MEMORY = 1 / 4
# A multiplication within a derivative of a convolution takes as long as at least this many in a product of matrices.
CONVOLUTION_COST = 10


def keep(network: Network, data: Data, *, num_products: int, microbatch: int, bytes_beside: int = 0) -> KeptRows | None:
    """Form the rows of a network, and keep them, if `num_products` products take longer without them.

    None if they would not pay, or take more than a part of the free memory. Cost: a pass over the data with a backward
    pass for each output. Each shape of a batch is compiled once.

    Parameters
    ----------
    network
        The network, linearised or not.
    data
        The data. Their number must be known, as it is after a pass.
    num_products
        How many products with the GGN are expected, counted one by one.
    microbatch
        The largest number of inputs that are differentiated at a time.
    bytes_beside
        Memory that must be left free.
    """
    expansion = network.unlinearised()
    dtype = number_type(expansion.params)
    if _has_short_numbers(expansion) or not _shorten_products(NetworkSpec.of(expansion, data.first)):
        return None
    sizes = sizes_in_memory(expansion, data.first, microbatch)
    if sizes is None or not _pay(sizes, num_products):
        return None
    free, needed = memory.free_bytes(), data.num_examples * sizes.outputs * size(expansion.params) * dtype.itemsize
    if free is None or needed > min(SHARE_OF_MEMORY * free, free - bytes_beside):
        return None
    batches, at = [], []
    for batch in data:
        batches.append(_kept(expansion, sizes, batch.inputs))
        at.append(outputs(expansion, batch.inputs, microbatch=microbatch))
    return KeptRows(tuple(batches), output_shape(expansion, data.first), ravel(expansion.params), tuple(at))


def wide_row_sizes(network: Network, inputs: PyTree, microbatch: int) -> RowSizes | None:
    """Choose the sizes of rows that are not kept; None too if they would have fewer bits than float32."""
    return None if _has_short_numbers(network) else row_sizes(network, inputs, microbatch)


def _has_short_numbers(network: Network) -> bool:
    """Whether rows of this network would be rounded to fewer bits than float32 has."""
    return jnp.finfo(number_type(network.params)).bits < 32


@lru_cache(maxsize=64)
def _shorten_products(spec: NetworkSpec) -> bool:
    """Whether a product of a vector with rows takes less time than its derivatives.

    A product with rows takes two multiplications for each output and weight. The forward and the backward derivative
    take four for each multiplication of the network; those of its convolutions take the longest.
    """
    if are_smaller(spec):
        return True
    num_outputs = math.prod(output_shape(spec.network(), spec.example.batch(1)))
    num_weights = size(spec.network().params)
    return num_outputs * num_weights < 2 * CONVOLUTION_COST * multiplications_of_convolutions(spec)


def _pay(sizes: RowSizes, num_products: int) -> bool:
    """Whether rows cost less than products, which take a forward and a backward pass for each vector."""
    return (1 + FORWARD_DERIVATIVES) * num_products > FORWARD_DERIVATIVES * sizes.outputs


def _kept(network: Network, sizes: RowSizes, inputs: Inputs) -> Float[Array, "num K m P"]:
    """Differentiate all outputs of a batch, a microbatch at a time, by the program that predictions use, too."""
    buffer = None
    for number, (index, rows) in enumerate(in_parts(network, inputs, sizes)):
        if buffer is None:
            count = -(-num_examples(inputs) // len(index))
            buffer = jnp.zeros((count, sizes.outputs, *rows.shape[2:]), rows.dtype)
        buffer = _with_part(buffer, rows, number)
    return buffer


@partial(jax.jit, donate_argnums=0)  # written in place: there is never a second copy of all rows
def _with_part(
    buffer: Float[Array, "num K m P"], rows: Float[Array, "U C m P"], number: Int[ArrayLike, ""]
) -> Float[Array, "num K m P"]:
    return jax.lax.dynamic_update_index_in_dim(buffer, rows.reshape(buffer.shape[1:]), number, 0)
