"""The Jacobian of a network's outputs as a backward pass leaves it: inputs and derivatives of each layer.

A row of J is a kron g for a dense layer with inputs a, g being the derivative of the output with respect to what the
layer gives. I + O numbers stand for I O, all outputs of an example have their a in common, and whatever is made of
rows of J is made faster from the factors: a norm of them from a^2 and g^2, a product with a matrix by a first.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from bnnlaplace.core.linalg import einsum, matmul
from bnnlaplace.curvature import tapped
from bnnlaplace.curvature.layers import find
from bnnlaplace.curvature.layout import Layout, as_matrices, as_matrix
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Outline


class Factors(NamedTuple):
    """The derivatives with respect to one leaf, with nothing left to sum over but what is made of them.

    Attributes
    ----------
    inputs
        a of each example, (M, I), of a layer that multiplies once for each example; None for any other leaf.
    derivatives
        g in O columns, or the p derivatives themselves: of M examples, U groups of C outputs.
    """

    inputs: Float[Array, "M I"] | None
    derivatives: Float[Array, "M U C p"]

    def weighted(self, weights: Float[Array, "..."]) -> Float[Array, "M U C C"]:
        """J diag(w) J' within each group, w being of shape (I, O) or (p,) and not negative.

        Cost: I O multiplications for each example where there are inputs, C p for each output otherwise.
        """
        if self.inputs is None:
            return inner_products(self.derivatives, weights.reshape(-1))
        return inner_products(self.derivatives, matmul(self.inputs**2, weights)[:, None, None])


class LeafJacobian(NamedTuple):
    """The derivatives of M examples, in U groups of C outputs, with respect to one leaf of the weights.

    Attributes
    ----------
    inputs
        What a layer multiplies at each of T positions, (M, T, I); None for a leaf that is the matrix of none.
    derivatives
        With respect to the outputs of the layer, (M, U, C, T, O); to the leaf itself, (M, U, C, p), where it is none.
    layout
        How the leaf is a matrix, or None.
    """

    inputs: Float[Array, "M T I"] | None
    derivatives: Float[Array, "M U C ..."]
    layout: Layout | None

    @property
    def is_single(self) -> bool:
        """Whether it is a layer that multiplies once for each example."""
        return self.inputs is not None and self.inputs.shape[1] == 1

    @property
    def size(self) -> int:
        """The number of weights."""
        width = self.derivatives.shape[-1]
        return width if self.inputs is None else self.inputs.shape[-1] * width

    def rows(self) -> Float[Array, "M U C p"]:
        """The derivatives with respect to each weight of the leaf, in its own order."""
        return self.derivatives if self.inputs is None else self.layout.flat(self._matrices())

    def as_matrix(self, flat: Float[Array, " p"]) -> Float[Array, "..."]:
        """Numbers for each weight in the shape that `Factors.weighted` of `factors()` takes."""
        return flat if self.layout is None else as_matrix(flat, self.layout.segments)

    def factors(self) -> Factors:
        """Of this leaf; for several positions the sum over them, rows of the matrix slowest."""
        if self.inputs is None:
            return Factors(None, self.derivatives)
        if self.is_single:
            return Factors(self.inputs[:, 0], self.derivatives[..., 0, :])
        matrices = self._matrices()
        return Factors(None, matrices.reshape(*matrices.shape[:3], -1))

    def rotated(self, rows: Float[Array, "I I"], columns: Float[Array, "O O"]) -> "LeafJacobian":
        """In other coordinates of the layer's matrix W, those of rows' W columns; its `layout` is that of W still."""
        return self._replace(inputs=matmul(self.inputs, rows), derivatives=matmul(self.derivatives, columns))

    def _matrices(self) -> Float[Array, "M U C I O"]:
        return einsum("mti,mucto->mucio", self.inputs, self.derivatives)


class Jacobian(NamedTuple):
    """The derivatives of outputs with respect to all weights.

    Attributes
    ----------
    leaves
        In the order of `jax.tree.leaves` of the weights, and with it of the flat vector.
    """

    leaves: list[LeafJacobian]

    @property
    def sizes(self) -> list[int]:
        """The number of weights in each leaf."""
        return [leaf.size for leaf in self.leaves]

    def rows(self) -> Float[Array, "M U C P"]:
        """J itself. Memory: P numbers for each output."""
        return jnp.concatenate([leaf.rows() for leaf in self.leaves], axis=-1)

    def times(self, matrix: Float[Array, "q R"]) -> Float[Array, "M U C R"]:
        """J matrix, its last P - q rows being zero.

        Cost: of a layer with one position, I inputs and O columns, I O R multiplications for each example and O R for
        each output, or I O R for each output where those are fewer or hardly more; of all else p R for each output.
        Memory: O R numbers for each example where inputs come first.
        """
        # All layers in one product, and all else in another: small ones are slow.
        derivatives, met, rows, parts = [], [], [], []
        start = 0
        for leaf in self.leaves:
            if start >= len(matrix):
                break
            part = matrix[start : start + leaf.size]
            start += leaf.size
            part = jnp.pad(part, ((0, leaf.size - len(part)), (0, 0)))
            if leaf.is_single and _inputs_first(math.prod(leaf.derivatives.shape[1:3]), leaf.inputs.shape[-1]):
                derivatives.append(leaf.derivatives[..., 0, :])
                met.append(einsum("mi,ior->mor", leaf.inputs[:, 0], as_matrices(part, leaf.layout.segments)))
            else:
                rows.append(leaf.rows())
                parts.append(part)
        found = []
        if met:
            pair = jnp.concatenate(derivatives, axis=-1), jnp.concatenate(met, axis=1)
            found.append(einsum("muco,mor->mucr", *pair))
        if rows:
            found.append(matmul(jnp.concatenate(rows, axis=-1), jnp.concatenate(parts)))
        return sum(found[1:], found[0])


class JacobianSize(NamedTuple):
    """How many numbers a `Jacobian` holds, and what is computed from it at most.

    Attributes
    ----------
    example
        Of each example: the inputs of layers.
    output
        Of each output: derivatives, with those with respect to weights where they are formed.
    layers
        Inputs and columns of each layer that has one position.
    """

    example: int
    output: int
    layers: tuple[tuple[int, int], ...]

    def columns(self, num_outputs: int) -> int:
        """Of the layers whose inputs are met first in `Jacobian.times`, for as many outputs of each example.

        Parameters
        ----------
        num_outputs
            U times C.
        """
        return sum(columns for rows, columns in self.layers if _inputs_first(num_outputs, rows))


def _inputs_first(num_outputs: int, rows: int) -> bool:
    """Whether meeting the inputs of a layer first saves enough arithmetic to be worth its memory."""
    return num_outputs * rows >= 5 * (num_outputs + rows)


def jacobian(passed: tapped.Pass, numbers: Int[Array, "U C"], at_once: int | None = None) -> Jacobian:
    """The derivatives of some of the outputs of each example.

    Cost: a backward pass for each of them, without the gradients of layers.

    Parameters
    ----------
    passed
        A forward pass of M examples.
    numbers
        Of the outputs of an example, in groups. The derivatives of one that there is not are zero.
    at_once
        How many of them go through a backward pass together; by default all.
    """
    found = tapped.at_columns(passed.gradients, passed.outputs, numbers.reshape(-1), at_once)

    def leaf(number: int, derivatives: Float[Array, "K M ..."]) -> LeafJacobian:
        grouped = jnp.moveaxis(derivatives, 0, 1).reshape(derivatives.shape[1], *numbers.shape, *derivatives.shape[2:])
        layer = passed.weights.layers.get(number)
        if layer is None:
            return LeafJacobian(None, grouped.reshape(*grouped.shape[:3], -1), None)
        return LeafJacobian(passed.layer_inputs[number], grouped, layer.layout)

    return Jacobian([leaf(number, found[number]) for number in sorted(found)])


def size_of_jacobian(network: Network, inputs: PyTree[Float[Array, "N ..."]]) -> JacobianSize:
    """Count the numbers of a Jacobian; of `inputs` shape and dtype are used alone.

    Parameters
    ----------
    network, inputs
        What is differentiated, and where.
    """
    return _size(Outline.of(network, inputs))


@lru_cache(maxsize=64)
def _size(outline: Outline) -> JacobianSize:
    weights = find(outline.network(), outline.example.batch(2))
    example, output, layers = 0, 0, []
    for leaf, variable in enumerate(weights.equations.params):
        count, layer = math.prod(variable.aval.shape), weights.layers.get(leaf)
        if layer is None:
            output += 2 * count
            continue
        rows = math.prod(size for size, is_row in layer.layout.segments if is_row)
        example += layer.positions * rows
        output += layer.positions * (count // rows)
        if layer.positions > 1:
            output += 2 * count
        else:
            layers.append((rows, count // rows))
    return JacobianSize(example, output, tuple(layers))


def inner_products(
    rows: Float[Array, "M U C p"], weights: Float[Array, "..."] | float = 1.0
) -> Float[Array, "M U C C"]:
    """The inner products of the rows of each group; differentiable also where weights are zero.

    Parameters
    ----------
    rows
        Of M examples, U groups of C.
    weights
        Of the p numbers of a row; may differ between examples, (M, 1, 1, p).
    """
    if rows.shape[2] == 1:
        return jnp.sum(rows**2 * weights, axis=-1, keepdims=True)
    found = einsum("mucp,mudp->mucd", rows * weights, rows)
    return (found + jnp.swapaxes(found, -1, -2)) / 2
