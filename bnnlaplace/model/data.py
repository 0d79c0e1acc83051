"""Data as users hand them over, read a batch of one shape at a time, and checked against the model.

Arrays are one batch. Of an iterable each pass reads every batch again, so that data need not fit in memory.
"""

import copy
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import described, examples, num_examples
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.model.likelihood import Likelihood, check_targets
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import check_outputs, output_shape


# Inputs and targets, as two arrays or in batches that can be iterated over.
PairOrBatches = tuple[Inputs, AnyArray] | Iterable[tuple[Inputs, AnyArray]]


class Batch(NamedTuple):
    """Examples that are computed with together.

    Attributes
    ----------
    inputs
        An array or a pytree of arrays, examples along the leading axis.
    targets
        As the likelihood needs them.
    weights
        One; zero for the padding of a batch that was shorter than the first one.
    """

    inputs: Inputs
    targets: AnyArray
    weights: Float[Array, " B"]


class Data:
    """Batches of one shape, to be read as many times as needed.

    Attributes
    ----------
    once
        They can be read a single time.
    length
        The number of examples, where it is known before they are read.
    mapped_bytes
        Of `mapped` inputs, of all examples; 0 where there are none, or their number is not known.

    Parameters
    ----------
    pairs
        The user's (x, y) batches.
    head
        The first of them, already read; its length is that to which shorter ones are padded.
    check
        Called with inputs and targets of each batch of the first pass.
    """

    def __init__(
        self,
        pairs: Iterable[tuple[Inputs, AnyArray]],
        head: tuple[Inputs, AnyArray],
        once: bool = False,
        check: Callable[[Inputs, Array], None] | None = None,
        length: int | None = None,
        mapped_bytes: int = 0,
    ) -> None:
        self.once, self.length, self.mapped_bytes = once, length, mapped_bytes
        self._pairs, self._head, self._check = pairs, head, check
        self._count: int | None = None
        self._ordered = False
        self._marks: list[int] | None = None

    def checked(self, check: Callable[[Inputs, Array], None]) -> "Data":
        """The same data, checked while they are read for the first time."""
        data = copy.copy(self)
        data._check, data._count = check, None
        return data

    def in_order(self) -> "Data":
        """The same data, of which every pass has to give the same batches in the same order."""
        data = copy.copy(self)
        data._ordered, data._marks = self.length is None, None  # arrays cannot do otherwise
        return data

    def few(self) -> "Data":
        """The first batch in place of all of them, whose number and shapes it stands for; no pass is used up."""
        return Data([self._head], self._head, length=self.length)

    def __iter__(self) -> Iterator[Batch]:
        """Read all batches.

        Raises
        ------
        ValueError
            If batches differ in structure, or this pass gives more or fewer examples than the first one.
        """
        expected, count, marks = None, 0, []
        for pair in self._pairs:
            x, y = _as_pair(pair)
            found = jax.tree.structure(x), [*_signatures(x), *_signatures(y)]
            if expected not in (None, found):
                raise ValueError(
                    "fit(data=...) must give batches of one structure, with the same shapes beyond the first axis and "
                    f"the same types; got {_shapes(expected[1])} and then {_shapes(found[1])}"
                )
            expected, count = found, count + len(y)
            if self._check is not None and self._count is None:
                self._check(x, y)
            if self._ordered:
                marks.append(_mark(x, y))
                if self._marks is not None and marks[-1:] != self._marks[len(marks) - 1 : len(marks)]:
                    raise ValueError(
                        f"data must give the same batches in the same order in every pass; batch {len(marks) - 1} is "
                        "another one than in the first pass; switch shuffling and augmentation off"
                    )
            yield _padded(x, y, len(self._head[1]))
        if self._count not in (None, count):
            raise ValueError(
                f"fit(data=...) must give the same batches in every pass; the first gave {self._count} examples, a "
                f"later one {count}; pass a list of batches, or an object whose __iter__ starts anew"
            )
        self._count, self._marks = count, marks

    def check_repeatable(self, what: str) -> None:
        """Raise ValueError where the data can be read a single time; `what` says who needs more."""
        if self.once:
            raise ValueError(
                f"{what}; got an iterator that can be read once; pass a list of batches, or an object whose __iter__ "
                "starts anew"
            )

    @property
    def num_examples(self) -> int:
        """How many examples a pass has given."""
        if self._count is None:
            raise RuntimeError("the number of examples is known after a pass")
        return self._count

    @property
    def first(self) -> Inputs:
        """The inputs of the first batch, or, of mapped ones, their shapes; no pass is used up."""
        return self._head[0]

    def mapped(self, function: Callable[[Inputs], Inputs], most_bytes: int) -> "Data":
        """Other inputs in place of these: computed once and kept, or, of more than `most_bytes`, in each pass.

        Of data that can be read once they are computed now, and kept in any case.
        """
        first = jax.eval_shape(function, self._head[0]), self._head[1]
        pairs = _Mapped(self, function, most_bytes)
        batch_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(first[0]))
        mapped_bytes = batch_bytes * (self.length or 0) // len(first[1])
        return Data(list(pairs) if self.once else pairs, first, length=self.length, mapped_bytes=mapped_bytes)


class _Mapped:
    """Pairs of mapped inputs and targets, which are remembered after the first pass if they are small."""

    def __init__(self, data: Data, function: Callable[[Inputs], Inputs], most_bytes: int) -> None:
        self._data, self._function, self._most_bytes = data, function, most_bytes
        self._kept: list[tuple[Inputs, AnyArray]] | None = None

    def __iter__(self) -> Iterator[tuple[Inputs, AnyArray]]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[tuple[Inputs, AnyArray]] = []
        held = 0
        for batch in self._data:
            pair = _without_padding(batch._replace(inputs=self._function(batch.inputs)))
            held += sum(leaf.nbytes for leaf in jax.tree.leaves(pair))
            if held <= self._most_bytes:
                kept.append(pair)
            else:
                kept.clear()
            yield pair
        if held <= self._most_bytes:
            self._kept = kept


def as_data(data: tuple[Inputs, AnyArray] | Iterable[tuple[Inputs, AnyArray]]) -> Data:
    """Arrays (x, y), x possibly a pytree, or an iterable of such batches, as `Data`; what is that already, as it is.

    Raises
    ------
    ValueError
        If there are no batches or no examples, a batch is no pair, or there are not as many targets as inputs.
    """
    if isinstance(data, Data):
        return data
    if _is_pair_of_arrays(data):
        pair = _as_pair(data)
        return Data([pair], pair, length=len(pair[1]))
    try:
        iterator = iter(data)
    except TypeError:
        raise _no_pair(data) from None
    found = list(itertools.islice(iterator, 1))
    if not found:
        raise ValueError("fit(data=...) must hold at least one batch; got none; an iterator may be used up already")
    head = _as_pair(found[0])
    once = iterator is data
    return Data(itertools.chain(found, iterator) if once else data, head, once)


def accumulate(data: Data, step: Callable[[Batch], Any]) -> tuple[Any, int]:
    """Sum a pytree that is computed from each batch, in one pass; return the sum and the number of examples."""
    total = None
    for batch in data:
        of_batch = step(batch)
        total = of_batch if total is None else jax.tree.map(jnp.add, total, of_batch)
    return total, data.num_examples


def check_fits_model(network: Network, likelihood: Likelihood, inputs: Inputs, targets: AnyArray) -> None:
    """Check that the network turns inputs into outputs (N, ..., C), and that the targets are such as those need.

    Raises
    ------
    ValueError
        If outputs are not (N, ..., C), or targets do not fit them; see `likelihood.check_targets`.
    """
    count = num_examples(inputs)
    shape = output_shape(network, inputs)
    check_outputs(shape, count)
    check_targets(likelihood, shape, targets, "fit(data=(x, y))")


def check_inputs(network: Network, inputs: Inputs) -> None:
    """Check that inputs to predict at are finite, and such as the network takes; of traced ones shapes alone.

    Raises
    ------
    ValueError
        If they are no arrays of numbers, a number among them is not finite, or the network cannot be called with them.
    """
    for leaf in jax.tree.leaves(inputs):
        if np.ndim(leaf) == 0 or not hasattr(leaf, "dtype"):
            raise ValueError(
                f"inputs to predict at must be arrays with inputs along the first axis; got a {type(leaf).__name__}; "
                "pass jnp.asarray(x)"
            )
    _check_finite(inputs)
    try:
        output_shape(network, inputs)
    except Exception as error:  # whatever a user's function raises at shapes that it is not made for
        message = str(error).split("\n", 1)[0]
        raise ValueError(
            "inputs to predict at must have the shape of those of the data, but for the first axis; with inputs of "
            f"{_shapes(_signatures(inputs))} the network raised {type(error).__name__}: {message}"
        ) from error


def checked_pairs(
    network: Network, validation: tuple[Inputs, AnyArray] | Iterable[tuple[Inputs, AnyArray]]
) -> Iterator[tuple[Inputs, AnyArray]]:
    """Validation data, (x, y) or batches of such pairs, a batch at a time, each after `check_inputs`.

    Raises
    ------
    ValueError
        If a batch is no pair, or its inputs are not such as the network takes.
    """
    is_one = isinstance(validation, (tuple, list)) and len(validation) == 2
    if _is_pair_of_arrays(validation) or (is_one and not isinstance(validation[0], (tuple, list))):
        validation = [validation]
    try:
        iterator = iter(validation)
    except TypeError:
        raise _no_validation(validation) from None
    for batch in iterator:
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise _no_validation(batch)
        inputs, targets = batch
        check_inputs(network, inputs)
        yield inputs, targets if hasattr(targets, "shape") else np.asarray(targets)


def _no_validation(found: Any) -> ValueError:
    return ValueError(
        "validation=... must be two arrays (x, y), or an iterable of batches, each such a pair; got "
        f"{described(found)} for a batch; pass (jnp.asarray(x), jnp.asarray(y))"
    )


def _check_finite(inputs: Inputs) -> None:
    for leaf in jax.tree.leaves(inputs):
        if isinstance(leaf, jax.core.Tracer):
            continue
        if not (jnp.issubdtype(leaf.dtype, jnp.number) or leaf.dtype == bool):
            raise ValueError(f"inputs to predict at must be numbers; got an array of {leaf.dtype}; encode them")
        # Where the inputs are: images on the host need no second copy on the device.
        with jax.ensure_compile_time_eval():  # inputs that a traced function closes over
            finite = jnp.isfinite(leaf) if isinstance(leaf, jax.Array) else np.isfinite(leaf)
            all_finite = bool(finite.all())
        if not all_finite:
            rows = np.unique(np.nonzero(~np.asarray(finite))[0])
            raise ValueError(
                f"inputs to predict at must be finite; got NaN or infinite values in {len(rows)} of {len(leaf)} of "
                f"them, first in number {rows[0]}; remove or mend them"
            )


def _is_pair_of_arrays(data: Any) -> bool:
    if not isinstance(data, (tuple, list)) or len(data) != 2 or not hasattr(data[1], "shape"):
        return False
    leaves = jax.tree.leaves(data[0])
    return bool(leaves) and all(hasattr(leaf, "shape") for leaf in leaves)


def _as_pair(batch: Any) -> tuple[Inputs, AnyArray]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        raise _no_pair(batch)
    x, y = jax.tree.map(jnp.asarray, batch[0]), jnp.asarray(batch[1])
    lengths = {leaf.shape[0] if leaf.ndim else 0 for leaf in jax.tree.leaves(x)}
    count = y.shape[0] if y.ndim else 0
    if count == 0 or lengths != {count}:
        raise ValueError(
            "fit(data=(x, y)) must hold as many targets as inputs, and at least one; got "
            f"{' or '.join(map(str, sorted(lengths)))} and {count}"
        )
    return x, y


def _no_pair(found: Any) -> ValueError:
    return ValueError(
        "fit(data=...) must be two arrays (x, y), or an iterable of batches, each such a pair; got "
        f"{type(found).__name__} for a batch; pass (jnp.asarray(x), jnp.asarray(y))"
    )


def _mark(x: Inputs, y: AnyArray) -> int:
    """A number that other batches have with a chance of one in four billion."""
    mark = 0
    for leaf in (*jax.tree.leaves(x), y):
        mark = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), mark)
    return mark


def _signatures(arrays: PyTree[Array]) -> list[tuple[tuple[int, ...], str]]:
    """Shape of one example and type of each leaf."""
    return [(leaf.shape[1:], leaf.dtype.name) for leaf in jax.tree.leaves(arrays)]


def _shapes(signatures: list[tuple[tuple[int, ...], str]]) -> str:
    return ", ".join(f"{dtype}[B{''.join(f',{extent}' for extent in shape)}]" for shape, dtype in signatures)


def _padded(x: Inputs, y: AnyArray, size: int) -> Batch:
    count = len(y)
    missing = max(size - count, 0)
    if not missing:
        return Batch(x, y, jnp.ones(count))
    index = np.minimum(np.arange(size), count - 1)
    return Batch(examples(x, index), y[index], jnp.asarray(np.arange(size) < count, float))


def _without_padding(batch: Batch) -> tuple[Inputs, AnyArray]:
    count = int(batch.weights.sum())
    return examples(batch.inputs, slice(count)), batch.targets[:count]
