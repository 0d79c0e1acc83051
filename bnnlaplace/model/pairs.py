"""A batch as users hand it over: inputs, targets and perhaps weights of the examples, in arrays of any library."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described, examples, num_examples
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.model import arrays

# What messages call the data.
_X, _Y, _W = "fit(data=(x, y)): x", "fit(data=(x, y)): y", "fit(data=(x, y, w)): w"


class Pair(NamedTuple):
    """A batch that is converted and checked.

    Attributes
    ----------
    inputs, targets
        Arrays of JAX.
    weights
        How many times each example counts; None if each counts once. Examples that do not count come last, and are
        copies of one that does.
    """

    inputs: Inputs
    targets: AnyArray
    weights: Float[np.ndarray, " B"] | None = None

    @property
    def is_absent(self) -> bool:
        """Whether no example counts."""
        return self.weights is not None and not self.weights.any()


def is_pair_of_arrays(data: Any) -> bool:
    """Whether it is inputs, targets and perhaps weights, and not an iterable of batches.

    Targets and weights may be lists of numbers.
    """
    if not isinstance(data, (tuple, list)) or len(data) not in (2, 3):
        return False
    if not all(arrays.is_array(numbers) or arrays.is_list_of_numbers(numbers) for numbers in data[1:]):
        return False
    leaves = jax.tree.leaves(data[0])
    return bool(leaves) and all(map(arrays.is_array, leaves))


def as_pair(batch: Any, *, is_checked: bool = False) -> Pair:
    """Convert a batch to arrays of JAX. Unless `is_checked`, its numbers must be finite in the types that they get."""
    if isinstance(batch, Pair):
        return batch
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise not_a_pair(batch)
    checks.known("fit(data=...)", batch)
    x, y = arrays.as_arrays(batch[0], _X), as_targets(batch[1], _Y)
    counts = num_examples(x), len(y)
    if 0 in counts or counts[0] != counts[1]:
        raise ValueError(
            f"fit(data=(x, y)) must hold as many targets as inputs, and at least one; got {counts[0]} inputs and "
            f"{counts[1]} targets"
        )
    weights = None if len(batch) == 2 else example_weights(batch[2], counts[0], _W)
    if weights is not None and 0 < np.count_nonzero(weights) < len(weights):
        # What an example of weight zero holds, such as NaN for an unknown target, must not be looked at.
        index = present_first(weights)
        x, y, weights = examples(x, index), y[index], np.where(np.sort(weights == 0), 0, weights[index])
    if not is_checked and (weights is None or weights.any()):
        for leaf in jax.tree.leaves(x):
            arrays.check_finite(leaf, _X)
    # Which targets may be infinite or NaN, a likelihood knows: see `check_targets`.
    arrays.check_fits_type(y, _Y)
    return Pair(jax.tree.map(jnp.asarray, x), jnp.asarray(y), weights)


@contextmanager
def in_batch(number: int | None) -> Iterator[None]:
    """Say in an error which batch it is about; None if the data are not batches."""
    try:
        yield
    except (ValueError, TypeError) as error:
        if number is None:
            raise
        kind = TypeError if isinstance(error, TypeError) else ValueError  # others may take other arguments
        raise kind(f"batch {number}: {error}") from error


def example_weights(weights: Any, count: int, where: str) -> Float[np.ndarray, " B"]:
    """Check the weights of `count` examples, and return them in the type in which they are used.

    Raises
    ------
    ValueError
        If they are not one finite number for each example, at least zero.
    """
    numbers = np.asarray(as_targets(weights, where))
    if numbers.dtype.kind not in "biuf" or numbers.shape != (count,):
        raise ValueError(
            f"{where} must be real numbers of shape ({count},), one for each example; got an array of {numbers.dtype} "
            f"of shape {numbers.shape}; try np.ones({count})"
        )
    numbers = numbers.astype(np.float64)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise ValueError(
            f"{where} must be finite and at least 0; got numbers from {numbers.min()} to {numbers.max()}; give an "
            "example that does not count the weight 0"
        )
    arrays.check_finite(numbers, where)
    return numbers.astype(jnp.zeros(()).dtype)


def present_first(weights: Float[np.ndarray, " B"], size: int = 0) -> np.ndarray:
    """Indices of the examples that count in their order, filled up to the number of all, or to `size`, by the last."""
    present = np.flatnonzero(weights)
    return present[np.minimum(np.arange(max(size, len(weights))), len(present) - 1)]


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
        f"{type(value).__name__} for a batch; pass (jnp.asarray(x), jnp.asarray(y)), or three with weights of examples"
    )
