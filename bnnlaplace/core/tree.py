"""Pytrees of weights as flat vectors, their leaves by name and by kind, and classes that are pytrees."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from jaxtyping import Array, Float, Int, Num, PyTree, Shaped

from bnnlaplace.core.types import AnyArray

# --- trees as vectors: the one place that ravels ----------------------------------------------------------------


def summed_type(dtype: Any) -> np.dtype:
    """Type in which numbers of `dtype` are summed: float32 at least, because the sums of this package are long."""
    return jnp.promote_types(dtype, jnp.float32)


def number_type(tree: PyTree) -> np.dtype:
    """Type of the vector that `ravel` returns, without making the vector."""
    return summed_type(jnp.result_type(*jax.tree.leaves(tree)))


def size(tree: PyTree) -> int:
    """Count the numbers in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def concatenated(tree: PyTree) -> Num[Array, " P"]:
    """Concatenate all leaves, in the order of `jax.tree.leaves`, to one vector of their common type."""
    return ravel_pytree(tree)[0]


def ravel(tree: PyTree) -> Float[Array, " P"]:
    """Concatenate all leaves to one vector of float32 or a wider type: for weights and their gradients."""
    vector = concatenated(tree)
    return vector.astype(summed_type(vector.dtype))


def unraveler(tree: PyTree) -> Callable[[Num[AnyArray, " P"]], Any]:
    """Return the map from a vector of `size(tree)` numbers to the structure, shapes and dtypes of `tree`.

    `tree` may hold arrays, tracers or `jax.ShapeDtypeStruct`s. The map keeps only its structure and shapes, so it holds
    no array in memory.
    """
    leaves, structure = jax.tree.flatten(tree)
    shapes, dtypes = [leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()

    def unravel(vector: Num[AnyArray, " P"]) -> Any:
        pieces = jnp.split(vector, ends)
        restored = [
            piece.reshape(shape).astype(dtype) for piece, shape, dtype in zip(pieces, shapes, dtypes, strict=True)
        ]
        return jax.tree.unflatten(structure, restored)

    return unravel


def squared_norm(tree: PyTree) -> float:
    """Sum the squares of all numbers, in float64 on the host."""
    vector = np.asarray(ravel(tree), np.float64)
    return float(vector @ vector)


# --- one number per weight --------------------------------------------------------------------------------------


def as_vector(value: PyTree, like: PyTree) -> Num[Array, " P"]:
    """Broadcast a scalar, a vector or a pytree with the structure of `like` to one number per weight.

    Raises
    ------
    ValueError
        If `value` is none of the three.
    """
    count, structure = size(like), jax.tree.structure(value)
    is_leaf = structure == jax.tree.structure(0)
    if is_leaf and jnp.shape(value) in ((), (count,)):
        return jnp.broadcast_to(jnp.asarray(value), (count,))
    if structure == jax.tree.structure(like):
        try:
            return ravel(jax.tree.map(lambda numbers, leaf: jnp.broadcast_to(numbers, leaf.shape), value, like))
        except ValueError:  # leaves that do not broadcast: the message below says what would
            pass
    raise ValueError(
        f"a value per weight must be a scalar, a vector of {count} numbers or a pytree like the weights; "
        f"got {described(value)}; try a scalar"
    )


def group_sums(
    per_weight: Num[Array | np.ndarray, "... P"], groups: Int[np.ndarray, " P"]
) -> Float[np.ndarray, "... g"]:
    """Sum over the weights of each group, in float64. `groups` holds the number of each weight's group."""
    values = np.asarray(per_weight, np.float64)
    rows = values.reshape(-1, values.shape[-1])
    num_groups = int(groups.max()) + 1
    sums = [np.bincount(groups, weights=row, minlength=num_groups) for row in rows]
    return np.stack(sums).reshape(*values.shape[:-1], num_groups)


def described(value: Any) -> str:
    """Describe an argument in a message, on one line: an array by its shape, anything else by its type and itself."""
    if hasattr(value, "shape"):
        return f"shape {value.shape}"
    return f"{type(value).__name__} {on_one_line(value)}"


def on_one_line(value: Any) -> str:
    """The beginning of what Python prints of a value."""
    return f"{' '.join(repr(value).split()):.80}"


# --- examples along the leading axis ----------------------------------------------------------------------------


def num_examples(inputs: PyTree[Shaped[Any, "N ..."]]) -> int:
    """Length of the leading axis, which all leaves share."""
    return jax.tree.leaves(inputs)[0].shape[0]


def examples(inputs: PyTree, index: Any) -> PyTree:
    """Select examples by an array of indices or a slice; None turns one example into a batch of one."""
    return jax.tree.map(lambda leaf: leaf[index], inputs)


# --- names of leaves --------------------------------------------------------------------------------------------


def leaf_names(tree: PyTree) -> list[str]:
    """Return the path of each leaf, such as ``layer/kernel``, in the order of `jax.tree.leaves`.

    Parameters
    ----------
    tree
        Any pytree, for example `network.params`.
    """
    return [path_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def path_name(keys: Sequence[Any]) -> str:
    """Write a path as checkpoints store it: ``params/layer/kernel``. A tree that is one leaf is called ``value``."""
    return "/".join(str(path_entry(key)[1]) for key in keys) or "value"


def path_entry(key: Any) -> tuple[str, int | str]:
    """Take one step of a path apart: ("index", position) in a sequence, ("key", name) in a dictionary or a record."""
    match key:
        case SequenceKey(idx=index):
            return "index", index
        case FlattenedIndexKey(key=index):
            return "index", index
        case GetAttrKey(name=field):
            return "key", field
        case DictKey(key=entry):
            return "key", entry if isinstance(entry, (int, str)) else str(entry)
    return "key", str(key)


# --- leaves that can be differentiated --------------------------------------------------------------------------


class Floating(NamedTuple):
    """The leaves of a tree that can be differentiated, and the way back to the tree.

    Attributes
    ----------
    leaves
        The floating-point leaves.
    fill
        Puts others in their place and returns the tree.
    cotangent
        Puts their cotangents in their place and returns a tree with None for every other leaf.
    """

    leaves: list[Any]
    fill: Callable[[Sequence[Any]], Any]
    cotangent: Callable[[Sequence[Any]], Any]


def floating(tree: PyTree) -> Floating:
    """Separate the leaves that can be differentiated from the rest of a tree."""
    leaves, structure = jax.tree.flatten(tree)
    is_floating = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def put(others: list[Any], replacements: Sequence[Any]) -> Any:
        remaining = iter(replacements)
        merged = [next(remaining) if put_here else kept for kept, put_here in zip(others, is_floating, strict=True)]
        return jax.tree.unflatten(structure, merged)

    differentiable = [leaf for leaf, keep in zip(leaves, is_floating, strict=True) if keep]
    return Floating(differentiable, partial(put, leaves), partial(put, [None] * len(leaves)))


# --- classes that are pytrees -----------------------------------------------------------------------------------


def register_unchecked(data_fields: tuple[str, ...], meta_fields: tuple[str, ...]) -> Callable[[type], type]:
    """Register a frozen dataclass as a pytree whose reconstruction skips the constructor.

    `jax.tree_util.register_dataclass` calls the constructor. JAX also rebuilds pytrees from leaves that are not arrays,
    and from batches of arrays, which a constructor that checks its arguments would refuse.
    """

    def flatten(record: Any) -> tuple[list[tuple[GetAttrKey, Any]], tuple[Any, ...]]:
        children = [(GetAttrKey(name), getattr(record, name)) for name in data_fields]
        return children, tuple(getattr(record, name) for name in meta_fields)

    def register(cls: type) -> type:
        def unflatten(meta: tuple[Any, ...], children: Iterable[Any]) -> Any:
            record = object.__new__(cls)
            for name, value in zip((*data_fields, *meta_fields), (*children, *meta), strict=True):
                object.__setattr__(record, name, value)
            return record

        jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
        return cls

    return register
