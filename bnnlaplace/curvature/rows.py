"""The Jacobian of convolutional networks, formed once for a few inputs and read by all that ask for it.

Weights that multiply at many positions have no factors of a Jacobian worth keeping: its rows, sums over positions, are
smaller. They cost a backward pass for each output, about as much as two forward derivatives. Then a derivative along a
direction is an inner product, where a forward derivative costs all positions again. So covariances, samples of several
posteriors and whole Krylov bases are read from one set of rows, if there are enough of them and rows fit in memory.

Rows are the result of a program of their own. What reads them is another, which compiles in a second. So any number of
precisions, of directions or of posteriors shares the program that takes long to compile.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree, Shaped

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import num_examples, number_type, size
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.curvature import tapped
from bnnlaplace.curvature.layers import find
from bnnlaplace.model.jaxpr import numbers_of_example
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec, Shapes, output_shape

# Bytes of rows in memory.
ROW_BYTES = 2**29
# Activations of the passes that run together: on CPU few enough for a cache. Passes of other outputs follow.
PASS_BYTES, CPU_PASS_BYTES = 2**28, 2**23
# Fewer inputs leave the lanes of a vector empty where examples are the innermost axis. On CPU more only need memory.
FEW_ROW_INPUTS, CPU_ROW_INPUTS = 4, 16
# A backward pass with the derivatives in all weights takes about as long as this many forward derivatives.
FORWARD_DERIVATIVES = 2

# A function of the rows of all K outputs of m inputs, in U groups of C outputs.
Reader = Callable[[Float[Array, "U C m P"]], Float[Array, "k m ..."]]


class RowSizes(NamedTuple):
    """How many inputs are differentiated at a time, at how many outputs, in how many passes together."""

    inputs: int
    outputs: int
    unit: int
    passes: int


def row_sizes(network: Network, inputs: PyTree, microbatch: int, *, unit: int | None = None) -> RowSizes | None:
    """Choose the sizes for reading rows that are not kept. None if they do not pay, or need too much memory.

    They pay if most weights multiply at several positions. Other weights have factors that are smaller than rows.

    Parameters
    ----------
    network, inputs
        The network, and inputs of which only shape and type are used.
    microbatch
        The largest number of inputs at a time.
    unit
        The number of outputs in a group, by default those of one position.
    """
    if not are_smaller(NetworkSpec.of(network, inputs)):
        return None
    return sizes_in_memory(network, inputs, microbatch, unit=unit)


def sizes_in_memory(network: Network, inputs: PyTree, microbatch: int, *, unit: int | None = None) -> RowSizes | None:
    """Choose the sizes of rows by the memory alone; None if rows of a few inputs do not fit."""
    spec, shape = NetworkSpec.of(network, inputs), output_shape(network, inputs)[1:]
    number_bytes, num_outputs = number_type(network.params).itemsize, math.prod(shape)
    pass_bytes = number_bytes * numbers_of_example(spec)
    input_bytes = number_bytes * num_outputs * size(network.params) + pass_bytes
    is_cpu = jax.default_backend() == "cpu"
    most = min(microbatch, CPU_ROW_INPUTS) if is_cpu else microbatch
    count = min(most, ROW_BYTES // input_bytes)
    if count < min(most, FEW_ROW_INPUTS):
        return None
    passes = max(1, min(num_outputs, (CPU_PASS_BYTES if is_cpu else PASS_BYTES) // (count * pass_bytes)))
    return RowSizes(count, num_outputs, shape[-1] if unit is None else unit, passes)


@lru_cache(maxsize=64)
def are_smaller(spec: NetworkSpec) -> bool:
    """Whether rows are smaller than what they are made of.

    They are if some layer has several positions, and most weights belong to no layer that has a single one.
    """
    weights = find(spec.network(), spec.example.batch(2))
    counts = [math.prod(variable.aval.shape) for variable in weights.jaxpr.params]
    single = sum(counts[leaf] for leaf, layer in weights.layers.items() if layer.positions == 1)
    return any(layer.positions > 1 for layer in weights.layers.values()) and 2 * single <= sum(counts)


def directions_pay(sizes: RowSizes, num_directions: int) -> bool:
    """Whether rows cost less than forward derivatives along so many directions."""
    return num_directions > FORWARD_DERIVATIVES * sizes.outputs


def read(network: Network, inputs: Inputs, sizes: RowSizes, readers: Sequence[Reader]) -> list[Float[Array, "k B ..."]]:
    """Form the rows of all outputs, `sizes.inputs` inputs at a time, and give them to each reader.

    Readers get groups of `sizes.unit` outputs. Cost: a backward pass for each input and output, whatever the number of
    readers.
    """
    total = num_examples(inputs)
    if total == 0:
        one = jax.eval_shape(partial(rows_of, network, sizes), Shapes.of_example(inputs).batch(1))
        abstract = [jax.eval_shape(reader, one) for reader in readers]
        return [jnp.zeros((result.shape[0], 0, *result.shape[2:]), result.dtype) for result in abstract]
    results = [[] for _ in readers]
    for _, rows in in_parts(network, inputs, sizes):
        for parts, reader in zip(results, readers, strict=True):
            parts.append(reader(rows))
        # Otherwise the rows of many batches would wait in memory for their readers.
        jax.block_until_ready([parts[-1] for parts in results])
    return [jnp.concatenate(parts, axis=1)[:, :total] for parts in results]


def in_parts(
    network: Network, inputs: Inputs, sizes: RowSizes
) -> Iterator[tuple[Int[np.ndarray, " m"], Float[Array, "U C m P"]]]:
    """Yield the rows of a few inputs at a time, with the numbers of the inputs. The last part may repeat an input."""
    total = num_examples(inputs)
    count = min(sizes.inputs, total)
    for start in range(0, total, count):
        index = np.minimum(np.arange(start, start + count), total - 1)
        rows = rows_of(network, sizes, jax.tree.map(lambda leaf, index=index: leaf[index], inputs))
        yield index, jax.block_until_ready(rows)  # or those of all parts would wait in memory


@partial(jax.jit, static_argnums=1)
def rows_of(network: Network, sizes: RowSizes, x: PyTree[Shaped[AnyArray, "m ..."]]) -> Float[Array, "U C m P"]:
    """Differentiate all outputs of m inputs in all weights, in the order of the flat vector of weights."""
    passed = tapped.forward(network, network.params, x)
    layers = passed.weights.layers

    def joined(column: Float[Array, "m ... C"]) -> Float[Array, "m P"]:
        derivatives = passed.gradients(column)
        # The sum over positions is taken within the pass: one product of matrices for each input and layer.
        for leaf, layer in layers.items():
            matrices = einsum("mti,mto->mio", passed.layer_inputs[leaf], derivatives[leaf])
            derivatives[leaf] = layer.layout.flat(matrices)
        flat = [derivatives[leaf].reshape(len(column), -1) for leaf in sorted(derivatives)]
        return jnp.concatenate(flat, axis=-1)

    by_output = tapped.at_columns(joined, passed.outputs, np.arange(sizes.outputs), sizes.passes)
    return by_output.reshape(-1, sizes.unit, *by_output.shape[1:])
