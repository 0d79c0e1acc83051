"""The dense GGN: exact, for small networks, and the oracle that every matrix-free path is tested against."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import examples, number_type, ravel, size, unraveler
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature import tapped
from bnnlaplace.curvature.layers import Weights, find
from bnnlaplace.curvature.layout import Layout, from_matrix
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network


def jacobian(network: Network, params: PyTree, inputs: PyTree[Float[Array, "N ..."]]) -> Float[Array, "N ... C P"]:
    """d f(params, x_n) / d params by reverse mode, one example at a time within one vectorised call.

    Memory: P numbers for each output of each example.

    Parameters
    ----------
    network, params
        What is differentiated, and at which weights.
    inputs
        All N examples.
    """
    unravel = unraveler(params)

    def outputs(vector: Float[Array, " P"], x: PyTree) -> Float[Array, "... C"]:
        return network(unravel(vector), examples(x, None))[0]

    return jax.vmap(jax.jacrev(outputs), in_axes=(None, 0))(ravel(params), inputs)


def factor_rows(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Float[Array, "m ..."]],
    weights: Float[Array, " m"],
) -> Float[Array, "R P"]:
    """The rows sqrt(w_n) (J_n' B_n e_c)', one for each output of each example: R' R = sum_n w_n J_n' Lambda_n J_n.

    Cost: one forward pass, and one backward pass for each output. Memory: R P numbers.

    Parameters
    ----------
    network, likelihood
        Where f and Lambda come from.
    params
        The weights at which the network is differentiated.
    inputs
        m examples.
    weights
        w_n >= 0.
    """

    def example(x: PyTree, weight: Array) -> Float[Array, "K P"]:
        outputs, pullback = jax.vjp(lambda p: network(p, examples(x, None))[0], params)
        root = jnp.sqrt(weight).astype(outputs.dtype)
        columns = root * jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)
        return jax.vmap(lambda column: ravel(pullback(likelihood.factor_mv(outputs, column))[0]))(columns)

    return jax.vmap(example)(inputs, weights).reshape(-1, size(params))


def ggn(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Float[Array, "N ..."]],
    *,
    scale: float = 1.0,
    weights: Float[Array, " N"] | None = None,
    microbatch: int = 32,
) -> Float[Array, "P P"]:
    """G = scale * sum_n w_n J_n' Lambda_n J_n as a matrix.

    A row of B' J is a kron g for a dense layer with inputs a, g being the derivative with respect to its outputs. So
    two such layers have the block sum_n (a_n a_n') kron (sum_c g_nc g_nc'). The columns of the likelihood's factor
    are summed before anything as large as the block is computed, so that there is one multiplication for each entry
    and example, whatever the number of outputs.

    Parameters
    ----------
    network, likelihood
        Where f and Lambda come from.
    params
        The weights at which the network is linearised.
    inputs
        All N examples.
    scale
        (all training examples) / N.
    weights
        w_n >= 0; by default ones.
    microbatch
        Examples in one step of the inner loop.

    Notes
    -----
    Cost: for each output of each example a backward pass; for each example P^2 / 2 multiplications, and C times as many
    where weights are of no layer or their layer has several positions. Memory: about 2 P^2 numbers, and for each
    example of a microbatch and each output the derivatives with respect to the outputs of layers and to all other
    weights; where there are many outputs they are taken some at a time. Call it inside `jit`.
    """
    batches = mb.split(inputs, microbatch, number_type(params), weights)

    def of_batch(batch: mb.Microbatches) -> list[Array]:
        passed = tapped.forward(network, params, batch.inputs)

        def of_columns(numbers: Int[Array, " k"]) -> list[Array]:
            parts = _parts(passed, likelihood, numbers)
            return [_summed(parts[i], parts[j], batch.weights) for i, j in _pairs(len(parts))]

        columns = _columns_at_once(passed.outputs)
        return of_columns(columns[0]) if len(columns) == 1 else mb.summed(of_columns, columns)

    weights = find(network, examples(batches.inputs, 0))
    sums, layouts = mb.summed(of_batch, batches), _layouts(weights)
    blocks = [_block(layouts[i], layouts[j], part) for (i, j), part in zip(_pairs(len(layouts)), sums, strict=True)]
    return scale * _assembled(blocks, _places(weights, params))


# Inputs or outputs of a layer up to which the symmetry of its block halves the work for each of them.
MOST_PACKED = 1024
# Numbers in the cotangents of a microbatch, one for each output, that are in memory at a time.
MOST_COTANGENTS = 2**24


class _Part(NamedTuple):
    """Some of the columns of B' J: inputs kron derivatives for a dense layer, else the derivatives alone.

    Attributes
    ----------
    inputs
        a of each example, (M, I), or None.
    derivatives
        For each output, example, and output of the layer or weight, (K, M, O).
    layout
        How the layer's numbers form a matrix.
    """

    inputs: Float[Array, "M I"] | None
    derivatives: Float[Array, "K M O"]
    layout: Layout | None


def _columns_at_once(outputs: Float[Array, "M ..."]) -> Int[np.ndarray, "num k"]:
    """The numbers of the outputs of an example, in as many equal parts as memory asks for; some may be no output's."""
    count = math.prod(outputs.shape[1:])
    num = math.ceil(count / max(1, MOST_COTANGENTS // outputs.size))
    return np.arange(num * math.ceil(count / num)).reshape(num, -1)


def _parts(passed: tapped.Pass, likelihood: Likelihood, numbers: Int[Array, " k"]) -> list[_Part]:
    """One for each layer of one position, and a last one for all other weights; of some outputs of each example."""

    def gradients(column: Float[Array, "M ..."]) -> dict[int, Array]:
        return passed.gradients(likelihood.factor_mv(passed.outputs, column))

    found = tapped.at_columns(gradients, passed.outputs, numbers)
    layers = passed.weights.layers
    single, others = [], []
    for leaf in sorted(found):
        layer = layers.get(leaf)
        if layer is not None and layer.positions == 1:
            single.append(_Part(passed.layer_inputs[leaf][:, 0], found[leaf][:, :, 0], layer.layout))
        elif layer is not None:
            matrices = einsum("mti,kmto->kmio", passed.layer_inputs[leaf], found[leaf])
            others.append(from_matrix(matrices, layer.layout.segments))
        else:
            others.append(found[leaf].reshape(*found[leaf].shape[:2], -1))
    return [*single, _Part(None, jnp.concatenate(others, axis=-1), None)] if others else single


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def _summed(one: _Part, other: _Part, weights: Float[Array, " M"]) -> Array:
    """sum_m w_m (a_m a'_m) kron (sum_k d_km d'_km) over inputs a and derivatives d, as far as there are inputs.

    Of a part with itself both factors are symmetric, and each is packed into its lower triangle; but not wide ones, as
    the places of their entries would be large arrays in the compiled program.
    """
    left = one.derivatives * weights[:, None]
    if one.inputs is None:  # then the other one is the same, as it is the last
        return einsum("kmp,kmq->pq", left, other.derivatives)
    moments = einsum("kmo,kmq->moq", left, other.derivatives)
    if other.inputs is None:
        return einsum("mi,moq->ioq", one.inputs, moments)
    products = one.inputs[:, :, None] * other.inputs[:, None, :]
    if one is other and max(products.shape[-1], moments.shape[-1]) <= MOST_PACKED:
        return einsum("mi,mo->io", _packed(products), _packed(moments))
    return einsum("mij,moq->ijoq", products, moments)


def _packed(symmetric: Float[Array, "M n n"]) -> Float[Array, "M t"]:
    """The lower triangle of each matrix, row by row."""
    rows, columns = np.tril_indices(symmetric.shape[-1])
    return symmetric[:, rows, columns]


def _unpacked(packed: Array, axis: int) -> Array:
    """The inverse of `_packed` along an axis, which becomes two."""
    number = math.isqrt(2 * packed.shape[axis])
    place = np.zeros((number, number), int)
    place[np.tril_indices(number)] = np.arange(packed.shape[axis])
    return jnp.take(packed, np.maximum(place, place.T), axis=axis)


def _block(one: Layout | None, other: Layout | None, sums: Array) -> Float[Array, "p q"]:
    """What `_summed` gives as a matrix, its rows and columns in the order of the weights."""
    if one is None:
        return sums
    if other is None:
        return from_matrix(jnp.moveaxis(sums, 2, 0), one.segments).T
    if sums.ndim == 2:
        sums = _unpacked(_unpacked(sums, 1), 0)
    columns = from_matrix(jnp.swapaxes(sums, 1, 2), other.segments)
    return from_matrix(jnp.moveaxis(columns, 2, 0), one.segments).T


def _layouts(weights: Weights) -> list[Layout | None]:
    """Of each part, as `_parts` orders them; None for weights of no layer."""
    single = _single(weights)
    others = weights.entries or weights.rest or len(single) < len(weights.layers)
    return [*(weights.layers[leaf].layout for leaf in single), *([None] if others else [])]


def _single(weights: Weights) -> list[int]:
    """The leaves that are layers of one position: each is a part of its own."""
    return [leaf for leaf in sorted(weights.layers) if weights.layers[leaf].positions == 1]


class _Place(NamedTuple):
    """Where a leaf is among the parts: which one, and which of its numbers."""

    part: int
    numbers: slice


def _places(weights: Weights, params: PyTree) -> list[_Place]:
    """Of each leaf, as `_parts` orders them."""
    single = _single(weights)
    places, start = [], 0
    for number, leaf in enumerate(jax.tree.leaves(params)):
        if number in single:
            places.append(_Place(single.index(number), slice(0, leaf.size)))
        else:
            places.append(_Place(len(single), slice(start, start + leaf.size)))
            start += leaf.size
    return places


def _assembled(blocks: list[Float[Array, "p q"]], places: list[_Place]) -> Float[Array, "P P"]:
    """The whole matrix from the blocks of each part with itself and the later ones."""
    known = dict(zip(_pairs(1 + max(place.part for place in places)), blocks, strict=True))

    def block(one: _Place, other: _Place) -> Float[Array, "p q"]:
        i, j = one.part, other.part
        whole = known[i, j] if i <= j else known[j, i].T
        return whole[one.numbers, other.numbers]

    return jnp.block([[block(one, other) for other in places] for one in places])
