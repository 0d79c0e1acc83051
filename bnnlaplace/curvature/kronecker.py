"""Kronecker factors of the GGN for each layer, and exact blocks for the weights that are not layers.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", ICML 2015, arXiv
1503.05671. A weight that an example uses several times, such as the kernel of a convolution, has a choice of factors:
see `factors`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Real, Shaped

from bnnlaplace.core import checks
from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import number_type, register_unchecked
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature import tapped
from bnnlaplace.curvature.direct import examples_at_once
from bnnlaplace.curvature.layers import Weights, is_matrix
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.likelihoods.closed_forms import curvature_diagonal, curvature_sum
from bnnlaplace.model.network import Network

SharedWeights = Literal["partial_traces", "expand", "reduce"]

# Limits of exact blocks: the longest vector, the largest filter, and how many numbers the blocks of a leaf may hold.
MAX_VECTOR, MAX_FILTER, MAX_NUMBERS = 1024, 512, 2**24
# Up to so many numbers a weight that is used several times has an exact block, which costs no more than two factors.
MAX_EXACT = 128


@register_unchecked(data_fields=("inputs", "outputs", "count"), meta_fields=("segments",))
@dataclasses.dataclass(frozen=True)
class LayerSums:
    """Sums of a layer, whose block is (inputs kron outputs) / count with the rows of the matrix slowest.

    Attributes
    ----------
    inputs
        The factor A of the layer's inputs, (I, I), such as sum a a' over examples.
    outputs
        The factor B of the derivatives with respect to its outputs, (O, O), with the scale included.
    count
        What A kron B is divided by: the number of examples, times that of positions or its square; or the trace of A.
    segments
        How the weight forms a matrix; see `bnnlaplace.curvature.layout`.
    """

    inputs: Float[Array, "I I"]
    outputs: Float[Array, "O O"]
    count: Float[Array, ""]
    segments: tuple[tuple[int, bool], ...]


class FilterSums(NamedTuple):
    """Exact blocks of a leaf of shape (..., C): one block for all weights with the same last index.

    A vector is one filter, with C = 1, and so is a small weight of any shape.

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
    weights: Real[ArrayLike, "N ..."] | None = None,
    points: Float[ArrayLike, "N ..."] | None = None,
    scale: Real[ArrayLike, ""] = 1.0,
    microbatch: int = 32,
    shared_weights: SharedWeights = "partial_traces",
) -> list[LeafSums]:
    """Compute, for each leaf of the weights, the sums that a block of G is made of. Call it inside `jit`.

    Let a be a layer's inputs at position t, and g the derivative of column c of the likelihood's factor with respect to
    its outputs there. With the matrix M_nc = sum_t a_t g_tc' of example n, the block of
    G = scale * sum_n J_n' Lambda_n J_n is scale * sum_nc vec(M_nc) vec(M_nc)'. All columns are summed, and none are
    sampled. It is approximated by (A kron B) / count.

    A layer that is used once for each example has A = sum_n a a', B = scale * sum_nc g g', and count is the number of
    examples. This is exact if sum_c g g' (or a a') is the same for all examples, as in the last layer of a Gaussian
    likelihood. In trained classifiers it is not, because large inputs go with saturated outputs. The trace of the block
    is then too large, by a factor of 5 in the last layer of a small convolutional network.

    For a weight that is used several times by each example, `shared_weights` chooses the factors. A weight that is not
    one layer, but whose derivative is a matrix, always has those of "partial_traces". Such are a kernel within a loop
    over time, a table of embeddings, and one that serves as output layer, too.

    A weight that is used several times and has up to 128 numbers has one exact block, and so has a vector of up to
    1,024. Any other leaf has one block for each index of its last axis, if that has at most 512 rows and all blocks
    together have at most 2^24 numbers. So a depthwise convolution has a block for each channel, and biases have blocks
    of their own. Larger leaves have their diagonal.

    Parameters
    ----------
    network, likelihood
        The network f, and the likelihood with its curvature Lambda.
    params
        The weights at which the network is differentiated.
    inputs
        All N examples.
    weights
        How many times each example counts, by default once; or each position of its outputs. Then the factor of a
        layer's inputs counts an example as many times as its position that counts most.
    points
        Where the curvature of the likelihood is evaluated, (N, ...): by default at the outputs. Only likelihoods that
        say so have other points, such as `sites.by_factors`.
    scale
        (all training examples) / (examples in `inputs`).
    microbatch
        How many examples are in one step of the inner loop.
    shared_weights
        The factors of layers with T > 1 positions.

        "partial_traces": A = sum_nc M M', B = scale * sum_nc M' M, and count = tr A. The trace of the block is exact,
        and so are A and B, its traces over columns and over rows. The whole block is exact wherever it is a Kronecker
        product, and so in both cases for which the other two are made. Elsewhere it is the first step of the iteration
        that finds the nearest Kronecker product (Morwani et al. 2024, arXiv 2406.17748).

        "expand": A = sum_nt a a', B = scale * sum_ntc g g', and count = N T, as if positions were examples. It leaves
        out products between positions. It is exact for linear networks whose outputs depend on one position each.

        "reduce": A = sum_n (sum_t a)(sum_t a)', B = scale * sum_nc (sum_t g)(sum_t g)', and count = N T^2. It is exact
        for linear networks whose outputs are means or sums over positions. Elsewhere derivatives cancel in the sum over
        positions: those of the keys of softmax attention cancel completely, and those weights have no curvature.

        Eschenhagen et al., NeurIPS 2023, arXiv 2311.00636, name the last two.

    Returns
    -------
    list
        Sums for each leaf of `params`, in the order of `jax.tree.leaves`. The sums of several batches add up with
        `jax.tree.map(jnp.add, ...)`.

    Raises
    ------
    ValueError
        If `shared_weights` has another value.

    Notes
    -----
    Cost: for each example and output a backward pass, but for a layer whose outputs are those of the network, which has
    sum_n Lambda_n as its factor B. If it has at least twice as many outputs as inputs, all others take a pass for each
    of these inputs (see `bnnlaplace.curvature.head`). To that a layer adds for each example and pass O^2
    multiplications for "reduce", and O^2 for each position for "expand"; and I^2 for each example or position once.
    "partial_traces" adds T O (2 T + O) or I O (T + I + O), whichever is less. Memory: the sums; the activations and
    patches of `microbatch` examples; their gradients of weights that are not layers, and for "partial_traces" T^2 or
    I O numbers for each example and layer.
    """
    checks.choice(shared_weights, "kronecker_factors(shared_weights=...)", get_args(SharedWeights))
    microbatch = examples_at_once(network, inputs, microbatch)
    batches = mb.split(inputs, microbatch, number_type(params), weights, points)

    def batch_sums(batch: mb.Microbatches) -> list[LeafSums]:
        passed = tapped.forward(network, params, batch.inputs)
        weights, factor_mv = mb.within_factor(batch.weights, likelihood.factor_mv, batch.points)
        leaves = jax.tree.leaves(params)
        rules = {
            leaf: _rule(passed, leaf, value.shape, weights, shared_weights)
            for leaf, value in enumerate(leaves)
            if leaf not in passed.direct
        }

        def squares(gradients: dict[int, Array]) -> dict[int, PyTree]:
            return {leaf: rule.of_column(gradients[leaf]) for leaf, rule in rules.items()}

        points = batch.at(passed.outputs)
        totals = tapped.over_factor(passed, likelihood, factor_mv, points, squares) if rules else {}
        sums = {leaf: rule.sums(totals[leaf], scale) for leaf, rule in rules.items()}
        if passed.direct:
            sums |= _direct_sums(passed, likelihood, points, weights, scale)
        return [sums[leaf] for leaf in range(len(leaves))]

    return mb.summed(batch_sums, batches)


# --- which sums a leaf has --------------------------------------------------------------------------------------


def _direct_sums(
    passed: tapped.Pass,
    likelihood: Likelihood,
    points: Float[Array, "M ..."],
    weights: Float[Array, " M"],
    scale: Real[ArrayLike, ""],
) -> dict[int, LeafSums]:
    """The sums of a layer, and of its bias, whose outputs are those of the network: the columns are those of Lambda."""
    total = scale * curvature_sum(likelihood, points, weights)

    def sums(leaf: int) -> LeafSums:
        layer = passed.weights.layers.get(leaf)
        if layer is not None:
            moments = _second_moment(passed.layer_inputs[leaf], weights)
            return LayerSums(moments, total.astype(moments.dtype), jnp.sum(weights), layer.layout.segments)
        if len(total) <= MAX_VECTOR:
            return FilterSums(total[None])
        of_outputs = curvature_diagonal(likelihood, points)
        return DiagonalSums(scale * einsum("m,mc->c", weights, of_outputs))

    return {leaf: sums(leaf) for leaf in passed.direct}


class _Rule(NamedTuple):
    """How the derivatives of M examples with respect to one leaf become its sums.

    Attributes
    ----------
    of_column
        From the derivatives for one column of the likelihood's factor to arrays, which are summed over columns.
    sums
        From these arrays and the scale to the sums of the leaf.
    """

    of_column: Callable[[Float[Array, "M ..."]], PyTree]
    sums: Callable[[PyTree, Real[ArrayLike, ""]], LeafSums]


def _rule(
    passed: tapped.Pass,
    leaf: int,
    shape: tuple[int, ...],
    weights: Float[Array, " M"],
    shared_weights: SharedWeights,
) -> _Rule:
    """Choose the sums of a leaf; see `factors`."""
    layer = passed.weights.layers.get(leaf)
    if layer is None:
        return _rule_of_other(passed.weights, leaf, shape, weights)
    inputs, segments = passed.layer_inputs[leaf], layer.layout.segments
    if layer.positions == 1 or shared_weights == "expand":
        return _expanded(inputs, weights, segments)
    if shared_weights == "reduce":
        return _reduced(inputs, weights, segments)
    # Transposed once: within the product, for each column, it would take as long as the product itself.
    transposed = jnp.swapaxes(inputs, 1, 2)
    if math.prod(shape) <= MAX_EXACT:
        exact = _exact(weights, 1)
        return exact._replace(of_column=lambda g: exact.of_column(layer.layout.flat(_matrices(transposed, g))))
    num_positions, num_inputs = inputs.shape[1:]
    num_outputs = math.prod(shape) // num_inputs
    # Multiplications for each example and column, divided by the number of outputs.
    by_positions = num_positions * (2 * num_positions + num_outputs)
    by_matrices = num_inputs * (num_positions + num_inputs + num_outputs)
    if by_positions < by_matrices:
        return _partial_traces_by_positions(inputs, weights, segments)
    traces = _partial_traces(segments)
    return traces._replace(of_column=lambda g: traces.of_column(_matrices(transposed, _rooted(g, weights))))


def _rule_of_other(entering: Weights, leaf: int, shape: tuple[int, ...], weights: Float[Array, " M"]) -> _Rule:
    """Choose the sums of a leaf that is not a layer."""
    sizes = [size for size in shape if size > 1]  # axes of length one move no numbers
    count = math.prod(sizes)
    if count <= (MAX_VECTOR if len(sizes) <= 1 else MAX_EXACT):
        return _exact(weights, 1)
    num_filters = sizes[-1] if len(sizes) > 1 else 1
    rows = count // num_filters
    if len(sizes) > 1 and max(rows, num_filters) <= MAX_FILTER and is_matrix(entering, leaf, len(sizes)):
        traces = _partial_traces(((rows, True), (num_filters, False)))
        shape = (-1, rows, num_filters)
        return traces._replace(of_column=lambda g: traces.of_column(_rooted(g, weights).reshape(shape)))
    if len(sizes) <= 1 or rows > MAX_FILTER or rows * count > MAX_NUMBERS:
        return _Rule(
            lambda gradients: einsum("m,mp->p", weights, gradients.reshape(len(gradients), -1) ** 2),
            lambda total, scale: DiagonalSums(scale * total),
        )
    # The last axis of a depthwise convolution is its channel, so that each filter has a block.
    return _exact(weights, num_filters)


# --- sums of layers ---------------------------------------------------------------------------------------------

_Segments = tuple[tuple[int, bool], ...]


def _expanded(inputs: Float[Array, "M T I"], weights: Float[Array, " M"], segments: _Segments) -> _Rule:
    """Factors that take positions for examples."""

    def sums(total: Float[Array, "O O"], scale: Real[ArrayLike, ""]) -> LayerSums:
        # Counts are summed with the factors, so that sums of batches add up and are divided once, at the end.
        count = inputs.shape[1] * jnp.sum(weights)
        return LayerSums(_second_moment(inputs, weights), scale * total, count, segments)

    return _Rule(lambda gradients: _second_moment(gradients, weights), sums)


def _reduced(inputs: Float[Array, "M T I"], weights: Float[Array, " M"], segments: _Segments) -> _Rule:
    """Factors of sums over positions."""
    num_positions = inputs.shape[1]
    expanded = _expanded(jnp.sum(inputs, axis=1, keepdims=True), weights, segments)

    def sums(total: Float[Array, "O O"], scale: Real[ArrayLike, ""]) -> LayerSums:
        of_sums = expanded.sums(total, scale)
        return dataclasses.replace(of_sums, count=num_positions**2 * of_sums.count)

    return _Rule(lambda gradients: expanded.of_column(jnp.sum(gradients, axis=1, keepdims=True)), sums)


def _partial_traces(segments: _Segments) -> _Rule:
    """Sum M M' and M' M over matrices M, (M, I, O), of which each column of the likelihood's factor gives one."""

    def of_column(matrices: Float[Array, "M I O"]) -> tuple[Float[Array, "I I"], Float[Array, "O O"]]:
        rows = matrices.reshape(-1, matrices.shape[-1])
        return einsum("mio,mjo->ij", matrices, matrices), einsum("ro,rp->op", rows, rows)

    return _Rule(of_column, lambda total, scale: _from_traces(*total, scale, segments))


def _partial_traces_by_positions(
    inputs: Float[Array, "M T I"], weights: Float[Array, " M"], segments: _Segments
) -> _Rule:
    """Sum M M' and M' M for M = sum_t a_t g_t', without forming M.

    With K = (a_t' a_s) for each example, M' M = sum_ts K_ts g_t g_s'. The sum over columns of (g_t' g_s) takes the
    place of K in M M', so that the inputs are needed once and not for each column.
    """
    products = einsum("mti,msi->mts", inputs, inputs)

    def of_column(gradients: Float[Array, "M T O"]) -> tuple[Float[Array, "M T T"], Float[Array, "O O"]]:
        rooted = _rooted(gradients, weights)
        mixed = einsum("mts,mso->mto", products, rooted)
        return einsum("mto,mso->mts", rooted, rooted), einsum("mto,mtp->op", rooted, mixed)

    def sums(total: tuple[Float[Array, "M T T"], Float[Array, "O O"]], scale: Real[ArrayLike, ""]) -> LayerSums:
        between, outputs = total
        mixed = einsum("mts,msi->mti", between, inputs)
        return _from_traces(einsum("mti,mtj->ij", inputs, mixed), outputs, scale, segments)

    return _Rule(of_column, sums)


def _rooted(gradients: Float[Array, "M ..."], weights: Float[Array, " M"]) -> Float[Array, "M ..."]:
    """Multiply derivatives by the roots of the examples' weights; to weight matrices made of them would cost more."""
    return mb.over_outputs(jnp.sqrt(weights), gradients) * gradients


def _from_traces(
    rows: Float[Array, "I I"], columns: Float[Array, "O O"], scale: Real[ArrayLike, ""], segments: _Segments
) -> LayerSums:
    return LayerSums(rows, scale * columns, jnp.trace(rows), segments)


def _matrices(transposed: Float[Array, "M I T"], gradients: Float[Array, "M T O"]) -> Float[Array, "M I O"]:
    """The derivative of each example with respect to the matrix of a layer."""
    return einsum("mit,mto->mio", transposed, gradients)


def _second_moment(vectors: Float[Array, "M T D"], weights: Float[Array, " M"]) -> Float[Array, "D D"]:
    """Sum v v' over the vectors v at all positions of all examples, each with the weight of its example."""
    # One matrix product over examples and positions together is faster than one for each example.
    flat = vectors.reshape(-1, vectors.shape[-1])
    weighted = (mb.over_outputs(weights, vectors) * vectors).reshape(flat.shape)
    return einsum("rd,re->de", weighted, flat)


# --- exact sums -------------------------------------------------------------------------------------------------


def _exact(weights: Float[Array, " M"], num_filters: int) -> _Rule:
    """Exact blocks of a leaf, one for each index of its last axis; or one block if `num_filters` is one."""

    def of_column(gradients: Float[Array, "M ..."]) -> Float[Array, "C K K"]:
        filters = gradients.reshape(len(gradients), -1, num_filters)
        return einsum("mkc,mlc->ckl", mb.over_outputs(weights, filters) * filters, filters)

    return _Rule(of_column, lambda total, scale: FilterSums(scale * total))
