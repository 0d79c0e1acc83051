"""Weights in boxes of metadata, as Flax puts them there for sharding: what is inside, and the boxes again.

`nn.with_partitioning` wraps a weight of Linen in `nn.Partitioned`, and the state of an NNX model holds `nnx.Variable`s.
A box is a node of the pytree, so it would lengthen the path of its weight: kernel and bias of a layer would no longer
have one parent, and would be two groups of the prior.
"""

import sys
from typing import Any

import jax
from jaxtyping import PyTree


def unboxed(tree: PyTree) -> PyTree:
    """Replace every box by its content. The leaves and their order stay the same."""
    boxes = _box_types()
    if not boxes:
        return tree
    return jax.tree.map(lambda node: _content(node, boxes), tree, is_leaf=lambda node: isinstance(node, boxes))


def _content(node: Any, boxes: tuple[type, ...]) -> PyTree:
    if not isinstance(node, boxes):
        return node
    # The leaves rather than `unbox()`, which would apply a constraint of sharding.
    leaves = jax.tree.leaves(node)
    return unboxed(leaves[0]) if len(leaves) == 1 else leaves


def _box_types() -> tuple[type, ...]:
    """The classes of boxes. Where Flax is not imported, nothing can be in a box of it."""
    meta, variables = sys.modules.get("flax.core.meta"), sys.modules.get("flax.nnx.variablelib")
    return (*([meta.AxisMetadata] if meta else []), *([variables.Variable] if variables else []))
