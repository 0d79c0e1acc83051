"""Permutations and stratified subsets that are pure functions of a seed.

Both use the raw stream of the Philox generator, which NumPy keeps fixed for ever. The methods of
`numpy.random.Generator` may change between releases. So a seed gives the same split everywhere, and a resumed run sees
the same batches as an uninterrupted one.
"""

import numpy as np


def permutation(seed: int, stream: int, size: int) -> np.ndarray:
    """Return a uniformly random permutation of `range(size)`, a pure function of `(seed, stream)`.

    Parameters
    ----------
    seed, stream : int
        The two halves of the Philox key (modulo 2**64). Different streams of a seed are independent.
    size : int
        Number of elements.

    Returns
    -------
    ndarray of int64, shape (size,)

    Notes
    -----
    It sorts `size` random 64-bit words. Two of them are equal with probability below `size**2 / 2**65`.
    """
    key = np.array([seed % 2**64, stream % 2**64], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(size), kind="stable")


def stratified_indices(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Choose `count` examples at random so that every class keeps its share, to within one example.

    Parameters
    ----------
    labels : ndarray of int, shape (N,)
        Class of each example.
    count : int
        How many to choose, from 0 to N.
    seed : int
        Seed of the choice. Within a class, a larger count contains the choice of a smaller one.

    Returns
    -------
    ndarray of int64, shape (count,)
        Indices into `labels`, increasing.

    Raises
    ------
    ValueError
        `count` is outside 0 to N.

    Notes
    -----
    Largest remainders apportion the shares in exact integer arithmetic. A tie goes to the class of the smaller number.
    """
    if not 0 <= count <= labels.size:
        raise ValueError(f"`stratified_indices(count=...)` must lie in 0 to {labels.size}; got {count}")
    classes, sizes = np.unique(labels, return_counts=True)
    quotas, remainders = np.divmod(count * sizes, max(labels.size, 1))
    quotas[np.argsort(-remainders, kind="stable")[: count - quotas.sum()]] += 1
    chosen = [
        np.flatnonzero(labels == label)[permutation(seed, int(label), size)[:quota]]
        for label, size, quota in zip(classes, sizes, quotas, strict=True)
    ]
    return np.sort(np.concatenate(chosen)) if chosen else np.empty(0, dtype=np.int64)
