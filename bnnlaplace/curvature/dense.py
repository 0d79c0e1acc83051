"""The GGN as a dense matrix: exact, for networks with few weights."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Real, Shaped

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import examples, num_examples, number_type, ravel, size
from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature import tapped
from bnnlaplace.curvature.jacobian import Factors, jacobian
from bnnlaplace.curvature.layers import Weights, find
from bnnlaplace.curvature.layout import Layout, from_matrix
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec, output_shape


def factor_rows(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Shaped[ArrayLike, "m ..."]],
    weights: Real[ArrayLike, "m ..."],
    points: Float[ArrayLike, "m ..."] | None = None,
) -> Float[Array, "R P"]:
    """Return a matrix R with R' R = sum_n w_n J_n' Lambda_n J_n. Its rows are sqrt(w_n) (J_n' B_n e_c)'.

    There is one row for each output of each example. Cost: one forward pass, and one backward pass for each output.
    Memory: R P numbers.

    Parameters
    ----------
    network, likelihood
        The network f, and the likelihood with its curvature Lambda = B B'.
    params
        The weights at which the network is differentiated.
    inputs
        m examples.
    weights
        How many times each example counts, or each position of its outputs.
    points
        Where the curvature of the likelihood is evaluated, (m, ...): by default at the outputs. Only likelihoods that
        say so have other points, such as `sites.by_factors`.
    """

    def rows_of_example(x: PyTree, weight: Array, point: Array | None) -> Float[Array, "K P"]:
        outputs, pullback = jax.vjp(lambda p: network(p, examples(x, None))[0], params)
        root = jnp.sqrt(weight).astype(outputs.dtype)[..., None]
        columns = root * jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)
        at = outputs if point is None else point
        return jax.vmap(lambda column: ravel(pullback(likelihood.factor_mv(at, column))[0]))(columns)

    return jax.vmap(rows_of_example)(inputs, weights, points).reshape(-1, size(params))


def ggn(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Shaped[ArrayLike, "N ..."]],
    *,
    scale: Real[ArrayLike, ""] = 1.0,
    weights: Real[ArrayLike, "N ..."] | None = None,
    points: Float[ArrayLike, "N ..."] | None = None,
    microbatch: int = 32,
) -> Float[Array, "P P"]:
    """Compute G = scale * sum_n w_n J_n' Lambda_n J_n as a matrix, in the type of the weights. Call it inside `jit`.

    For a dense layer with inputs a, a row of B' J is a kron g, where g is the derivative with respect to its outputs.
    So two such layers have the block sum_n (a_n a_n') kron (sum_c g_nc g_nc'). The sum over the columns of the
    likelihood's factor is taken before anything as large as the block is computed. So there is one multiplication for
    each entry and example, whatever the number of outputs.

    Parameters
    ----------
    network, likelihood
        The network f, and the likelihood with its curvature Lambda.
    params
        The weights at which the network is linearised.
    inputs
        All N examples.
    scale
        (all training examples) / N.
    weights
        How many times each example counts, by default once: w_n, or a number for each position of its outputs.
    points
        Where the curvature of the likelihood is evaluated, (N, ...): by default at the outputs. Only likelihoods that
        say so have other points, such as `sites.by_factors`.
    microbatch
        How many examples are in one step of the inner loop.

    Notes
    -----
    Cost: for each output of each example a backward pass; for each example P^2 / 2 multiplications, and C times as many
    for weights that are not layers or whose layer has several positions. Memory: about 2 P^2 numbers, and for each
    example of a microbatch and each output the derivatives with respect to the outputs of layers and to all other
    weights. If there are many outputs, they are taken some at a time.
    """
    batches = mb.split(inputs, microbatch, number_type(params), weights, points)

    def batch_sums(batch: mb.Microbatches) -> list[Array]:
        passed = tapped.forward(network, params, batch.inputs)
        weights, factor_mv = mb.within_factor(batch.weights, likelihood.factor_mv, batch.points)

        def sums_of_columns(numbers: Int[ArrayLike, " k"]) -> list[Array]:
            groups = _groups(passed, factor_mv, numbers)
            return [_summed(groups[i], groups[j], weights) for i, j in _pairs(len(groups))]

        columns = _columns_at_once(len(passed.outputs), passed.outputs[0].size)
        return sums_of_columns(columns[0]) if len(columns) == 1 else mb.summed(sums_of_columns, columns)

    spec = NetworkSpec.of(network.with_params(params), examples(batches.inputs, 0))
    return scale * _matrix_of(mb.summed(batch_sums, batches), *_arrangement(spec))


def ggn_in_float64(
    network: Network,
    likelihood: Likelihood,
    inputs: PyTree[Shaped[ArrayLike, "N ..."]],
    weights: Real[ArrayLike, "N ..."],
    *,
    points: Float[ArrayLike, "N ..."] | None = None,
    microbatch: int,
) -> Float[np.ndarray, "P P"]:
    """Compute the matrix of `ggn` at the network's weights, with products and sums in float64. Call it outside `jit`.

    In float32 the entries of G are off by eps times the largest ones. So are its eigenvalues, and a prior precision
    below that is lost among them. Here only the derivatives are in float32. An error of eps in them moves an eigenvalue
    lambda by eps sqrt(lambda lambda_max), and zero by eps^2 lambda_max.

    Cost and memory: as for `ggn`, with numbers twice as long.
    """
    count = num_examples(inputs)
    num_parts = math.ceil(count / microbatch)
    # Sums of several microbatches together, because each addition reads and writes the whole matrix.
    num_calls = math.ceil(num_parts / max(1, EXAMPLES_AT_ONCE // microbatch))
    num_parts = math.ceil(num_parts / num_calls) * num_calls
    # Padding repeats a real example at weight zero, as in `microbatch.split`.
    index = np.arange(num_parts * math.ceil(count / num_parts)).reshape(num_calls, num_parts // num_calls, -1)
    inside = np.minimum(index, count - 1)
    weights = jnp.asarray(weights, number_type(network.params))
    of_examples, _ = mb.within_factor(weights, likelihood.factor_mv)
    present = np.where(index < count, np.asarray(of_examples)[inside], 0)
    columns = _columns_at_once(index[0].size, math.prod(output_shape(network, inputs)[1:]))
    sums = None
    for parts, of_parts in zip(inside, present, strict=True):
        for numbers in columns:
            groups = _groups_at(network, likelihood, inputs, weights, points, parts, numbers)
            with jax.enable_x64(True):
                if sums is None:
                    # From the host: each shape that JAX made zeros of would be compiled.
                    shapes = jax.eval_shape(_terms, groups, of_parts)
                    sums = jax.tree.map(lambda leaf: jnp.asarray(np.zeros(leaf.shape, leaf.dtype)), shapes)
                sums = _with_groups(sums, groups, of_parts)
    arrangement = _arrangement(NetworkSpec.of(network, inputs))
    with jax.enable_x64(True):
        return np.asarray(_matrix_of(sums, *arrangement))


@jax.jit
def _groups_at(
    network: Network,
    likelihood: Likelihood,
    inputs: PyTree,
    weights: Float[Array, "N ..."],
    points: Float[Array, "N ..."] | None,
    index: Int[Array, "num m"],
    numbers: Int[Array, " k"],
) -> list[Factors]:
    """Compute some rows of B' J for the examples of some microbatches."""

    def of_part(index: Int[Array, " m"]) -> list[Factors]:
        passed = tapped.forward(network, network.params, examples(inputs, index))
        there = None if points is None else points[index]
        _, factor_mv = mb.within_factor(weights[index], likelihood.factor_mv, there)
        return _groups(passed, factor_mv, numbers)

    by_part = jax.lax.map(of_part, index)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), by_part)


@partial(jax.jit, donate_argnums=0)
def _with_groups(sums: list[Array], groups: list[Factors], weights: Float[Array, "num m"]) -> list[Array]:
    """Add the sums of some examples."""
    return jax.tree.map(jnp.add, sums, _terms(groups, weights))


def _terms(groups: list[Factors], weights: Float[AnyArray, "num m"]) -> list[Array]:
    """Sum the products of each pair of groups over examples, in float64."""
    groups, weights = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (groups, weights.reshape(-1)))
    return [_summed(groups[i], groups[j], weights) for i, j in _pairs(len(groups))]


@lru_cache(maxsize=64)
def _arrangement(spec: NetworkSpec) -> tuple[tuple[Layout | None, ...], tuple["_Place", ...]]:
    """Layouts of the groups, and places of the leaves among them."""
    weights = find(spec.network(), spec.example.batch(2))
    return tuple(_layouts(weights)), tuple(_places(weights))


@partial(jax.jit, static_argnums=(1, 2))
def _matrix_of(
    sums: list[Array], layouts: tuple[Layout | None, ...], places: tuple["_Place", ...]
) -> Float[Array, "P P"]:
    """Assemble the matrix from the sums of each pair of groups."""
    blocks = [
        _block(layouts[i], layouts[j], pair_sum) for (i, j), pair_sum in zip(_pairs(len(layouts)), sums, strict=True)
    ]
    return _assembled(blocks, places)


# Inputs or outputs of a layer up to which the symmetry of its block halves the work for each of them.
MOST_PACKED = 1024
# Examples whose sums in float64 are taken together: more of them need arrays that do not stay in the cache.
EXAMPLES_AT_ONCE = 256
# Numbers in the cotangents of a microbatch, one for each output, that are in memory at a time.
MOST_COTANGENTS = 2**24

# The leaves of the weights are in groups: each layer of one position is a group of its own, and all other weights
# together are the last one.


def _columns_at_once(num_examples: int, num_outputs: int) -> Int[np.ndarray, "num k"]:
    """Divide the numbers of an example's outputs into as many equal rows as memory asks for.

    The last numbers may be past the last output.
    """
    num = math.ceil(num_outputs / max(1, MOST_COTANGENTS // (num_examples * num_outputs)))
    return np.arange(num * math.ceil(num_outputs / num)).reshape(num, -1)


def _groups(
    passed: tapped.Pass, factor_mv: Callable[[Array, Array], Array], numbers: Int[ArrayLike, " k"]
) -> list[Factors]:
    """Compute some rows of B' J for each example, one group of weights after another."""
    leaves = jacobian(passed, numbers[None], factor_mv=factor_mv).leaves
    layers = [leaf.factors() for leaf in leaves if leaf.is_single]
    others = [leaf.rows() for leaf in leaves if not leaf.is_single]
    return [*layers, Factors(None, jnp.concatenate(others, axis=-1))] if others else layers


def _pairs(count: int) -> list[tuple[int, int]]:
    return [(i, j) for i in range(count) for j in range(i, count)]


def _summed(first: Factors, second: Factors, weights: Float[Array, " M"]) -> Float[Array, "..."]:
    """Sum w_m (a_m a'_m) kron (sum_k d_km d'_km) over examples m, for inputs a and derivatives d of both groups.

    A group without inputs has the second factor alone. The result is packed if both groups are the same layer, because
    both factors are symmetric then.
    """
    left, right = first.derivatives[:, 0] * weights[:, None, None], second.derivatives[:, 0]
    if first.inputs is None:  # then the other group is the same, as this is the last one
        return einsum("mkp,mkq->pq", left, right)
    moments = einsum("mko,mkq->moq", left, right)
    if second.inputs is None:
        return einsum("mi,moq->ioq", first.inputs, moments)
    products = first.inputs[:, :, None] * second.inputs[:, None, :]
    # The places of the entries of wide factors would be large arrays in the compiled program.
    if first is second and max(products.shape[-1], moments.shape[-1]) <= MOST_PACKED:
        return einsum("mi,mo->io", _packed(products), _packed(moments))
    return einsum("mij,moq->ijoq", products, moments)


def _packed(symmetric: Float[Array, "M n n"]) -> Float[Array, "M t"]:
    """The lower triangle of each matrix, row by row."""
    rows, columns = np.tril_indices(symmetric.shape[-1])
    return symmetric[:, rows, columns]


def _unpacked(packed: Float[Array, "..."], axis: int) -> Float[Array, "..."]:
    """Invert `_packed` along an axis, which becomes two."""
    number = math.isqrt(2 * packed.shape[axis])
    place = np.zeros((number, number), int)
    place[np.tril_indices(number)] = np.arange(packed.shape[axis])
    return jnp.take(packed, np.maximum(place, place.T), axis=axis)


def _block(first: Layout | None, second: Layout | None, sums: Float[Array, "..."]) -> Float[Array, "p q"]:
    """Turn the result of `_summed` into a matrix with rows and columns in the order of the weights."""
    if first is None:
        return sums
    if second is None:
        return from_matrix(jnp.moveaxis(sums, 2, 0), first.segments).T
    if sums.ndim == 2:
        sums = _unpacked(_unpacked(sums, 1), 0)
    columns = from_matrix(jnp.swapaxes(sums, 1, 2), second.segments)
    return from_matrix(jnp.moveaxis(columns, 2, 0), first.segments).T


def _layouts(weights: Weights) -> list[Layout | None]:
    """The layout of each group; None for the group of all other weights."""
    single = _single(weights)
    others = weights.entries or weights.rest or len(single) < len(weights.layers)
    return [*(weights.layers[leaf].layout for leaf in single), *([None] if others else [])]


def _single(weights: Weights) -> list[int]:
    """The leaves that are layers of one position."""
    return [leaf for leaf in sorted(weights.layers) if weights.layers[leaf].positions == 1]


class _Place(NamedTuple):
    """Where a leaf is: in which group, and which of its numbers, from `first` to before `end`."""

    group: int
    first: int
    end: int


def _places(weights: Weights) -> list[_Place]:
    """The place of each leaf among the groups."""
    single = _single(weights)
    places, start = [], 0
    for number, leaf in enumerate(weights.jaxpr.params):
        count = math.prod(leaf.aval.shape)
        if number in single:
            places.append(_Place(single.index(number), 0, count))
        else:
            places.append(_Place(len(single), start, start + count))
            start += count
    return places


def _assembled(blocks: list[Array], places: Sequence[_Place]) -> Float[Array, "P P"]:
    """Assemble the whole matrix from the blocks of each group with itself and the later ones."""
    known = dict(zip(_pairs(1 + max(place.group for place in places)), blocks, strict=True))

    def block(first: _Place, second: _Place) -> Float[Array, "p q"]:
        i, j = first.group, second.group
        group_block = known[i, j] if i <= j else known[j, i].T
        return group_block[first.first : first.end, second.first : second.end]

    return jnp.block([[block(first, second) for second in places] for first in places])
