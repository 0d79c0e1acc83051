"""Validation data as users hand them over: pairs, triples with weights of the examples, or batches of either."""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PyTree, Shaped

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described, examples, num_examples
from bnnlaplace.core.types import AnyArray
from bnnlaplace.model import arrays
from bnnlaplace.model.data import check_inputs
from bnnlaplace.model.network import Network
from bnnlaplace.model.pairs import as_targets, example_weights, is_pair_of_arrays, present_first


class Batch(NamedTuple):
    """Examples that are scored together.

    Attributes
    ----------
    inputs, targets
        The examples.
    weights
        How many times each example counts. Those of weight zero are copies of one that counts.
    """

    inputs: PyTree[Shaped[AnyArray, "b ..."]]
    targets: Shaped[AnyArray, "b ..."]
    weights: Float[np.ndarray, " b"]

    def part(self, window: slice) -> "Batch":
        """Some of the examples."""
        return jax.tree.map(lambda leaf: leaf[window], self)


def checked_batches(network: Network, validation: Any) -> Iterator[Batch]:
    """Read (x, y), (x, y, w) or batches of such, and check inputs and weights of each batch that counts.

    Raises
    ------
    ValueError
        If a batch is neither a pair nor a triple, its inputs do not fit the network, or weights are not one finite
        number of at least 0 for each example. Also if JAX runs in several processes.
    """
    checks.one_process("a choice by validation data")
    if _is_batch(validation) and (is_pair_of_arrays(validation) or not isinstance(validation[0], (tuple, list))):
        validation = [validation]
    if hasattr(validation, "shape") or isinstance(validation, (str, bytes, Mapping)):
        raise _not_validation(validation)
    try:
        iterator = iter(validation)
    except TypeError:
        raise _not_validation(validation) from None
    for batch in iterator:
        if not _is_batch(batch):
            raise _not_validation(batch)
        checks.known("a score on validation data", batch)
        inputs, targets, *rest = batch
        if not rest:
            inputs, targets = check_inputs(network, inputs), as_targets(targets, "validation=(x, y): y")
            yield Batch(inputs, targets, np.ones(num_examples(inputs)))
            continue
        weighted = _weighted(inputs, targets, rest[0])
        if weighted.weights.any():
            yield weighted._replace(inputs=check_inputs(network, weighted.inputs))


def _weighted(inputs: Any, targets: Any, weights: Any) -> Batch:
    """Convert a triple. What an example of weight zero holds, such as NaN, is replaced before it is looked at."""
    inputs = arrays.as_arrays(inputs, "validation=(x, y, w): x")
    targets, count = as_targets(targets, "validation=(x, y, w): y"), num_examples(inputs)
    weights = example_weights(weights, count, "validation=(x, y, w): w").astype(np.float64)
    # Targets of another number are left as they are: the check against the outputs names both shapes.
    if weights.all() or not weights.any() or np.shape(targets)[:1] != (count,):
        return Batch(inputs, targets, weights)
    # The number of examples stays, so that batches of one length are compiled once.
    index = present_first(weights)
    return Batch(examples(inputs, index), targets[index], np.where(np.sort(weights == 0), 0, weights[index]))


def _is_batch(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) in (2, 3)


def _not_validation(value: Any) -> ValueError:
    return ValueError(
        "validation=... must be two arrays (x, y), three with weights (x, y, w), or an iterable of batches of either; "
        f"got {described(value)} for a batch; pass (jnp.asarray(x), jnp.asarray(y))"
    )
