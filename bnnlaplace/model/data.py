"""Data as users hand them over, read as batches of one shape and checked against the model.

Arrays are one batch. An iterable is read again in every pass, so that the data need not fit in memory.
"""

import copy
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.summation import accumulated
from bnnlaplace.core.tree import examples, num_examples
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.model import arrays
from bnnlaplace.model.likelihood import Likelihood, check_targets, is_ours
from bnnlaplace.model.likelihoods.own import check_functions
from bnnlaplace.model.network import Network
from bnnlaplace.model.pairs import Pair, as_pair, in_batch, is_pair_of_arrays, not_a_pair, present_first
from bnnlaplace.model.spec import call_refused, check_outputs, output_shape, shapes_in_words, signatures

# Inputs and targets, and perhaps weights of examples: arrays, or batches of such that can be iterated over. An
# annotation of the shapes of batches would exclude batches of several lengths.
PairOrBatches = tuple[Inputs, AnyArray] | tuple[Inputs, AnyArray, Any] | Iterable[Any]

# What messages call inputs to predict at.
_INPUTS = "inputs to predict at"


class Batch(NamedTuple):
    """Examples that are computed with together.

    Attributes
    ----------
    inputs
        An array, or a pytree of arrays, with the examples along the leading axis.
    targets
        What the likelihood compares the outputs with.
    weights
        How many times each example counts, by default once; zero for padding, which comes last.
    points
        Where the curvature of the likelihood is evaluated, if that is not at the outputs.
    """

    inputs: Inputs
    targets: AnyArray
    weights: Float[Array, " B"]
    points: Float[AnyArray, "B ..."] | None = None


class Data:
    """Batches of one shape, read as many times as needed.

    Attributes
    ----------
    once
        Whether they can be read only once.
    length
        The number of examples that count, if it is known before they are read.
    mapped_bytes
        The size of all inputs that `mapped` computes. 0 if the inputs are not mapped or `length` is not known.

    Parameters
    ----------
    pairs
        The user's batches (x, y) or (x, y, w).
    head
        The first of them, already read. Shorter batches are padded to its length. Its inputs may be abstract arrays.
    check
        A function that is called with inputs and targets of each batch in the first pass.
    """

    def __init__(
        self,
        pairs: Iterable[Any],
        head: Pair,
        once: bool = False,
        check: Callable[[Inputs, AnyArray], None] | None = None,
        length: int | None = None,
        mapped_bytes: int = 0,
    ) -> None:
        self.once, self.length, self.mapped_bytes = once, length, mapped_bytes
        self._pairs, self._head, self._check = pairs, head, check
        self._count: int | None = None
        self._total_weight = 0.0
        self._ordered = False
        self._checksums: list[int] | None = None
        self._points: Sequence[Float[AnyArray, "B ..."]] | None = None

    def checked(self, check: Callable[[Inputs, AnyArray], None]) -> "Data":
        """Return the same data, with a check of each batch in the first pass."""
        data = copy.copy(self)
        data._check, data._count = check, None
        return data

    def in_order(self) -> "Data":
        """Return the same data, with a check that every pass gives the same batches in the same order."""
        data = copy.copy(self)
        is_iterable = self.length is None  # arrays are the same in every pass
        data._ordered, data._checksums = is_iterable, None
        return data

    def with_points(self, points: Sequence[Float[AnyArray, "B ..."]]) -> "Data":
        """Return the same data with the points of each batch, in the order of the batches.

        Call `in_order` first: then a pass in another order, in which points would meet other examples, is an error.
        """
        data = copy.copy(self)
        data._points = points
        return data

    def sample(self, count: int) -> "Data":
        """Return up to `count` examples of the first batch, evenly spaced. No pass is used up."""
        inputs, targets, weights = self._head
        present = len(targets) if weights is None else int(np.count_nonzero(weights))
        index = np.unique(np.linspace(0, present - 1, count).astype(int))
        pair = Pair(examples(inputs, index), targets[index], None if weights is None else weights[index])
        return Data([pair], pair, length=len(index))

    def few(self) -> "Data":
        """Return the first batch alone, with the `length` of all data. No pass is used up."""
        return Data([self._head], self._head, length=self.length)

    def __iter__(self) -> Iterator[Batch]:
        """Read all batches.

        Raises
        ------
        ValueError
            If batches differ in structure, or this pass gives more or fewer examples than the first one.
        """
        expected, count, total_weight, checksums, points = None, 0, 0.0, [], iter(self._points or ())
        for number, pair in enumerate(self._pairs):
            which = None if self.length is not None else number
            with in_batch(which):  # later passes give the same numbers again, or an error
                pair = as_pair(pair, is_checked=self._count is not None)
            x, y = pair.inputs, pair.targets
            structure = jax.tree.structure(x), [*signatures(x), *signatures(y)]
            if expected not in (None, structure):
                raise ValueError(
                    "fit(data=...) must give batches of one structure, with the same shapes beyond the first axis and "
                    f"the same types; got {shapes_in_words(expected[1])} and then {shapes_in_words(structure[1])}"
                )
            expected = structure
            if pair.is_absent:
                continue
            count += len(y) if pair.weights is None else int(np.count_nonzero(pair.weights))
            total_weight += len(y) if pair.weights is None else pair.weights.sum(dtype=np.float64)
            if self._check is not None and self._count is None:
                with in_batch(which):
                    self._check(x, y)
            if self._ordered:
                checksums.append(_checksum(pair))
                self._check_order(checksums)
            batch = _padded(pair, len(self._head.targets))
            yield batch if self._points is None else batch._replace(points=next(points))
        if self._count not in (None, count):
            raise ValueError(
                f"fit(data=...) must give the same batches in every pass; the first gave {self._count} examples, a "
                f"later one {count}; pass a list of batches, or an object whose __iter__ starts anew"
            )
        self._count, self._total_weight, self._checksums = count, float(total_weight), checksums

    def _check_order(self, checksums: list[int]) -> None:
        """Compare the batch that was read last with that of the first pass."""
        number = len(checksums) - 1
        if self._checksums is not None and self._checksums[number : number + 1] != checksums[-1:]:
            raise ValueError(
                f"data must give the same batches in the same order in every pass; batch {number} is another one than "
                "in the first pass; switch shuffling and augmentation off"
            )

    def check_repeatable(self, what: str) -> None:
        """Raise ValueError if the data can be read only once. `what` is the start of the message."""
        if self.once:
            raise ValueError(
                f"{what}; got an iterator that can be read once; pass a list of batches, or an object whose __iter__ "
                "starts anew"
            )

    def check_restarts(self, what: str) -> None:
        """Raise ValueError if a look at the first batch has used it up. Call it if no pass follows.

        As `check_repeatable`, and also for a loader whose `__iter__` gives one stored iterator.
        """
        self.check_repeatable(what)
        if isinstance(self._pairs, _Batches) and self._pairs.has_lost_first():
            raise ValueError(
                f"{what}; got an object whose __iter__ goes on where the last one stopped; pass a list of batches, or "
                "an object whose __iter__ starts anew"
            )

    @property
    def num_examples(self) -> int:
        """Number of examples that the last pass gave, whatever their weights. Before the first pass it is not known."""
        if self._count is None:
            raise RuntimeError("the number of examples is known after a pass")
        return self._count

    @property
    def total_weight(self) -> float:
        """Sum of the weights of the examples that the last pass gave: their number if each counts once."""
        return self._total_weight

    @property
    def first(self) -> PyTree:
        """Inputs of the first batch, or their abstract arrays if the inputs are mapped. No pass is used up."""
        return self._head.inputs

    def mapped(self, function: Callable[[Inputs], Inputs], max_bytes: int) -> "Data":
        """Replace the inputs by a function of them.

        Up to `max_bytes` of mapped inputs are kept after the first pass; more are computed again in every pass. If the
        data can be iterated only once, the mapped inputs are computed now and kept.
        """
        targets = self._head.targets
        first = self._head._replace(inputs=jax.eval_shape(function, self._head.inputs))
        pairs = _Mapped(self, function, max_bytes)
        batch_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(first.inputs))
        mapped_bytes = batch_bytes * (self.length or 0) // len(targets)
        return Data(list(pairs) if self.once else pairs, first, length=self.length, mapped_bytes=mapped_bytes)


class _Mapped:
    """Pairs of mapped inputs and targets. They are kept after the first pass if they are small."""

    def __init__(self, data: Data, function: Callable[[Inputs], Inputs], max_bytes: int) -> None:
        self._data, self._function, self._max_bytes = data, function, max_bytes
        self._kept: list[Pair] | None = None

    def __iter__(self) -> Iterator[Pair]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Pair] = []
        num_bytes = 0
        for batch in self._data:
            pair = _without_padding(batch._replace(inputs=self._function(batch.inputs)))
            num_bytes += sum(leaf.nbytes for leaf in jax.tree.leaves(pair))
            if num_bytes <= self._max_bytes:
                kept.append(pair)
            else:
                kept.clear()
            yield pair
        if num_bytes <= self._max_bytes:
            self._kept = kept


def as_data(data: Any) -> Data:
    """Turn arrays (x, y) or (x, y, w), or an iterable of such batches, into `Data`. The inputs x may be a pytree.

    Raises
    ------
    ValueError
        If there are no batches or no examples, a batch is not a pair or triple, there are not as many targets or
        weights as inputs, a weight is negative, or a number is not finite in the type in which it is used. Also if JAX
        runs in several processes.
    """
    if isinstance(data, Data):
        return data
    checks.one_process("fit(data=...)")
    is_weighted = isinstance(data, (tuple, list)) and len(data) == 3 and is_pair_of_arrays(data[:2])
    if is_pair_of_arrays(data) or is_weighted:  # whatever the weights are: a fault of theirs is named
        pair = _first([data])
        length = len(pair.targets) if pair.weights is None else int(np.count_nonzero(pair.weights))
        return Data([pair], pair, length=length)
    if hasattr(data, "shape") or isinstance(data, (str, bytes, Mapping)):  # what would be iterated over is not batches
        raise not_a_pair(data)
    try:
        iterator = iter(data)
    except TypeError:
        raise not_a_pair(data) from None
    head = _first(iterator)
    return Data(_Batches(data, head, iterator), head, once=iterator is data)


class _Batches:
    """The user's batches. The first pass goes on where the look at the first batch stopped: nothing is read twice.

    So a loader whose `__iter__` gives one stored iterator loses nothing either. Its second pass is empty, which `Data`
    reports.
    """

    def __init__(self, source: Iterable[Any], head: Pair, iterator: Iterator[Any]) -> None:
        self._source, self._head, self._first = source, head, iterator
        self._rest: Iterator[Any] | None = itertools.chain([head], iterator)

    def __iter__(self) -> Iterator[Any]:
        rest, self._rest, self._first = self._rest, None, None
        return iter(self._source) if rest is None else rest

    def has_lost_first(self) -> bool:
        """Whether another iterator goes on behind the first batch. The batches are of no use after this call."""
        again = iter(self._source)
        if again is not self._first:
            return False
        # Some loaders keep one iterator and set it back to the start.
        batches = itertools.islice(_counting(again), 1)
        return [_checksum(pair) for pair in batches] != [_checksum(self._head)]


def _counting(batches: Iterable[Any]) -> Iterator[Pair]:
    """The batches with an example that counts."""
    return (pair for pair in map(as_pair, batches) if not pair.is_absent)


def _first(batches: Iterable[Any]) -> Pair:
    for pair in _counting(batches):
        return pair
    raise ValueError(
        "fit(data=...) must hold at least one batch; got none; an iterator may be used up already, or all weights are 0"
    )


def accumulate(data: Data, step: Callable[[Batch], Any]) -> tuple[Any, int]:
    """Sum a pytree that is computed from each batch, in one pass; return the sum and the number of examples.

    Arrays of JAX are summed as in `core.summation`, arrays of NumPy in float64.
    """
    return accumulated(map(step, data)), data.num_examples


def check_fits_model(network: Network, likelihood: Likelihood, inputs: Inputs, targets: AnyArray) -> None:
    """Check that the network turns inputs into outputs (N, ..., C), and that the targets fit these outputs.

    Raises
    ------
    ValueError
        If outputs are not (N, ..., C), the targets do not fit them (see `likelihood.check_targets`), or a likelihood
        of the user's own has wrong functions.
    """
    count = num_examples(inputs)
    try:
        shape = output_shape(network, inputs)
    except Exception as error:  # whatever a user's function raises at shapes that it does not take
        raise call_refused("fit(data=(x, y)): x must be what the network takes", inputs, error) from error
    check_outputs(shape, count)
    check_targets(likelihood, shape, targets, "fit(data=(x, y))")
    if not is_ours(likelihood):
        check_functions(likelihood, shape, targets)


def check_inputs(network: Network, inputs: Any, where: str = _INPUTS) -> Inputs:
    """Return inputs to predict at as arrays, after a check that they are finite and that the network takes them.

    Only the shapes of traced inputs are checked. `where` is what messages call the inputs.

    Raises
    ------
    ValueError
        If the inputs are not arrays of numbers, a number is not finite, or the network raises an error.
    """
    inputs = arrays.as_arrays(inputs, where)
    for leaf in jax.tree.leaves(inputs):
        arrays.check_finite(leaf, where)
    try:
        shape = output_shape(network, inputs)
    except Exception as error:  # whatever a user's function raises at shapes that it does not take
        what = f"{where} must have the shape of those of the data, except for the first axis"
        raise call_refused(what, inputs, error) from error
    check_outputs(shape, num_examples(inputs))
    return inputs


def _checksum(pair: Pair) -> int:
    """Reduce a batch to a number. Another batch has the same one with a chance of one in four billion."""
    checksum = 0
    for leaf in jax.tree.leaves(pair):
        checksum = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), checksum)
    return checksum


def _padded(pair: Pair, size: int) -> Batch:
    """Pad a batch to at least `size` examples, with copies of the last one that counts at weight zero."""
    x, y, weights = pair
    if weights is None:
        if len(y) >= size:
            return Batch(x, y, jnp.ones(len(y)))
        weights = np.ones(len(y))
    if len(y) < size:
        index = present_first(weights, size)
        x, y, weights = examples(x, index), y[index], np.pad(weights, (0, size - len(y)))
    return Batch(x, y, jnp.asarray(weights, float))


def _without_padding(batch: Batch) -> Pair:
    weights = np.asarray(batch.weights)
    count = int(np.count_nonzero(weights))  # a sum of ones in float32 ends at 2^24
    counts_once = (weights[:count] == 1).all()
    pair = Pair(examples(batch.inputs, slice(count)), batch.targets[:count])
    return pair if counts_once else pair._replace(weights=weights[:count])
