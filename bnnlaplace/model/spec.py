"""Shapes and types of a network and its inputs, without their numbers.

A spec is hashable and compared by value, so that what a trace of the network finds out is remembered for the next fit.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from bnnlaplace.core.tree import num_examples
from bnnlaplace.model.network import Network


@dataclass(frozen=True)
class Shapes:
    """The structure of a pytree of arrays, and the shape and type of each leaf.

    Attributes
    ----------
    structure
        The structure of the tree.
    leaves
        The shape and the type of each leaf.
    """

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, arrays: PyTree) -> "Shapes":
        """Record the shapes of whole arrays."""
        leaves, structure = jax.tree.flatten(arrays)
        return cls(structure, tuple((tuple(leaf.shape), _dtype(leaf)) for leaf in leaves))

    @classmethod
    def of_example(cls, arrays: PyTree) -> "Shapes":
        """Record the shapes of one example of `arrays`, which have the examples along their leading axis."""
        whole = cls.of(arrays)
        return cls(whole.structure, tuple((shape[1:], dtype) for shape, dtype in whole.leaves))

    def arrays(self) -> PyTree[jax.ShapeDtypeStruct]:
        """Return abstract arrays of these shapes."""
        return self.structure.unflatten([jax.ShapeDtypeStruct(*leaf) for leaf in self.leaves])

    def batch(self, size: int) -> PyTree[jax.ShapeDtypeStruct]:
        """Return abstract arrays of these shapes, with a leading axis of length `size` in addition."""
        return self.structure.unflatten([jax.ShapeDtypeStruct((size, *shape), dtype) for shape, dtype in self.leaves])


class NetworkSpec(NamedTuple):
    """A network and one example without their numbers.

    Attributes
    ----------
    forward
        The forward pass of the network.
    weights
        The shapes of its `params` and `frozen`.
    example
        The shapes of one example of the inputs.
    """

    forward: Callable[[PyTree, PyTree, Any], Any]
    weights: Shapes
    example: Shapes

    @classmethod
    def of(cls, network: Network, inputs: PyTree) -> "NetworkSpec":
        """Describe a network and its inputs (N, ...). Both may be traced or abstract."""
        return cls(network.forward, Shapes.of((network.params, network.frozen)), Shapes.of_example(inputs))

    def network(self) -> Network:
        """Return the network with abstract arrays in place of its weights."""
        return Network(self.forward, *self.weights.arrays())


def output_shape(network: Network, inputs: PyTree) -> tuple[int, ...] | str:
    """Shape of the outputs, by abstract evaluation.

    If the network does not return one array of real floating-point numbers: what it returns, in words.

    Parameters
    ----------
    network
        The network. Its weights are not read.
    inputs
        N examples, or abstract arrays.
    """
    count = num_examples(inputs)
    # A module that flattens its inputs may not take a batch without examples.
    shape = _output_shape(NetworkSpec.of(network, inputs), max(count, 1))
    return shape if count else (0, *shape[1:])


def check_outputs(shape: tuple[int, ...] | str, count: int) -> None:
    """Raise ValueError unless the shape of the outputs for `count` examples is (count, ..., C).

    A string in place of the shape stands for outputs that are not one array; see `output_shape`.
    """
    if isinstance(shape, str) or len(shape) < 2 or shape[0] != count or 0 in shape[1:]:
        advice = "; add an axis: outputs[:, None]" if shape == (count,) else ""
        raise ValueError(
            "a network's outputs must be one array of shape (B, C), or (B, ..., C) with several positions, of real "
            f"floating-point numbers; got {shape} for {count} examples{advice}"
        )


def shape_or_fault(outputs: Any) -> tuple[int, ...] | str:
    """Shape of outputs. If they are not one array of real floating-point numbers: what they are, in words."""
    if not hasattr(outputs, "shape"):
        return type(outputs).__name__
    if not jnp.issubdtype(outputs.dtype, jnp.floating):
        return f"{outputs.dtype.name} numbers"
    return outputs.shape


def call_refused(what: str, inputs: PyTree, error: Exception) -> ValueError:
    """The error for inputs at which a network raised `error`. `what` says what the inputs must be."""
    message = str(error).strip().split("\n", 1)[0]
    return ValueError(
        f"{what}; with inputs of {shapes_in_words(signatures(inputs))} the network raised {type(error).__name__}: "
        f"{message:.200}"
    )


def signatures(arrays: PyTree) -> list[tuple[tuple[int, ...], str]]:
    """Shape of one example and type, for each leaf."""
    return [(leaf.shape[1:], leaf.dtype.name) for leaf in jax.tree.leaves(arrays)]


def shapes_in_words(signatures: list[tuple[tuple[int, ...], str]]) -> str:
    """Signatures in words, such as float32[B,4], int32[B]."""
    return ", ".join(f"{dtype}[B{''.join(f',{extent}' for extent in shape)}]" for shape, dtype in signatures)


@lru_cache(maxsize=64)
def _output_shape(spec: NetworkSpec, count: int) -> tuple[int, ...] | str:
    params, frozen = spec.weights.arrays()

    def outputs(params: PyTree, frozen: PyTree, inputs: PyTree) -> Any:
        return Network(spec.forward, params, frozen)(params, inputs)

    abstract = jax.eval_shape(outputs, params, frozen, spec.example.batch(count))
    return shape_or_fault(abstract)


def _dtype(leaf: Any) -> Any:
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return leaf.dtype if is_key else jnp.result_type(leaf)
