"""What is known of a network before any number is: its forward pass, and the shapes and types of what enters it.

Compared by value, and hashable: what a trace finds out is remembered for the next fit of the same network.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import num_examples
from bnnlaplace.model.network import Network


@dataclass(frozen=True)
class Shapes:
    """Of a pytree of arrays: its structure, and shape and type of each leaf.

    Attributes
    ----------
    structure
        The tree.
    leaves
        Shape and type of each.
    """

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, arrays: PyTree[Array]) -> "Shapes":
        """Those of whole arrays."""
        leaves, structure = jax.tree.flatten(arrays)
        return cls(structure, tuple((tuple(leaf.shape), _dtype(leaf)) for leaf in leaves))

    @classmethod
    def of_example(cls, arrays: PyTree[Float[Array, "N ..."]]) -> "Shapes":
        """Those of one example, of which there are some along the leading axis."""
        whole = cls.of(arrays)
        return cls(whole.structure, tuple((shape[1:], dtype) for shape, dtype in whole.leaves))

    def arrays(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Arrays without numbers."""
        return self.structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in self.leaves])

    def batch(self, size: int) -> PyTree[jax.ShapeDtypeStruct]:
        """The same with a leading axis more."""
        return self.structure.unflatten([jax.ShapeDtypeStruct((size, *shape), dtype) for shape, dtype in self.leaves])


class Outline(NamedTuple):
    """A network and one example, without their numbers.

    Attributes
    ----------
    forward
        Of the network.
    weights
        Of `params` and `frozen`.
    example
        Of the inputs.
    """

    forward: Callable[[PyTree, PyTree, Array], Array]
    weights: Shapes
    example: Shapes

    @classmethod
    def of(cls, network: Network, inputs: PyTree[Float[Array, "N ..."]]) -> "Outline":
        """That of a network and its inputs, examples along the leading axis; both may be traced."""
        return cls(network.forward, Shapes.of((network.params, network.frozen)), Shapes.of_example(inputs))

    def network(self) -> Network:
        """The network, with arrays without numbers."""
        return Network(self.forward, *self.weights.arrays())


def output_shape(network: Network, inputs: PyTree[Float[Array, "N ..."]]) -> tuple[int, ...] | str:
    """The shape of the outputs, of which nothing is computed; where they are no array, the name of what they are.

    Parameters
    ----------
    network
        At any weights.
    inputs
        N examples, or abstract arrays.
    """
    count = num_examples(inputs)
    shape = _output_shape(Outline.of(network, inputs), max(count, 1))  # a module may not take none, where it flattens
    return shape if count else (0, *shape[1:])


def check_outputs(shape: tuple[int, ...] | str, count: int) -> None:
    """Check the shape of the outputs of `count` examples, as `output_shape` says it.

    Raises
    ------
    ValueError
        If it is not (count, ..., C).
    """
    if isinstance(shape, str) or len(shape) < 2 or shape[0] != count:
        raise ValueError(
            "a network's outputs must be one array of shape (B, C), or (B, ..., C) with several positions; got "
            f"{shape} for {count} examples"
        )


@lru_cache(maxsize=64)
def _output_shape(outline: Outline, count: int) -> tuple[int, ...] | str:
    params, frozen = outline.weights.arrays()

    def outputs(params: PyTree, frozen: PyTree, inputs: PyTree) -> Any:
        return Network(outline.forward, params, frozen)(params, inputs)

    found = jax.eval_shape(outputs, params, frozen, outline.example.batch(count))
    return getattr(found, "shape", type(found).__name__)


def _dtype(leaf: Array) -> Any:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf.dtype if is_key else jnp.result_type(leaf)
