"""The one check of weights that a user hands over against those of a network: paths, shapes, types and numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described, leaf_names
from bnnlaplace.model.boxes import unboxed

_MOST_NAMES = 5  # of wrong weights in a message


def like_weights(
    params: PyTree, expected: PyTree, where: str, *, finite: bool = False, like: str = "network.params"
) -> PyTree:
    """Return weights in the containers of `expected`, or raise ValueError unless they fit.

    Only paths count: a `FrozenDict` is taken for a dictionary, and boxes of Flax are opened. Weights may be of any
    floating-point type.

    Parameters
    ----------
    params
        What the user gave.
    expected
        The weights of the network.
    where
        What messages call `params`.
    finite
        Whether the numbers must be finite, in the type in which JAX uses them, too. Traced ones pass.
    like
        What messages call `expected`.
    """
    params = unboxed(params)
    names = leaf_names(expected)
    given = dict(zip(leaf_names(params), jax.tree.leaves(params), strict=True))
    if jax.tree.structure(params) == jax.tree.structure(expected):
        leaves = jax.tree.leaves(params)
    elif len(set(names)) == len(names) and set(names) == set(given) and len(jax.tree.leaves(params)) == len(names):
        leaves = [given[name] for name in names]
    else:
        _refuse(where, like, _other_paths(params, names, list(given)))
    wanted = jax.tree.leaves(expected)
    faults = [_fault(*entry, finite) for entry in zip(leaves, wanted, strict=True)]
    wrong = [f"{name!r:.80} {fault}" for name, fault in zip(names, faults, strict=True) if fault]
    if wrong:
        _refuse(where, like, _some(wrong))
    return jax.tree.unflatten(jax.tree.structure(expected), [_as_array(leaf) for leaf in leaves])


def _refuse(where: str, like: str, got: str) -> None:
    raise ValueError(
        f"{where} must be weights like {like}, floating-point arrays with its paths and shapes; got {got}; "
        f"pass what was trained from these weights, or jax.tree.map(jnp.zeros_like, {like})"
    )


def _some(words: list[str]) -> str:
    others = f" and {len(words) - _MOST_NAMES} more" if len(words) > _MOST_NAMES else ""
    return ", ".join(words[:_MOST_NAMES]) + others


def _other_paths(params: PyTree, names: list[str], given: list[str]) -> str:
    """Say in which paths the weights differ."""
    missing = [f"{name!r:.80}" for name in names if name not in given]
    unknown = [f"{name!r:.80}" for name in given if name not in names]
    if jax.tree_util.all_leaves([params]) or not given:
        return described(params)
    parts = [f"no {_some(missing)}"] * bool(missing) + [f"{_some(unknown)}, which the network has not"] * bool(unknown)
    return " and ".join(parts) or f"a {type(params).__name__} with these paths in another order"


def _fault(leaf: Any, wanted: Any, finite: bool) -> str | None:
    """What is wrong with one array of weights; None if nothing."""
    if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, float)):
        return f"that is a {type(leaf).__name__}"
    if np.ma.is_masked(leaf):
        return "that is masked"
    if np.shape(leaf) != wanted.shape:
        return f"of shape {np.shape(leaf)} for {wanted.shape}"
    dtype = jnp.result_type(float) if isinstance(leaf, float) and not hasattr(leaf, "dtype") else leaf.dtype
    if not checks.is_usable_float(dtype):
        return f"of type {dtype}"
    if finite and not isinstance(leaf, jax.core.Tracer) and not checks.is_finite(leaf):
        return f"with NaN or infinite numbers in {jax.dtypes.canonicalize_dtype(dtype)}"
    return None


def _as_array(leaf: Any) -> Any:
    """The array itself; of a masked one without masked entries, and of a number, the array."""
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
