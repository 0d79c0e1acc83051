"""Kronecker factors of the GGN for each layer, and exact blocks for the weights that are not layers.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, arXiv
1503.05671; with positions: Grosse and Martens, ICML 2016, arXiv 1602.01407, and Eschenhagen et al., NeurIPS 2023, arXiv
2311.00636, who call this setting "expand".
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Real, Shaped

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import number_type, register_unchecked
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature import tapped
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network

# Limits of exact blocks: the longest vector, the largest filter, and how many numbers the blocks of a leaf may hold.
MAX_VECTOR, MAX_FILTER, MAX_NUMBERS = 1024, 512, 2**24


@register_unchecked(data_fields=("inputs", "outputs", "count"), meta_fields=("segments",))
@dataclass(frozen=True)
class LayerSums:
    """Sums of a layer, whose block is (inputs kron outputs) / count with the rows of the matrix slowest.

    Attributes
    ----------
    inputs
        A = sum a a' over examples and positions, (I, I).
    outputs
        B = scale * sum g g' over examples, positions and columns of the likelihood's factor, (O, O).
    count
        The number of examples times that of positions.
    segments
        How the weight forms a matrix; see `bnnlaplace.curvature.layout`.
    """

    inputs: Float[Array, "I I"]
    outputs: Float[Array, "O O"]
    count: Float[Array, ""]
    segments: tuple[tuple[int, bool], ...]


class FilterSums(NamedTuple):
    """Exact blocks of a leaf of shape (..., C): one block for all weights with the same last index.

    A vector is one filter, with C = 1.

    Attributes
    ----------
    blocks
        (C, K, K), with the scale included.
    """

    blocks: Float[Array, "C K K"]


class DiagonalSums(NamedTuple):
    """The exact diagonal of a leaf.

    Attributes
    ----------
    diagonal
        One number for each weight of the leaf, with the scale included.
    """

    diagonal: Float[Array, " p"]


LeafSums = LayerSums | FilterSums | DiagonalSums


def factors(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Shaped[ArrayLike, "N ..."]],
    *,
    weights: Real[ArrayLike, " N"] | None = None,
    scale: Real[ArrayLike, ""] = 1.0,
    microbatch: int = 32,
) -> list[LeafSums]:
    """Compute, for each leaf of the weights, the sums that a block of G is made of. Call it inside `jit`.

    Let a be a layer's inputs at position t, and g the derivative of column c of the likelihood's factor with respect to
    its outputs there. The block of G = scale * sum_n J_n' Lambda_n J_n is
    scale * sum_n sum_c (sum_t a_t kron g_tc)(sum_t a_t kron g_tc)'. It is approximated by (A kron B) / count with
    A = sum_nt a a', B = scale * sum_ntc g g', and count = examples times positions. All columns are summed, and none
    are sampled.

    The block is exact for one example of one position. It is also exact if products between different positions vanish
    and sum_c g g' (or a a') is the same for all examples and positions, as in the last layer of a Gaussian likelihood.
    Biases have blocks of their own.

    Weights that are not layers have exact blocks. A vector of up to 1,024 numbers has one block. A leaf of more axes
    has one block for each index of the last axis, if that has at most 512 rows and all blocks together have at most
    2^24 numbers. So a depthwise convolution has a block for each channel. Larger leaves have their diagonal.

    Parameters
    ----------
    network, likelihood
        The network f, and the likelihood with its curvature Lambda.
    params
        The weights at which the network is differentiated.
    inputs
        All N examples.
    weights
        A weight for each example: one, or zero for examples that do not count.
    scale
        (all training examples) / (examples in `inputs`).
    microbatch
        How many examples are in one step of the inner loop.

    Returns
    -------
    list
        Sums for each leaf of `params`, in the order of `jax.tree.leaves`. The sums of several batches add up with
        `jax.tree.map(jnp.add, ...)`.

    Notes
    -----
    Cost: for each example and output a backward pass, and O^2 multiplications for each layer and position; I^2 for each
    example and position once. Memory: the sums; the activations and patches of `microbatch` examples; their gradients
    of weights that are not layers.
    """
    batches = mb.split(inputs, microbatch, number_type(params), weights)

    def batch_sums(batch: mb.Microbatches) -> list[LeafSums]:
        passed = tapped.forward(network, params, batch.inputs)
        layers = passed.weights.layers

        def squares(column: Array) -> list[Array]:
            gradients = passed.gradients(likelihood.factor_mv(passed.outputs, column))
            return [
                (_second_moment if leaf in layers else _exact_blocks)(gradients[leaf], batch.weights)
                for leaf in sorted(gradients)
            ]

        sums: list[LeafSums] = []
        for leaf, sum_of_squares in enumerate(tapped.over_columns(squares, passed.outputs)):
            if leaf in layers:
                inputs = _second_moment(passed.layer_inputs[leaf], batch.weights)
                # Counts are summed with the factors, so that sums of batches add up and are divided once, at the end.
                count = layers[leaf].positions * jnp.sum(batch.weights)
                sums.append(LayerSums(inputs, scale * sum_of_squares, count, layers[leaf].layout.segments))
            else:
                sums.append((FilterSums if sum_of_squares.ndim == 3 else DiagonalSums)(scale * sum_of_squares))
        return sums

    return mb.summed(batch_sums, batches)


def _second_moment(vectors: Float[Array, "M T D"], weights: Float[Array, " M"]) -> Float[Array, "D D"]:
    """Sum v v' over the vectors v at all positions of all examples, each with the weight of its example."""
    # One matrix product over examples and positions together is faster than one for each example.
    flat = vectors.reshape(-1, vectors.shape[-1])
    weighted = (mb.over_outputs(weights, vectors) * vectors).reshape(flat.shape)
    return einsum("rd,re->de", weighted, flat)


def _exact_blocks(
    gradients: Float[Array, "M ..."], weights: Float[Array, " M"]
) -> Float[Array, "C K K"] | Float[Array, " p"]:
    """Sum the exact blocks of a leaf that is not a layer over examples, or its diagonal if they are too large."""
    shape = gradients.shape[1:]
    rows, num_filters = (math.prod(shape), 1) if len(shape) <= 1 else (math.prod(shape[:-1]), shape[-1])
    if rows > (MAX_VECTOR if len(shape) <= 1 else MAX_FILTER) or rows**2 * num_filters > MAX_NUMBERS:
        return einsum("m,mp->p", weights, gradients.reshape(len(gradients), -1) ** 2)
    # The last axis of a depthwise convolution is its channel, so that each filter has a block.
    filters = gradients.reshape(-1, rows, num_filters)
    return einsum("mkc,mlc->ckl", mb.over_outputs(weights, filters) * filters, filters)
