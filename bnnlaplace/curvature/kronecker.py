"""Kronecker factors of the GGN, layer by layer, and exact blocks of the weights that form no matrix.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, arXiv
1503.05671; with positions: Grosse and Martens, ICML 2016, arXiv 1602.01407, and Eschenhagen et al., NeurIPS 2023, arXiv
2311.00636, who call this setting "expand".
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import number_type
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature import tapped
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network

# Exact blocks: the longest vector and the largest filter that get one, and the most numbers that those of a leaf hold.
MAX_VECTOR, MAX_FILTER, MAX_NUMBERS = 1024, 512, 2**24


@partial(jax.tree_util.register_dataclass, data_fields=("inputs", "outputs", "count"), meta_fields=("segments",))
@dataclass(frozen=True)
class LayerSums:
    """Sums of a layer whose matrix has the block (inputs kron outputs) / count, rows of the matrix slowest.

    Attributes
    ----------
    inputs
        A = sum a a' over examples and positions, (I, I).
    outputs
        B = scale * sum g g' over examples, positions and columns of the likelihood's factor, (O, O).
    count
        The number of examples times that of positions.
    segments
        How the weight is a matrix; see `bnnlaplace.curvature.layout`.
    """

    inputs: Float[Array, "I I"]
    outputs: Float[Array, "O O"]
    count: Float[Array, ""]
    segments: tuple[tuple[int, bool], ...]


class FilterSums(NamedTuple):
    """The exact blocks of a leaf of shape (..., C), each of all weights with the same last index.

    A vector is one filter.

    Attributes
    ----------
    blocks
        (C, K, K), scale included.
    """

    blocks: Float[Array, "C K K"]


class DiagonalSums(NamedTuple):
    """The exact diagonal of a leaf.

    Attributes
    ----------
    diagonal
        Flat, scale included.
    """

    diagonal: Float[Array, " p"]


LeafSums = LayerSums | FilterSums | DiagonalSums


def factors(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Float[Array, "N ..."]],
    *,
    weights: Float[Array, " N"] | None = None,
    scale: float = 1.0,
    microbatch: int = 32,
) -> list[LeafSums]:
    """Block by block, the sums from which a Kronecker-factored G = scale * sum_n J_n' Lambda_n J_n is made.

    Let a be a layer's inputs at position t, and g the derivative of column c of the likelihood's factor with respect to
    its outputs there. G has the block scale * sum_n sum_c (sum_t a_t kron g_tc)(...)'. Its approximation is
    (A kron B) / count, with A = sum_nt a a', B = scale * sum_ntc g g', and count = examples times positions.
    All columns are summed, so that nothing is sampled. The block is exact for one example of one position, and where
    products between different positions vanish and sum_c g g' (or a a') is the same for all examples and positions: in
    the last layer of a Gaussian likelihood, for instance. Biases have blocks of their own.

    Other weights have exact blocks: vectors of up to 1,024 numbers the whole block of the leaf; leaves of more axes one
    block for each index of the last axis, if that has at most 512 rows and all have at most 2^24 numbers; the rest
    their diagonal. So depthwise convolutions have a block for each channel.

    Parameters
    ----------
    network, likelihood
        Where f and Lambda come from.
    params
        The weights at which the network is differentiated.
    inputs
        All N examples.
    weights
        Of the examples: one, or zero for those that do not count.
    scale
        (all training examples) / (examples in `inputs`).
    microbatch
        Examples in one step of the inner loop.

    Returns
    -------
    list
        For each leaf of `params`, in the order of `jax.tree.leaves`. Those of several batches add up with
        `jax.tree.map(jnp.add, ...)`.

    Notes
    -----
    Cost: for each example and output a backward pass, and O^2 multiplications for each layer and position; I^2 for each
    example and position once. Memory: the sums; the activations and patches of `microbatch` examples; their gradients
    of weights that are no layers. Call it inside `jit`.
    """
    batches = mb.split(inputs, microbatch, number_type(params), weights)

    def of_batch(batch: mb.Microbatches) -> list[LeafSums]:
        passed = tapped.forward(network, params, batch.inputs)
        layers = passed.weights.layers

        def squares(column: Array) -> list[Array]:
            found = passed.gradients(likelihood.factor_mv(passed.outputs, column))
            return [
                _second_moment(found[leaf], batch.weights) if leaf in layers else _block(found[leaf], batch.weights)
                for leaf in sorted(found)
            ]

        sums: list[LeafSums] = []
        for leaf, summed in enumerate(tapped.over_columns(squares, passed.outputs)):
            if leaf in layers:
                rows = _second_moment(passed.layer_inputs[leaf], batch.weights)
                count = layers[leaf].positions * jnp.sum(batch.weights)
                sums.append(LayerSums(rows, scale * summed, count, layers[leaf].layout.segments))
            else:
                sums.append((FilterSums if summed.ndim == 3 else DiagonalSums)(scale * summed))
        return sums

    return mb.summed(of_batch, batches)


def _second_moment(rows: Float[Array, "M T D"], weights: Float[Array, " M"]) -> Float[Array, "D D"]:
    """sum_mt w_m r r'."""
    flat = rows.reshape(-1, rows.shape[-1])
    weighted = (mb.over_outputs(weights, rows) * rows).reshape(flat.shape)
    return einsum("rd,re->de", weighted, flat)


def _block(gradients: Float[Array, "M ..."], weights: Float[Array, " M"]) -> Array:
    """The sum over examples of exact blocks (C, K, K), or of the diagonal, of a leaf that forms no matrix."""
    shape = gradients.shape[1:]
    filters = (math.prod(shape), 1) if len(shape) <= 1 else (math.prod(shape[:-1]), shape[-1])
    rows, number = filters
    if rows > (MAX_VECTOR if len(shape) <= 1 else MAX_FILTER) or rows**2 * number > MAX_NUMBERS:
        return einsum("m,mp->p", weights, gradients.reshape(len(gradients), -1) ** 2)
    parts = gradients.reshape(-1, rows, number)
    return einsum("mkc,mlc->ckl", mb.over_outputs(weights, parts) * parts, parts)
