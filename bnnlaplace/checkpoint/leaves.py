"""The leaves of a saved pytree: the record of each in metadata.json, and the trees that are made of them again."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.checkpoint.errors import CheckpointError, Damage, shown
from bnnlaplace.core import checks
from bnnlaplace.core.tree import path_entry, path_name

# Deeper trees would end the recursion of Python.
_MAX_DEPTH = 200
# NumPy has no arrays of more axes.
_MAX_AXES = 64


class Leaf(NamedTuple):
    """What metadata.json records of a leaf.

    Attributes
    ----------
    path
        Such as ``params/layer/kernel``.
    keys
        The steps of the path: ("index", position) or ("key", name).
    shape, dtype
        Of the leaf; of random keys the shape and the type that JAX shows.
    prng
        The name of the generator if the leaf holds random keys.
    sha256
        The digest of its bytes. None if it has no bytes, or release 0.1.0 wrote it.
    """

    path: str
    keys: tuple[tuple[str, int | str], ...]
    shape: tuple[int, ...]
    dtype: str
    prng: str | None = None
    sha256: str | None = None

    @property
    def stored(self) -> tuple[tuple[int, ...], np.dtype]:
        """Shape and type of the array on disk: of random keys that of their data."""
        if self.prng is None:
            return self.shape, jnp.dtype(self.dtype)
        data = _key_data(self.prng)
        return self.shape + data.shape, np.dtype(data.dtype)

    @property
    def num_bytes(self) -> int:
        """How many bytes the array has. A Python integer, so that no claim is too large to be compared."""
        shape, dtype = self.stored
        return math.prod(shape) * dtype.itemsize

    def as_json(self) -> dict[str, Any]:
        """The record as metadata.json holds it, without what is None."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def _key_data(prng: str) -> jax.ShapeDtypeStruct:
    """Shape and type of the data of one random key. Nothing is computed."""
    return jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=prng)))


# --- a tree and its records -----------------------------------------------------------------------------------------


def describe(tree: Any) -> list[tuple[Leaf, Any]]:
    """Return a record for each leaf of a tree, with the array to be stored.

    Raises
    ------
    TypeError, ValueError
        As for `save_pytree`.
    """
    described: dict[str, tuple[Leaf, Any]] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = path_name(keys)
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic)):
            raise TypeError(
                f"every leaf of `save_pytree(tree=...)` must be an array; got {type(leaf).__name__} at {name!r}; "
                "convert it, or put it into the metadata"
            )
        checks.unmasked(leaf, f"`save_pytree(tree=...)`: {name!r:.200}")
        if name in described:
            raise ValueError(f"leaf paths must differ; got {name!r} twice; rename one of the two keys")
        if len(keys) > _MAX_DEPTH:
            raise ValueError(f"leaves must be at most {_MAX_DEPTH} levels deep; got {len(keys)}; flatten the tree")
        record = Leaf(name, tuple(path_entry(key) for key in keys), *signature(leaf))
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            record = record._replace(prng=str(jax.random.key_impl(leaf)))
            leaf = jax.random.key_data(leaf)
        elif not _is_number(leaf.dtype):
            raise TypeError(f"arrays must be numeric; got dtype {leaf.dtype} at {name!r}; put it into the metadata")
        described[name] = record, leaf
    return list(described.values())


def signature(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Shape and dtype. What is not an array gets its type as the dtype, so it differs from every stored leaf."""
    return tuple(getattr(leaf, "shape", ())), str(getattr(leaf, "dtype", type(leaf).__name__))


def _is_number(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)


# --- records that somebody else may have written --------------------------------------------------------------------


def parse_leaves(records: Any) -> list[Leaf]:
    """Check the records of a metadata.json. Raise Damage at the first that `describe` could not have made."""
    if not isinstance(records, list):
        raise Damage("has no list of leaves")
    leaves = [_parse_leaf(record) for record in records]
    if len({leaf.path for leaf in leaves}) < len(leaves):
        raise Damage("declares a leaf twice")
    _check_tree(leaves)
    return leaves


def _parse_leaf(record: Any) -> Leaf:
    """Check one record by itself."""
    if not isinstance(record, dict) or not {"path", "keys", "shape", "dtype"} <= set(record) <= set(Leaf._fields):
        raise Damage("declares a leaf that has not a path, keys, a shape and a dtype")
    path, keys, shape, dtype = record["path"], record["keys"], record["shape"], record["dtype"]
    if not isinstance(path, str) or not isinstance(keys, list) or not all(_is_step(key) for key in keys):
        raise Damage(f"declares the leaf {path!r:.80} at a path that no leaf has")
    if len(keys) > _MAX_DEPTH or path != ("/".join(str(key) for _, key in keys) or "value"):
        raise Damage(f"declares the leaf {path!r:.80} at another path than its keys")
    if not isinstance(shape, list) or len(shape) > _MAX_AXES or not all(_is_count(length) for length in shape):
        raise Damage(f"declares {path!r:.80} with the shape {shape!r:.80}, which no array has")
    texts = [dtype, record.get("prng", ""), record.get("sha256", "")]
    leaf = Leaf(path, tuple((kind, key) for kind, key in keys), tuple(shape), *texts)
    leaf = leaf._replace(prng=record.get("prng"), sha256=record.get("sha256"))
    if not all(isinstance(text, str) for text in texts) or not _has_type(leaf):
        raise Damage(f"declares {path!r:.80} with the type {dtype!r:.80}, which no array has")
    # NumPy refuses lengths whose product overflows even if another length is zero.
    if math.prod(length for length in shape if length) * leaf.stored[1].itemsize >= 2**63:
        raise Damage(f"declares {path!r:.80} with the shape {shape!r:.80}, which no array has")
    return leaf


def _is_step(key: Any) -> bool:
    """Whether it is one step of a path."""
    if not isinstance(key, list) or len(key) != 2:
        return False
    kind, name = key
    return _is_count(name) if kind == "index" else kind == "key" and (isinstance(name, str) or _is_integer(name))


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_count(value: Any) -> bool:
    return _is_integer(value) and value >= 0


def _has_type(leaf: Leaf) -> bool:
    """Whether the dtype is the name of one, as `signature` writes it."""
    try:
        if leaf.prng is not None:
            return str(jax.eval_shape(lambda: jax.random.key(0, impl=leaf.prng)).dtype) == leaf.dtype
        # NumPy reads names of records and of arrays of arrays, too, such as "i4,f8".
        is_name = leaf.dtype.removeprefix(">").isalnum() or leaf.dtype.replace("_", "").isalnum()
        dtype = jnp.dtype(leaf.dtype) if is_name else None
    except (TypeError, ValueError):
        return False
    return dtype is not None and _is_number(dtype) and str(dtype) == leaf.dtype


def _check_tree(leaves: Sequence[Leaf]) -> None:
    """Raise Damage if a leaf lies inside another one, or a container is both a list and a dictionary."""
    kinds: dict[tuple, str] = {}
    ends = {leaf.keys for leaf in leaves}
    for leaf in leaves:
        for depth, (kind, _) in enumerate(leaf.keys):
            container = leaf.keys[:depth]
            if container in ends or kinds.setdefault(container, kind) != kind:
                raise Damage(f"declares {leaf.path!r:.80} where another leaf is")


# --- trees of arrays by path ----------------------------------------------------------------------------------------


def check_like(path: Path, leaves: Sequence[Leaf], like: Any) -> None:
    """Raise CheckpointError unless the stored leaves have the paths, shapes and dtypes of `like`."""
    stored = {leaf.path: (leaf.shape, leaf.dtype) for leaf in leaves}
    expected = {path_name(keys): signature(leaf) for keys, leaf in jax.tree_util.tree_flatten_with_path(like)[0]}
    differing = [name for name in {**expected, **stored} if expected.get(name) != stored.get(name)]
    if not differing:
        return

    def described(side: dict[str, tuple[tuple[int, ...], str]]) -> str:
        if differing[0] not in side:
            return "nothing"
        shape, dtype = side[differing[0]]
        return f"{dtype}{list(shape)}"

    others = f" ({len(differing) - 1} more leaves differ)" if len(differing) > 1 else ""
    raise CheckpointError(
        f"the checkpoint must have the structure asked for; {shown(path)} holds {described(stored)} at "
        f"{differing[0]!r:.200} where {described(expected)} is expected{others}; load it with the model and settings "
        "it was saved with"
    )


def filled(like: Any, arrays: dict[str, Any]) -> Any:
    """Replace every leaf of `like` by the array of its path."""
    expected, structure = jax.tree_util.tree_flatten_with_path(like)
    return jax.tree_util.tree_unflatten(structure, [_as_in(leaf, arrays[path_name(keys)]) for keys, leaf in expected])


def _as_in(like: Any, array: Any) -> Any:
    return array if isinstance(like, (np.ndarray, np.generic)) else jnp.asarray(array)


def nested(leaves: Sequence[Leaf], arrays: dict[str, Any]) -> Any:
    """Build dictionaries and lists from the recorded paths."""
    root: dict[Any, Any] = {}
    for leaf in leaves:
        node = root
        *parents, last = [("root", None), *leaf.keys]
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = arrays[leaf.path]

    def build(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        if node and all(kind == "index" for kind, _ in node):
            return [build(child) for _, child in sorted(node.items(), key=lambda item: item[0][1])]
        return {key: build(child) for (_, key), child in node.items()}

    return build(root.get(("root", None), {}))
