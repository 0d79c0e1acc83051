"""Values that no entry can use: inputs, labels, targets, counts and positive numbers; places are random and seeded."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import sparse
from scipy.sparse import coo_array, csr_array

RNG = np.random.default_rng(2)
X = RNG.normal(size=(12, 4)).astype(np.float32)
Y = RNG.integers(0, 3, size=12)
TARGETS = RNG.normal(size=(12, 3)).astype(np.float32)
KEY = jax.random.key(2)


def changed(array: np.ndarray, value: Any, dtype: Any = np.float64) -> np.ndarray:
    """The array in another type, with `value` at a random place."""
    other = array.astype(dtype)
    other.flat[RNG.integers(other.size)] = value
    return other


def masked(array: np.ndarray) -> np.ma.MaskedArray:
    mask = np.zeros(array.shape, bool)
    mask.flat[RNG.integers(mask.size)] = True
    return np.ma.masked_array(array, mask)


class Broken:
    """A tensor that refuses to become an array, as one on another device does."""

    shape, dtype = (12, 4), np.dtype(np.float32)

    def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
        raise RuntimeError("can't convert a device tensor\nuse .cpu() first")


def numbers_that_fail() -> Iterator[float]:
    yield from (1.0, 2.0)


BAD_X = {
    "strings": X.astype(str),
    "bytes": X.astype("S4"),
    "objects": X.astype(object),
    "dates": X.astype("M8[s]"),
    "records": np.zeros(12, [("a", np.float32)]),
    "long floats": X.astype(np.longdouble),
    "masked": masked(X),
    "sparse rows": csr_array(X),
    "sparse entries": coo_array(X),
    "sparse of JAX": sparse.BCOO.fromdense(jnp.eye(12, 4), nse=12),
    "nested lists": X.tolist(),
    "ragged lists": [[1.0], [1.0, 2.0]],
    "a string": "data.csv",
    "None": None,
    "a set": {1.0},
    "an empty dictionary": {},
    "a generator": numbers_that_fail(),
    "a function": np.sum,
    "a Python number": 3.0,
    "no axes": np.float32(2),
    "keys": jax.random.split(KEY, 12),
    "NaN": changed(X, np.nan),
    "NaN on the device": jnp.asarray(changed(X, np.nan)),
    "infinite": changed(X, -np.inf),
    "infinite in half precision": changed(X, np.inf, np.float16),
    "beyond float32": changed(X, 1e39),
    "beyond int32": changed(0 * X, 2**32, np.int64),
    "beyond uint32": changed(0 * X, 2**63, np.uint64),
    "too narrow": X[:, :3],
    "too wide": np.hstack([X, X]),
    "no columns": X[:, :0],
    "one axis": X[:, 0],
    "transposed": X.T,
    "a pair": (X, X),
    "lengths that differ": {"a": X, "b": X[:5]},
    "a broken tensor": Broken(),
}
BAD_Y = {
    "wrapped to class 0": np.full(12, 2**32),
    "one wrapped": changed(Y, 2**32 + 1, np.int64),
    "beyond uint32": changed(Y, 2**64 - 1, np.uint64),
    "negative": changed(Y, -1, np.int64),
    "a class too many": changed(Y, 3, np.int64),
    "fractions": Y + 0.5,
    "floats": Y.astype(np.float32),
    "bools": Y > 0,
    "strings": Y.astype(str),
    "objects": Y.astype(object),
    "masked": masked(Y),
    "a column": Y[:, None],
    "one-hot integers": np.eye(3, dtype=int)[Y],
    "unnormalised": np.full((12, 3), 0.5),
    "NaN": np.full((12, 3), np.nan),
    "too few": Y[:7],
    "none": Y[:0],
    "None": None,
    "a number": 1,
    "a string": "labels",
    "ragged": [[1], [1, 2]],
    "sparse": csr_array(np.eye(3)[Y]),
}
BAD_TARGETS = {
    "NaN": changed(TARGETS, np.nan),
    "infinite": changed(TARGETS, np.inf),
    "beyond float32": changed(TARGETS, 1e300),
    "complex": TARGETS + 1j,
    "strings": TARGETS.astype(str),
    "one column": TARGETS[:, :1],
    "one axis": TARGETS[:, 0],
    "masked": masked(TARGETS),
    "labels": Y,
}
NOT_COUNTS = {"None": None, "string": "8", "fraction": 6.5, "bool": True, "negative": -4, "NaN": np.nan, "list": [8]}
NOT_POSITIVE = {
    "zero": 0.0,
    "negative": -1.0,
    "NaN": np.nan,
    "infinite": np.inf,
    "subnormal": 1e-300,
    "beyond float32": 1e300,
    "a huge integer": 10**400,
    "string": "1",
    "complex": 1j,
    "bool": True,
}
BAD_KEYS = {"None": None, "number": 0, "several": jax.random.split(KEY), "floats": np.zeros(2)}
