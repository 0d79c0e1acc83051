"""Random keys as users pass them."""

from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int


def is_key(value: Any) -> bool:
    """Whether it is one key of `jax.random.key`, or a raw one of `jax.random.PRNGKey`.

    Parameters
    ----------
    value
        Anything.
    """
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is None:
        return False
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return shape == ()
    return dtype == np.uint32 and shape in ((2,), (4,))


def check_key(value: Any, where: str) -> None:
    """Check that it is a key.

    Parameters
    ----------
    value
        Anything.
    where
        The name of the argument, for the message.

    Raises
    ------
    ValueError
        If it is none.
    """
    if not is_key(value):
        got = repr(value) if not hasattr(value, "shape") else f"{value.dtype} of shape {value.shape}"
        raise ValueError(f"{where} must be one random key; got {got}; pass jax.random.key(0)")


# What metrics take: class probabilities and labels, as float64 and int64 NumPy, or a message that says what is wrong.
#
# Every function raises `ValueError` for arrays of the wrong shape, rows that are no distributions, NaN, and labels that
# are no classes.
Probs = Float[np.ndarray, "N C"] | Float[Array, "N C"]
Labels = Int[np.ndarray, "N"] | Int[Array, "N"]

_SUM_TOLERANCE = 1e-4  # rows of probabilities computed in float32 add up to one well within this


def checked(probs: Probs, labels: Labels) -> tuple[np.ndarray, np.ndarray]:
    """Class probabilities in float64 and the labels that go with them."""
    probs = checked_probs("probs", probs)
    return probs, checked_labels(labels, *probs.shape)


def checked_probs(name: str, probs: Probs) -> np.ndarray:
    """Rows of class probabilities in float64; `name` is what the message calls them."""
    probs = np.asarray(probs, np.float64)
    if probs.ndim != 2 or 0 in probs.shape:
        raise ValueError(
            f"{name} must be a non-empty (N, C) array; got shape {probs.shape}; average over posterior samples first"
        )
    if np.isnan(probs).any():
        raise ValueError(f"{name} must not contain NaN; got {described(probs)}; check the predictive")
    if probs.min() < 0:
        raise ValueError(f"{name} must not be negative; got {probs.min():.6g}; apply the softmax first")
    worst = np.argmax(np.abs(probs.sum(axis=1) - 1))
    total = probs[worst].sum()
    if not abs(total - 1) <= _SUM_TOLERANCE:
        raise ValueError(f"{name} must have rows that sum to 1; row {worst} sums to {total:.6g}; apply the softmax")
    return probs


def checked_labels(labels: Labels, num_examples: int, num_classes: int) -> np.ndarray:
    """Classes, one per example, in int64."""
    labels = np.asarray(labels)
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels must be integer classes; got dtype {labels.dtype}; convert them with astype(int)")
    if labels.shape != (num_examples,):
        raise ValueError(f"labels must have shape ({num_examples},), one per example; got {labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"labels must lie in 0..{num_classes - 1}; got {labels.min()}..{labels.max()}; check the number of classes"
        )
    return labels.astype(np.int64)


def described(array: np.ndarray) -> str:
    """What is wrong with an array, for a message."""
    return f"shape {array.shape} with {np.count_nonzero(~np.isfinite(array))} non-finite entries"
