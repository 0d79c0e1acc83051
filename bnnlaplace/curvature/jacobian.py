"""The Jacobian of a network's outputs in the form in which a backward pass leaves it: inputs and derivatives of layers.

For a dense layer with inputs a, a row of J is a kron g, where g is the derivative of the output with respect to what
the layer returns. So I + O numbers stand for I O, and all outputs of an example share their a. Whatever is computed
from rows of J is faster from the factors: a norm from a^2 and g^2, a product with a matrix by multiplying with a first.

For a layer whose outputs are those of the network, g is a unit vector (see `bnnlaplace.curvature.direct`). Then no
backward pass is needed, all examples share their g, and a product with g picks a number.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int, PyTree, Real

from bnnlaplace.core.linalg import einsum, matmul
from bnnlaplace.core.tree import summed_type
from bnnlaplace.curvature import tapped
from bnnlaplace.curvature.direct import direct_leaves
from bnnlaplace.curvature.head import num_narrow_features
from bnnlaplace.curvature.layers import find
from bnnlaplace.curvature.layout import Layout, as_matrices, as_matrix
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec


class Factors(NamedTuple):
    """The derivatives with respect to one leaf, with the sum over positions already taken.

    Attributes
    ----------
    inputs
        a of each example, (M, I), if the leaf is a layer that multiplies once for each example. None for any other
        leaf.
    derivatives
        g in O columns, or without inputs the p derivatives themselves, for M examples with U groups of C outputs. A
        leading axis of one stands for derivatives that all examples share.
    places
        Where the derivatives are unit vectors: in which column each of them has its one. None for any others.
    """

    inputs: Float[Array, "M I"] | None
    derivatives: Float[Array, "m U C p"]
    places: Int[ArrayLike, "U C"] | None = None

    def weighted(self, weights: Float[Array, "..."]) -> Float[Array, "M U C C"]:
        """Compute J diag(w) J' within each group, for weights w of shape (I, O) or (p,) that are not negative.

        Cost: with inputs I O multiplications for each example, and C O for each output. Nothing is multiplied with unit
        vectors. Shared derivatives without inputs give one result, (1, U, C, C), for all examples.
        """
        if self.places is not None:
            diagonal = picked(weights, self.places, axis=-1)
            diagonal = diagonal[None] if self.inputs is None else einsum("mi,iuc->muc", self.inputs**2, diagonal)
            return diagonal[..., None] * jnp.eye(diagonal.shape[-1], dtype=diagonal.dtype)
        of_columns = weights.reshape(1, -1) if self.inputs is None else matmul(self.inputs**2, weights)
        if len(self.derivatives) == 1:
            return _shared_inner_products(self.derivatives[0], of_columns)
        return inner_products(self.derivatives, of_columns[:, None, None])


class LeafJacobian(NamedTuple):
    """The derivatives of M examples, in U groups of C outputs, with respect to one leaf of the weights.

    Attributes
    ----------
    inputs
        What a layer multiplies at each of T positions, (M, T, I). None for a leaf that is not a layer.
    derivatives
        With inputs the derivatives with respect to the outputs of the layer, (M, U, C, T, O). Without them the
        derivatives with respect to the leaf itself, (M, U, C, p).
    layout
        How the leaf forms a matrix. None without inputs.
    places
        As for `Factors`. Derivatives that all examples share have a leading axis of one.
    """

    inputs: Float[Array, "M T I"] | None
    derivatives: Float[Array, "m U C ..."]
    layout: Layout | None
    places: Int[ArrayLike, "U C"] | None = None

    @property
    def is_single(self) -> bool:
        """Whether it is a layer that multiplies once for each example."""
        return self.inputs is not None and self.inputs.shape[1] == 1

    @property
    def size(self) -> int:
        """Number of weights in the leaf."""
        width = self.derivatives.shape[-1]
        return width if self.inputs is None else self.inputs.shape[-1] * width

    def rows(self) -> Float[Array, "m U C p"]:
        """Form the derivatives with respect to each weight, in the order in which the leaf stores its weights.

        Shared derivatives without inputs remain shared.
        """
        return self.derivatives if self.inputs is None else self.layout.flat(self._matrices())

    def as_matrix(self, flat: Real[ArrayLike, " p"]) -> Real[ArrayLike, "..."]:
        """Arrange one number for each weight in the shape that `Factors.weighted` of `factors()` takes."""
        return flat if self.layout is None else as_matrix(flat, self.layout.segments)

    def factors(self) -> Factors:
        """Take the sum over positions. If there are several, the rows of the layer's matrix are slowest."""
        if self.inputs is None:
            return Factors(None, self.derivatives, self.places)
        if self.is_single:
            return Factors(self.inputs[:, 0], self.derivatives[..., 0, :], self.places)
        matrices = self._matrices()
        return Factors(None, matrices.reshape(*matrices.shape[:3], -1))

    def rotated(self, rows: Float[Array, "I I"], columns: Float[Array, "O O"]) -> "LeafJacobian":
        """Change the coordinates of the layer's matrix W to rows' W columns. `layout` remains that of W."""
        inputs = matmul(self.inputs, rows)
        if self.places is None:
            return self._replace(inputs=inputs, derivatives=matmul(self.derivatives, columns))
        derivatives = picked(columns, self.places, axis=0)
        return LeafJacobian(inputs, derivatives[None, :, :, None], self.layout)

    def times_inputs(self, block: Float[Array, "p R"]) -> Float[Array, "m O R"]:
        """Multiply the inputs of a layer with one position by R columns of weights; a bias has the inputs one."""
        if self.inputs is None:
            return block[None]
        return einsum("mi,ior->mor", self.inputs[:, 0], as_matrices(block, self.layout.segments))

    def _matrices(self) -> Float[Array, "M U C I O"]:
        derivatives = jnp.broadcast_to(self.derivatives, (len(self.inputs), *self.derivatives.shape[1:]))
        return einsum("mti,mucto->mucio", self.inputs, derivatives)


class Jacobian(NamedTuple):
    """The derivatives of outputs with respect to all weights.

    Attributes
    ----------
    leaves
        One for each leaf of the weights, in the order of `jax.tree.leaves`, which is that of the flat vector.
    """

    leaves: list[LeafJacobian]

    @property
    def sizes(self) -> list[int]:
        """Number of weights in each leaf."""
        return [leaf.size for leaf in self.leaves]

    @property
    def num_examples(self) -> int:
        """M."""
        return max(len(leaf.derivatives if leaf.inputs is None else leaf.inputs) for leaf in self.leaves)

    def rows(self) -> Float[Array, "M U C P"]:
        """Form J itself. Memory: P numbers for each output."""
        return _joined([leaf.rows() for leaf in self.leaves], self.num_examples)

    def times(self, matrix: Float[ArrayLike, "q R"]) -> Float[Array, "M U C R"]:
        """Multiply J by a matrix. If the matrix has q rows of P, the missing last rows are taken as zero.

        Cost of a layer with one position, I inputs and O columns: I O R multiplications for each example and O R for
        each output, or I O R for each output if that is less or hardly more. All other leaves cost p R for each output.
        Nothing is multiplied with unit vectors. Memory: O R numbers for each example of a layer whose inputs are
        multiplied first.
        """
        # One product for all layers, and one for all other leaves, because small products are slow.
        derivatives, input_products, rows, blocks, products = [], [], [], [], []
        start = 0
        for leaf in self.leaves:
            if start >= len(matrix):
                break
            block = matrix[start : start + leaf.size]
            start += leaf.size
            block = jnp.pad(block, ((0, leaf.size - len(block)), (0, 0)))
            if leaf.places is not None:
                products.append(picked(leaf.times_inputs(block), leaf.places, axis=1))
            elif leaf.is_single and _inputs_first(math.prod(leaf.derivatives.shape[1:3]), leaf.inputs.shape[-1]):
                derivatives.append(leaf.derivatives[..., 0, :])
                input_products.append(leaf.times_inputs(block))
            else:
                rows.append(leaf.rows())
                blocks.append(block)
        if input_products:
            factors = jnp.concatenate(derivatives, axis=-1), jnp.concatenate(input_products, axis=1)
            products.append(einsum("muco,mor->mucr", *factors))
        if rows:
            products.append(matmul(_joined(rows, self.num_examples), jnp.concatenate(blocks)))
        total = sum(products[1:], products[0])
        return jnp.broadcast_to(total, (self.num_examples, *total.shape[1:]))


class JacobianSize(NamedTuple):
    """How many numbers a `Jacobian` holds, including those that are formed from it.

    Attributes
    ----------
    example
        The numbers for each example: the inputs of layers.
    output
        The numbers for each output: derivatives, and derivatives with respect to weights if they are formed.
    shared
        The numbers for each output that all examples share: unit vectors, or what a structure makes of them.
    layers
        (inputs, columns) of each layer that has one position.
    features
        How many features have derivatives from which those of all outputs follow; 0 if that does not pay.
    """

    example: int
    output: int
    shared: int
    layers: tuple[tuple[int, int], ...]
    features: int

    def columns(self, num_outputs: int) -> int:
        """Count the columns of the layers whose inputs `Jacobian.times` multiplies first.

        Parameters
        ----------
        num_outputs
            U times C, the number of outputs of each example.
        """
        return sum(columns for rows, columns in self.layers if _inputs_first(num_outputs, rows))


def _inputs_first(num_outputs: int, rows: int) -> bool:
    """Whether multiplying by the inputs of a layer first saves enough arithmetic to be worth its memory."""
    # For each column of layer and matrix, an example costs `rows + num_outputs` multiplications with inputs first, and
    # `rows * num_outputs` otherwise. Only a fivefold saving pays for the array of intermediate products.
    return num_outputs * rows >= 5 * (num_outputs + rows)


def jacobian(
    passed: tapped.Pass,
    numbers: Int[ArrayLike, "U C"],
    at_once: int | None = None,
    *,
    factor_mv: Callable[[Float[Array, "M ... C"], Float[Array, "M ... C"]], Float[Array, "M ... C"]] | None = None,
    of_features: dict[int, Float[Array, "H M ..."]] | None = None,
) -> Jacobian:
    """Differentiate some of the outputs of each example.

    Cost: a backward pass for each of them, without the gradients of layers; none if all leaves are direct, or the
    derivatives of the features are at hand.

    Parameters
    ----------
    passed
        A forward pass of M examples.
    numbers
        The numbers of the outputs, in U groups. An index past the last output gives zero rows (padding).
    at_once
        How many of them go through a backward pass together; by default all.
    factor_mv
        A function (f, u) -> B u, such as that of a likelihood. With it the result is made of rows of B' J instead of J.
    of_features
        What `feature_derivatives` returned; not with `factor_mv`.
    """

    count, shape = len(passed.outputs), numbers.shape
    # The columns of a factor B differ between examples, so that they are not shared.
    direct = passed.direct if factor_mv is None else frozenset()
    leaves = range(len(passed.weights.jaxpr.params))
    # A bias alone does not tell the number of examples: its derivatives are repeated for each.
    is_shared = any(leaf in passed.layer_inputs for leaf in leaves)

    def gradients(column: Float[Array, "M ... C"]) -> dict[int, Float[Array, "M ..."]]:
        cotangent = column if factor_mv is None else factor_mv(passed.outputs, column)
        return {leaf: g for leaf, g in passed.gradients(cotangent).items() if leaf not in direct}

    derivatives = {}
    if of_features is not None:
        columns = picked(passed.head.kernel, numbers.reshape(-1), axis=1)
        derivatives = {leaf: einsum("hk,h...->k...", columns, each) for leaf, each in of_features.items()}
    elif len(direct) < len(leaves):
        derivatives = tapped.at_columns(gradients, passed.outputs, numbers.reshape(-1), at_once)

    def leaf_jacobian(leaf: int) -> LeafJacobian:
        layer = passed.weights.layers.get(leaf)
        if leaf in direct:
            dtype = summed_type(passed.weights.jaxpr.params[leaf].aval.dtype)
            unit = jax.nn.one_hot(numbers, passed.outputs.shape[1], dtype=dtype)[None]
            unit = unit if is_shared else jnp.broadcast_to(unit, (count, *unit.shape[1:]))
            if layer is None:
                return LeafJacobian(None, unit, None, numbers if is_shared else None)
            return LeafJacobian(passed.layer_inputs[leaf], unit[..., None, :], layer.layout, numbers)
        by_example = jnp.moveaxis(derivatives[leaf], 0, 1)
        grouped = by_example.reshape(count, *shape, *by_example.shape[2:])
        if layer is None:
            return LeafJacobian(None, grouped.reshape(*grouped.shape[:3], -1), None)
        return LeafJacobian(passed.layer_inputs[leaf], grouped, layer.layout)

    return Jacobian([leaf_jacobian(leaf) for leaf in leaves])


def feature_derivatives(passed: tapped.Pass, at_once: int | None = None) -> dict[int, Float[Array, "H M ..."]]:
    """Differentiate the features of a narrow head in all weights before it: a backward pass for each of them.

    Parameters
    ----------
    passed
        A forward pass of M examples.
    at_once
        How many features go through a backward pass together; by default all.
    """
    num_features = len(passed.head.kernel)
    features = jnp.zeros((len(passed.outputs), num_features), passed.head.kernel.dtype)
    return tapped.at_columns(passed.head.differentiate(), features, np.arange(num_features), at_once)


def size_of_jacobian(network: Network, inputs: PyTree) -> JacobianSize:
    """Count the numbers of a Jacobian. Only shape and type of `inputs` are used."""
    return _size(NetworkSpec.of(network, inputs))


@lru_cache(maxsize=64)
def _size(spec: NetworkSpec) -> JacobianSize:
    weights = find(spec.network(), spec.example.batch(2))
    direct = direct_leaves(weights)
    example, output, shared, layers = 0, 0, 0, []
    for leaf, variable in enumerate(weights.jaxpr.params):
        count, layer = math.prod(variable.aval.shape), weights.layers.get(leaf)
        if layer is None:
            # As the backward pass leaves them, and joined with those of other leaves.
            shared, output = (shared + 2 * count, output) if leaf in direct else (shared, output + 2 * count)
            continue
        rows = math.prod(size for size, is_row in layer.layout.segments if is_row)
        example += layer.positions * rows
        if leaf in direct:
            shared += 2 * (count // rows)
        else:
            output += layer.positions * (count // rows)
        if layer.positions > 1:
            output += 2 * count  # the sum over positions forms the derivatives in the weights, and joins them
        else:
            layers.append((rows, count // rows))
    return JacobianSize(example, output, shared, tuple(layers), num_narrow_features(weights, direct))


def picked(array: Float[Array, "..."], places: Int[ArrayLike, "..."], *, axis: int) -> Float[Array, "..."]:
    """Take the numbers at the places of unit vectors along an axis; zero past the end, where vectors are zero."""
    return jnp.take(array, jnp.asarray(places), axis=axis, mode="fill", fill_value=0)


def _joined(rows: list[Float[Array, "_ U C _"]], count: int) -> Float[Array, "M U C P"]:
    """Join the rows of leaves, repeating those that all examples share."""
    return jnp.concatenate([jnp.broadcast_to(leaf, (count, *leaf.shape[1:])) for leaf in rows], axis=-1)


def _shared_inner_products(rows: Float[Array, "U C p"], weights: Float[Array, "M p"]) -> Float[Array, "M U C C"]:
    """Compute the inner products of rows that all examples share, under weights that differ between examples."""
    if rows.shape[1] == 1:
        return einsum("mp,up->mu", weights, rows[:, 0] ** 2)[..., None, None]
    products = einsum("mucp,udp->mucd", rows * weights[:, None, None], rows)
    return (products + jnp.swapaxes(products, -1, -2)) / 2


def inner_products(
    rows: Float[Array, "M U C p"], weights: Float[ArrayLike, "..."] | float = 1.0
) -> Float[Array, "M U C C"]:
    """Compute the inner products of the rows of each group. They are differentiable even if weights are zero.

    Parameters
    ----------
    rows
        U groups of C rows for each of M examples.
    weights
        A weight for each of the p numbers of a row. They may differ between examples: (M, 1, 1, p).
    """
    if rows.shape[2] == 1:
        return jnp.sum(rows**2 * weights, axis=-1, keepdims=True)
    # The weights stand on one side, because the derivative of their square root is not finite at zero. Rounding then
    # differs between the two triangles, so the mean with the transpose makes the result symmetric.
    products = einsum("mucp,mudp->mucd", rows * weights, rows)
    return (products + jnp.swapaxes(products, -1, -2)) / 2
