"""A batch as users hand it over: a pair of inputs and targets, in arrays of any library."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.core.tree import described, num_examples
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.model import arrays

# What messages call the data.
_X, _Y = "fit(data=(x, y)): x", "fit(data=(x, y)): y"


class Pair(NamedTuple):
    """A batch that is converted and checked."""

    inputs: Inputs
    targets: AnyArray


def is_pair_of_arrays(data: Any) -> bool:
    """Whether it is inputs and targets, and not an iterable of batches. Targets may be a list of numbers."""
    if not isinstance(data, (tuple, list)) or len(data) != 2:
        return False
    if not arrays.is_array(data[1]) and not arrays.is_list_of_numbers(data[1]):
        return False
    leaves = jax.tree.leaves(data[0])
    return bool(leaves) and all(map(arrays.is_array, leaves))


def as_pair(batch: Any, *, is_checked: bool = False) -> Pair:
    """Convert a batch to arrays of JAX. Unless `is_checked`, its numbers must be finite in the types that they get."""
    if isinstance(batch, Pair):
        return batch
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise not_a_pair(batch)
    x, y = arrays.as_arrays(batch[0], _X), as_targets(batch[1], _Y)
    counts = num_examples(x), len(y)
    if 0 in counts or counts[0] != counts[1]:
        raise ValueError(
            f"fit(data=(x, y)) must hold as many targets as inputs, and at least one; got {counts[0]} inputs and "
            f"{counts[1]} targets"
        )
    if not is_checked:
        for leaf in jax.tree.leaves(x):
            arrays.check_finite(leaf, _X)
    # Which targets may be infinite or NaN, a likelihood knows: see `check_targets`.
    arrays.check_fits_type(y, _Y)
    return Pair(jax.tree.map(jnp.asarray, x), jnp.asarray(y))


def as_targets(targets: Any, where: str) -> AnyArray:
    """Convert targets to an array; lists of numbers are taken too."""
    if isinstance(targets, (list, tuple)):
        try:
            targets = np.asarray(targets)
        except (ValueError, TypeError):  # lists of different lengths
            raise ValueError(f"{where} must be one array; got {described(targets)}; pass jnp.asarray(y)") from None
    return arrays.as_array(targets, where)


def not_a_pair(value: Any) -> ValueError:
    """The error for data, or a batch of them, that is not a pair."""
    return ValueError(
        "fit(data=...) must be two arrays (x, y), or an iterable of batches, each such a pair; got "
        f"{type(value).__name__} for a batch; pass (jnp.asarray(x), jnp.asarray(y))"
    )
