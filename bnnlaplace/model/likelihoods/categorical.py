"""Classes with the probabilities softmax(f), some of which may be unknown or count more than others."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Real

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described
from bnnlaplace.model import arrays
from bnnlaplace.model.likelihoods.record import Likelihood, Outputs, Targets


def categorical(ignore_index: int | None = None, class_weights: Real[ArrayLike, " C"] | None = None) -> Likelihood:
    """Softmax likelihood of integer labels (...,), or of class probabilities (..., C) that sum to one.

    log p(y | f) = sum_c y_c log softmax(f)_c, with y one-hot for a label. With p = softmax(f) the curvature is
    Lambda = diag(p) - p p', and its factor B = diag(sqrt p) - p sqrt(p)'. Every product costs O(C), and no C x C matrix
    is formed.

    Parameters
    ----------
    ignore_index
        A label that stands for an unknown one, such as -100: log p and curvature are zero there, as if the example, or
        the position of its outputs, had no target. Predictions do not depend on it.
    class_weights
        A factor w_c >= 0 of log p for each class (C,). The curvature has the factor sum_c w_c y_c. So a label of
        weight 2 counts as two equal examples do. Predictions do not depend on them.
    """
    likelihood = Likelihood(
        "classification",
        "label",
        Partial(_categorical_log_prob),
        Partial(_categorical_factor_mv),
        Partial(_softmax),
        Partial(_categorical_hessian_mv),
        Partial(_categorical_factor_transpose_mv),
    )
    if ignore_index is None and class_weights is None:
        return likelihood
    arguments = _checked_ignore_index(ignore_index), _checked_class_weights(class_weights)
    return dataclasses.replace(
        likelihood,
        log_prob=Partial(_weighted_log_prob, *arguments),
        target_weights=Partial(_target_weights, *arguments),
    )


def parameters_of(likelihood: Likelihood) -> dict[str, Any]:
    """`ignore_index` and `class_weights` of a likelihood that `categorical` made; None where there are none."""
    weights = likelihood.target_weights
    is_weighted = isinstance(weights, Partial) and weights.func is _target_weights
    return dict(zip(("ignore_index", "class_weights"), weights.args if is_weighted else (None, None), strict=True))


def _checked_ignore_index(index: Any) -> np.ndarray | None:
    if index is None:
        return None
    is_integer = isinstance(index, (int, np.integer)) and not isinstance(index, bool)
    if not (is_integer and abs(int(index)) < 2**31):
        raise ValueError(f"categorical(ignore_index=...) must be an integer of 32 bits; got {index!r:.80}; try -100")
    return np.asarray(index, np.int32)


def _checked_class_weights(weights: Any) -> Array | None:
    if weights is None:
        return None
    where = "categorical(class_weights=...)"
    if isinstance(weights, jax.core.Tracer):
        return weights
    checks.unmasked(weights, where)
    try:
        numbers = np.asarray(weights)
    except ValueError:  # lists of different lengths
        numbers = np.asarray(None)
    is_real = numbers.dtype.kind in "iuf" or jnp.issubdtype(numbers.dtype, jnp.floating)
    if not is_real or numbers.ndim != 1 or not (numbers >= 0).all() or not (numbers > 0).any():
        raise ValueError(
            f"{where} must be one number for each class (C,), at least 0 and not all 0; got {described(numbers)} "
            f"{' '.join(str(numbers).split())!s:.60}; try np.ones(C)"
        )
    arrays.check_finite(numbers, where)
    return jnp.asarray(numbers, float)


def _weighted_log_prob(ignore_index: Any, class_weights: Any, f: Outputs, y: Targets) -> Array:
    log_p = jax.nn.log_softmax(f, axis=-1)
    if jnp.issubdtype(y.dtype, jnp.floating):
        return jnp.sum((1 if class_weights is None else class_weights.astype(log_p.dtype)) * y * log_p, axis=-1)
    label = _known(ignore_index, y)
    # An unknown label has the weight zero, and any class in its place is finite.
    return _target_weights(ignore_index, class_weights, y).astype(log_p.dtype) * _categorical_log_prob(f, label)


def _target_weights(ignore_index: Any, class_weights: Any, y: Targets) -> Array:
    if jnp.issubdtype(y.dtype, jnp.floating):
        return jnp.sum(y if class_weights is None else class_weights.astype(y.dtype) * y, axis=-1)
    of_class = jnp.ones(jnp.shape(y)) if class_weights is None else class_weights[_known(ignore_index, y)]
    return of_class if ignore_index is None else jnp.where(y == ignore_index, 0, of_class)


def _known(ignore_index: Any, y: Targets) -> Targets:
    return jnp.asarray(y) if ignore_index is None else jnp.where(y == ignore_index, 0, y)


def _softmax(f: Outputs) -> Array:
    return jax.nn.softmax(f, axis=-1)


def _root_softmax(f: Outputs) -> Array:
    # The gradient of sqrt(softmax(f)) is not finite if a probability rounds to zero.
    return jnp.exp(0.5 * jax.nn.log_softmax(f, axis=-1))


def _inner(a: Outputs, b: Outputs) -> Array:
    return jnp.sum(a * b, axis=-1, keepdims=True)


def _categorical_log_prob(f: Outputs, y: Targets) -> Array:
    log_p = jax.nn.log_softmax(f, axis=-1)
    if jnp.issubdtype(y.dtype, jnp.floating):
        return jnp.sum(y * log_p, axis=-1)
    return jnp.take_along_axis(log_p, y[..., None], axis=-1)[..., 0]


def _categorical_hessian_mv(f: Outputs, v: Outputs) -> Array:
    p = _softmax(f)
    return p * v - p * _inner(p, v)


def _categorical_factor_mv(f: Outputs, u: Outputs) -> Array:
    root = _root_softmax(f)
    return root * u - root**2 * _inner(root, u)


def _categorical_factor_transpose_mv(f: Outputs, v: Outputs) -> Array:
    root = _root_softmax(f)
    return root * v - root * _inner(root**2, v)
