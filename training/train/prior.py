"""The prior precision of a run: one number for all weights, or a dictionary with one for each layer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.core.tree import leaf_names
from bnnlaplace.prior import by_layer, group_names


def initial_precision(precision: float, structure: str, params: Any) -> Any:
    """Return the precision before the first step, as arrays."""
    if structure == "scalar":
        return jnp.float32(precision)
    return {name: jnp.float32(precision) for name in group_names(params, by_layer)}


def by_leaf(precision: Any, params: Any) -> Any:
    """Return a pytree like the weights that holds the precision of each array."""
    names, tree = leaf_names(params), jax.tree.structure(params)
    numbers = [precision[by_layer(name)] if isinstance(precision, dict) else precision for name in names]
    return jax.tree.unflatten(tree, numbers)


def geometric_mean(precision: Any, params: Any) -> float:
    """Return the precision, or its geometric mean over the weights: the number that `Laplace` multiplies ratios by."""
    if not isinstance(precision, dict):
        return float(precision)
    leaves = jax.tree.leaves(params)
    logs = [np.log(float(number)) for number in jax.tree.leaves(by_leaf(precision, params))]
    return float(np.exp(np.average(logs, weights=[leaf.size for leaf in leaves])))


def by_layer_or_none(precision: Any) -> dict[str, float] | None:
    """Return the precision of each layer as numbers; None if all weights have the same."""
    return {name: float(number) for name, number in precision.items()} if isinstance(precision, dict) else None
