"""Pytrees: flat vectors of them (the one place that ravels), and classes that are some."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey
from jaxtyping import Array, Float, Int, PyTree


def summed_type(dtype: Any) -> Any:
    """What numbers of a type are summed in: float32 at least, as the sums of this package are long."""
    return jnp.promote_types(dtype, jnp.float32)


def concatenated(tree: PyTree) -> Float[Array, " P"]:
    """All leaves, in the order of `jax.tree.leaves`, as one vector."""
    return ravel_pytree(tree)[0]


def ravel(tree: PyTree) -> Float[Array, " P"]:
    """The same of weights and their gradients, in float32 at least."""
    vector = concatenated(tree)
    return vector.astype(summed_type(vector.dtype))


def unraveler(tree: PyTree) -> Callable[[Float[Array, " P"]], Any]:
    """Return the map from a vector of `size(tree)` numbers to the structure, shapes and dtypes of `tree`.

    `tree` may hold arrays, tracers or `jax.ShapeDtypeStruct`s: only its structure and shapes are used, so that the
    result holds no array alive.
    """
    leaves, treedef = jax.tree.flatten(tree)
    shapes, dtypes = [leaf.shape for leaf in leaves], [leaf.dtype for leaf in leaves]
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()

    def unravel(vector: Float[Array, " P"]) -> Any:
        parts = jnp.split(vector, ends)
        filled = [p.reshape(s).astype(d) for p, s, d in zip(parts, shapes, dtypes, strict=True)]
        return jax.tree.unflatten(treedef, filled)

    return unravel


def number_type(tree: PyTree) -> jnp.dtype:
    """The type that `ravel` gives, without making the vector."""
    return summed_type(jnp.result_type(*jax.tree.leaves(tree)))


def size(tree: PyTree) -> int:
    """Count the numbers in all leaves."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def num_examples(inputs: PyTree[Float[Array, "N ..."]]) -> int:
    """The length of the leading axis of the leaves."""
    return jax.tree.leaves(inputs)[0].shape[0]


def examples(inputs: PyTree[Float[Array, "N ..."]], index: Any) -> PyTree[Float[Array, "M ..."]]:
    """Some of the examples, which lie along the leading axis: by an array, a slice, or None for a batch of one."""
    return jax.tree.map(lambda leaf: leaf[index], inputs)


def as_vector(value: PyTree, like: PyTree) -> Float[Array, " P"]:
    """Broadcast a scalar, a vector or a pytree with the structure of `like` to one number per weight.

    Raises
    ------
    ValueError
        If `value` has neither no dimension, nor one number per weight, nor the structure of `like`.
    """
    count, structure = size(like), jax.tree.structure(value)
    if structure == jax.tree.structure(0) and jnp.shape(value) in ((), (count,)):
        return jnp.broadcast_to(jnp.asarray(value), (count,))
    if structure == jax.tree.structure(like):
        try:
            return ravel(jax.tree.map(lambda part, leaf: jnp.broadcast_to(part, leaf.shape), value, like))
        except ValueError:  # of leaves that do not broadcast
            pass
    raise ValueError(
        f"a value per weight must be a scalar, a vector of {count} numbers or a pytree like the weights; "
        f"got {described(value)}; try a scalar"
    )


def described(value: Any) -> str:
    """What messages say they got: the shape of an array, of anything else its type and itself."""
    return f"shape {value.shape}" if hasattr(value, "shape") else f"{type(value).__name__} {value!r:.80}"


def leaf_names(tree: PyTree) -> list[str]:
    """The path of each leaf, in the order of `jax.tree.leaves`: ``layer/kernel``.

    Parameters
    ----------
    tree
        Any pytree, such as `network.params`.
    """
    return [path_name(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(tree)]


def path_name(keys: Sequence[Any]) -> str:
    """A path as checkpoints store it: ``params/layer/kernel``; a tree that is one leaf is called ``value``."""
    return "/".join(str(path_entry(key)[1]) for key in keys) or "value"


def path_entry(key: Any) -> tuple[str, Any]:
    """Whether one step of a path is an index or a key, and which."""
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


class Floating(NamedTuple):
    """The leaves of a tree that can be differentiated, apart from the rest of it.

    Attributes
    ----------
    leaves
        The floating-point leaves.
    fill
        Others in their place -> the tree.
    cotangent
        Their cotangents -> a tree of cotangents, with None for what cannot be differentiated.
    """

    leaves: list[Array]
    fill: Callable[[list[Array]], Any]
    cotangent: Callable[[list[Array]], Any]


def floating(tree: PyTree) -> Floating:
    """Take a tree apart into what can be differentiated and what cannot."""
    leaves, structure = jax.tree.flatten(tree)
    active = [jnp.issubdtype(jnp.result_type(leaf), jnp.inexact) for leaf in leaves]

    def put(rest: list[Any], replacements: list[Array]) -> Any:
        following = iter(replacements)
        return jax.tree.unflatten(structure, [next(following) if a else r for r, a in zip(rest, active, strict=True)])

    kept = [leaf for leaf, is_active in zip(leaves, active, strict=True) if is_active]
    return Floating(kept, partial(put, leaves), partial(put, [None] * len(leaves)))


def squared_norm(tree: PyTree) -> float:
    """The sum of squares of all numbers, in float64 on the host."""
    vector = np.asarray(ravel(tree), np.float64)
    return float(vector @ vector)


def register_unchecked(data_fields: tuple[str, ...], meta_fields: tuple[str, ...]) -> Callable[[type], type]:
    """Register a frozen dataclass as a pytree, as `jax.tree_util.register_dataclass` does, but past its constructor.

    JAX rebuilds pytrees with leaves that are no arrays, or batches of them, which a constructor that checks its
    arguments would refuse.
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


# Sums over groups of weights.
def group_sums(per_weight: Float[Array, "... P"], groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "... g"]:
    """Sum over the weights of each group, in float64."""
    values = np.asarray(per_weight, np.float64)
    flat = values.reshape(-1, values.shape[-1])
    count = int(groups.max()) + 1
    sums = [np.bincount(groups, weights=row, minlength=count) for row in flat]
    return np.stack(sums).reshape(*values.shape[:-1], count)
