"""Predictions and labels as users hold them, brought to one form: float64 rows (N, C) and int64 classes (N,).

A binary classifier gives one number an example, as (N,) or (N, 1). The probability p of class 1 becomes the row
(1 - p, p), and the logit f the row (0, f), whose softmax is (1 - p, p). So every metric has one definition.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, Integer, Real

from bnnlaplace.core import checks
from bnnlaplace.core.types import AnyArray

# Rows of class probabilities, or for a binary classifier the probability of class 1.
Probs = Float[AnyArray, "N C"] | Float[AnyArray, " N"]
# Classes. Those of a binary classifier may be bools, or 0.0 and 1.0 as its likelihood takes them.
Labels = (
    Integer[AnyArray, " N"]
    | Integer[AnyArray, "N 1"]
    | Bool[AnyArray, " N"]
    | Bool[AnyArray, "N 1"]
    | Float[AnyArray, " N"]
    | Float[AnyArray, "N 1"]
)
# How many times each example counts; a mask says which ones do.
Weights = Real[AnyArray, " N"] | Bool[AnyArray, " N"]


class Labelled(NamedTuple):
    """Predictions of M examples with their labels, all checked.

    Attributes
    ----------
    probs, labels
        Class probabilities, and the number of each example's class.
    weights
        How many times each example counts, more than zero; None if each counts once.
    """

    probs: Float[np.ndarray, "M K"]
    labels: Int[np.ndarray, " M"]
    weights: Float[np.ndarray, " M"] | None

    def mean(self, column: Float[np.ndarray, " M"]) -> float:
        """The mean of one number for each example."""
        return float(np.average(column, weights=self.weights))

    @property
    def total(self) -> float:
        """How many examples there are, each as often as it counts."""
        return float(len(self.labels) if self.weights is None else self.weights.sum())


def labelled(probs: Probs, labels: Labels, weights: Weights | None = None) -> Labelled:
    """Return predictions without those of weight zero, or raise ValueError as `rows`, `classes`, `present` do."""
    probs, labels, weights = present(numbers(probs, "probs"), numbers(labels, "labels"), weights)
    checked = rows(probs, "probs")
    return Labelled(checked, classes(labels, *checked.shape, is_binary=_is_binary(np.shape(probs))), weights)


def present(
    predicted: np.ndarray, labels: np.ndarray, weights: Weights | None
) -> tuple[np.ndarray, np.ndarray, Float[np.ndarray, " M"] | None]:
    """Leave out the examples of weight zero, whatever they hold.

    Raises
    ------
    ValueError
        If weights are not one finite number for each example, at least 0 and not all 0.
    """
    if weights is None:
        return predicted, labels, None
    found = np.asarray(numbers(weights, "weights"), np.float64)
    if found.shape != predicted.shape[:1] or not (np.isfinite(found) & (found >= 0)).all() or not found.any():
        got = f" from {found.min():.4g} to {found.max():.4g}" if found.size else ""
        raise ValueError(
            "weights must be one finite number for each example, at least 0 and not all 0; got "
            f"{checks.shape_and_faults(found)}{got} for predictions of shape {predicted.shape}; leave weights out if "
            "each example counts once"
        )
    if labels.shape[:1] != found.shape:  # which `classes` reports
        return predicted, labels, found
    is_counted = found > 0
    return predicted[is_counted], labels[is_counted], found[is_counted]


def rows(probs: Probs, where: str) -> Float[np.ndarray, "N K"]:
    """Return rows of class probabilities in float64.

    Raises
    ------
    ValueError
        If these are not numbers, the shape is wrong, an entry is negative or NaN, a row does not sum to one, or a
        number for each example is not a probability.
    """
    array = numbers(probs, where)
    if not _is_binary(array.shape):
        return checks.probabilities(array, where)
    positive = np.asarray(array, np.float64).reshape(-1)
    if not ((positive >= 0) & (positive <= 1)).all():
        raise ValueError(
            f"{where} must lie between 0 and 1 if there is one number for each example, P(class 1); got "
            f"{np.count_nonzero(np.isnan(positive))} NaN and numbers from {positive.min():.4g} to "
            f"{positive.max():.4g}; apply the sigmoid first, or pass (N, C) class probabilities"
        )
    return np.stack([1 - positive, positive], axis=1)


def classes(labels: Labels, num_examples: int, num_classes: int, *, is_binary: bool) -> Int[np.ndarray, " N"]:
    """Return for each example the number of its class; raise ValueError unless these are classes of the examples."""
    array = numbers(labels, "labels")
    if array.shape == (num_examples, 1):
        array = array[:, 0]
    if is_binary and not jnp.issubdtype(array.dtype, jnp.integer):
        found = np.asarray(array, np.float64)
        if not np.isin(found, (0, 1)).all():
            raise ValueError(
                "labels of a binary classifier must be 0 or 1; got other numbers, from "
                f"{found.min():.4g} to {found.max():.4g}; compare them with a threshold, as labels > 0"
            )
        array = found.astype(np.int64)
    return checks.classes(array, num_examples, num_classes)


def logit_rows(logits: Probs, where: str) -> Float[np.ndarray, "N K"]:
    """Return rows of logits in float64, or raise ValueError if they are not finite numbers (N, C), (N,) or (N, 1)."""
    array = np.asarray(numbers(logits, where), np.float64)
    if array.ndim not in (1, 2) or 0 in array.shape or not np.isfinite(array).all():
        raise ValueError(
            f"{where} must be a non-empty (N, C) array of finite numbers, or (N,) for a binary classifier; got "
            f"{checks.shape_and_faults(array)}; pass the outputs before the softmax"
        )
    if _is_binary(array.shape):
        return np.stack([np.zeros(len(array)), array.reshape(-1)], axis=1)
    return array


def scores(values: Float[AnyArray, " N"] | Float[AnyArray, "N 1"], where: str) -> Float[np.ndarray, " N"]:
    """Return one score for each example in float64, or raise ValueError if it is not a number."""
    array = np.asarray(numbers(values, where), np.float64)
    flat = array[:, 0] if _is_binary(array.shape) and array.ndim == 2 else array
    if flat.ndim != 1 or flat.size == 0 or np.isnan(flat).any():
        raise ValueError(
            f"{where} must be a non-empty vector without NaN; got {checks.shape_and_faults(array)}; "
            "pass one score per example"
        )
    return flat


def numbers(value: Any, where: str) -> np.ndarray:
    """Return an array of real numbers of any type, or raise ValueError for anything else."""
    if isinstance(value, jax.core.Tracer):
        raise ValueError(
            f"{where} must be known numbers, as metrics are computed by NumPy; got a traced array; call it outside of "
            "jit, grad and vmap"
        )
    checks.unmasked(value, where)
    try:
        array = np.asarray(value)
    except Exception:  # ragged lists, and whatever the conversion of a foreign array raises
        array = np.asarray(None)
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool) or np.iscomplexobj(array):
        got = (
            f"{type(value).__name__} of {array.dtype}"
            if array.dtype != object
            else f"{' '.join(repr(value).split()):.80}"
        )
        raise ValueError(f"{where} must be an array of real numbers; got {got}; try np.asarray of numbers")
    return array


def _is_binary(shape: tuple[int, ...]) -> bool:
    """Whether there is one number for each of at least one example."""
    return len(shape) in (1, 2) and shape[1:] in ((), (1,)) and shape[0] > 0
