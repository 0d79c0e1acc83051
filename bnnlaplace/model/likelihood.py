"""Likelihoods in output space: they know outputs and targets, and never see the weights.

f stands for the outputs of one example, Lambda = -d^2 log p(y | f) / df^2 for their curvature, and B for a factor of
it, Lambda = B B'. A new likelihood is one function that returns a `Likelihood`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Real, Shaped

from bnnlaplace.core import checks
from bnnlaplace.core.tree import summed_type

Outputs = Float[ArrayLike, "*lead C"]
Targets = Shaped[ArrayLike, "..."]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("log_prob", "factor_mv", "mean", "hessian_mv", "factor_transpose_mv"),
    meta_fields=("name", "target_kind"),
)
@dataclass(frozen=True)
class Likelihood:
    """The probability p(y | f) of targets given outputs, and products with its curvature in output space.

    Every function takes outputs of shape (..., C) and works along the last axis. Write the functions as
    `jax.tree_util.Partial`s, so that parameters such as a noise scale are leaves of this pytree and can be
    differentiated.

    Attributes
    ----------
    name
        "classification", "regression" and "binary" have links and checks of their own. Any other name is allowed.
    target_kind
        "label" if targets are integer class labels (...,), or class probabilities shaped like the outputs. "array" if
        targets are shaped like the outputs.
    log_prob
        (f, y) -> log p(y | f), shape (...,).
    factor_mv
        (f, u) -> B u, with u shaped like f.
    mean
        f -> E[y | f]: class probabilities, or the mean itself.
    hessian_mv
        (f, v) -> Lambda v; by default B B' v.
    factor_transpose_mv
        (f, v) -> B' v; by default the transpose of `factor_mv`.
    """

    name: str
    target_kind: str
    log_prob: Callable[[Any, Any], Array]
    factor_mv: Callable[[Any, Any], Array]
    mean: Callable[[Any], Array]
    hessian_mv: Callable[[Any, Any], Array] | None = None
    factor_transpose_mv: Callable[[Any, Any], Array] | None = None

    def __post_init__(self) -> None:
        if self.factor_transpose_mv is None:
            object.__setattr__(self, "factor_transpose_mv", Partial(_transposed, self.factor_mv))
        if self.hessian_mv is None:
            factors = self.factor_mv, self.factor_transpose_mv
            object.__setattr__(self, "hessian_mv", Partial(_squared, *factors))

    @property
    def sigma_noise(self) -> Float[Array, "*C"] | None:
        """Noise scale of a `gaussian` likelihood; None for any other."""
        is_gaussian = isinstance(self.log_prob, Partial) and self.log_prob.func is _gaussian_log_prob
        return self.log_prob.args[0] if is_gaussian else None


def categorical() -> Likelihood:
    """Softmax likelihood of integer labels (...,), or of class probabilities (..., C) that sum to one.

    log p(y | f) = sum_c y_c log softmax(f)_c, with y one-hot for a label. With p = softmax(f) the curvature is
    Lambda = diag(p) - p p', and its factor B = diag(sqrt p) - p sqrt(p)'. Every product costs O(C), and no C x C matrix
    is formed.
    """
    return Likelihood(
        "classification",
        "label",
        Partial(_categorical_log_prob),
        Partial(_categorical_factor_mv),
        Partial(_softmax),
        Partial(_categorical_hessian_mv),
        Partial(_categorical_factor_transpose_mv),
    )


def gaussian(sigma_noise: Real[ArrayLike, "*C"] = 1.0) -> Likelihood:
    """Gaussian likelihood with independent noise of standard deviation `sigma_noise`.

    log p(y | f) = -sum_c [(y_c - f_c)^2 / (2 sigma_c^2) + log(sigma_c sqrt(2 pi))], and Lambda = diag(1 / sigma^2).

    Parameters
    ----------
    sigma_noise
        The scale sigma: one positive number for all outputs, or one for each output (C,). The likelihood is
        differentiable in it.
    """
    sigma = jnp.asarray(sigma_noise)
    sigma = sigma.astype(summed_type(sigma.dtype))
    checks.all_positive(sigma, "gaussian(sigma_noise=...)")
    return Likelihood(
        "regression",
        "array",
        Partial(_gaussian_log_prob, sigma),
        Partial(_gaussian_factor_mv, sigma),
        Partial(_identity),
        Partial(_gaussian_hessian_mv, sigma),
        Partial(_gaussian_factor_mv, sigma),
    )


def bernoulli() -> Likelihood:
    """Independent Bernoulli likelihood with logits f.

    Targets are shaped like f. They are 0 or 1, or probabilities in between. With p = sigmoid(f) the curvature is
    Lambda = diag(p (1 - p)).
    """
    return Likelihood(
        "binary",
        "array",
        Partial(_bernoulli_log_prob),
        Partial(_bernoulli_factor_mv),
        Partial(jax.nn.sigmoid),
        Partial(_bernoulli_hessian_mv),
        Partial(_bernoulli_factor_mv),
    )


def is_ours(likelihood: Likelihood) -> bool:
    """Whether the functions of a likelihood are those of one that this package defines."""
    known = (categorical(), gaussian(), bernoulli())
    return jax.tree.structure(likelihood) in map(jax.tree.structure, known)


def resolve(likelihood: str | Likelihood, sigma_noise: Any = 1.0) -> Likelihood:
    """Turn the name of a likelihood into the record. A record is returned as it is.

    Raises
    ------
    ValueError
        If the name is unknown, or the noise is not one positive, finite number or one for each output. Only the shape
        of a traced noise is checked. Also if the noise is not 1 and the likelihood is not "regression".
    """
    traced = isinstance(sigma_noise, jax.core.Tracer)
    is_number = isinstance(sigma_noise, (int, float, np.number, np.ndarray, jax.Array)) and np.ndim(sigma_noise) <= 1
    if not is_number:
        raise ValueError(
            "Laplace(sigma_noise=...) must be one positive, finite number, or one for each output; got "
            f"{sigma_noise!r}; try 1.0"
        )
    checks.all_positive(sigma_noise, "Laplace(sigma_noise=...)")
    if likelihood != "regression" and (traced or np.shape(sigma_noise) != () or float(sigma_noise) != 1.0):
        name = likelihood.name if isinstance(likelihood, Likelihood) else likelihood
        raise ValueError(
            f"Laplace(sigma_noise=...) must be left out unless likelihood='regression'; got {sigma_noise} with "
            f"{name!r}; a Likelihood holds its own noise: bnnlaplace.gaussian(sigma)"
        )
    if isinstance(likelihood, Likelihood):
        return likelihood
    known = {"classification": categorical, "regression": partial(gaussian, sigma_noise), "binary": bernoulli}
    if likelihood not in known:
        raise ValueError(
            f"Laplace(likelihood=...) must be one of {sorted(known)} or a Likelihood; got {likelihood!r}; "
            "build your own with bnnlaplace.Likelihood"
        )
    return known[likelihood]()


def check_targets(likelihood: Likelihood, outputs_shape: tuple[int, ...], targets: Any, where: str) -> None:
    """Check targets against the shape (N, ..., C) of the outputs. Wrong ones would broadcast, or become NaN, silently.

    Parameters
    ----------
    likelihood
        The likelihood, which says what its targets are.
    outputs_shape
        (N, ..., C).
    targets
        Labels (N, ...), or arrays shaped like the outputs. Only shape and type of traced targets are checked.
    where
        What the message calls the argument.

    Raises
    ------
    ValueError
        If labels are neither integers of shape (N, ...) within the classes nor probabilities that sum to one, other
        targets are not shaped like the outputs, binary targets are outside of [0, 1], or there is not one noise scale
        for each output.
    """
    noise, num_outputs = likelihood.sigma_noise, outputs_shape[-1]
    if noise is not None and noise.shape not in ((), (num_outputs,)):
        raise ValueError(
            f"Laplace(sigma_noise=...) must be one number, or one for each of the {num_outputs} outputs; got "
            f"{noise.size}"
        )
    traced = isinstance(targets, jax.core.Tracer)
    targets = targets if traced else np.asarray(targets)  # an operation of JAX would be traced inside `jit`
    is_soft = targets.shape == outputs_shape and jnp.issubdtype(targets.dtype, jnp.floating)
    is_label = targets.shape == outputs_shape[:-1] and jnp.issubdtype(targets.dtype, jnp.integer)
    if likelihood.target_kind == "array":
        if targets.shape != outputs_shape:
            raise ValueError(
                f"{where}: targets of {likelihood.name!r} must have the shape {outputs_shape} of the outputs; got "
                f"{targets.shape}; reshape them"
            )
    elif not (is_label or is_soft):
        raise ValueError(
            f"{where}: labels must be integers of shape {outputs_shape[:-1]}, or probabilities of shape "
            f"{outputs_shape}; got {targets.dtype} of shape {targets.shape}; pass class indices"
        )
    if not traced:
        _check_numbers(likelihood, num_outputs, targets, where)


def _check_numbers(likelihood: Likelihood, num_outputs: int, targets: np.ndarray, where: str) -> None:
    """Check the numbers of targets whose shape and type are right."""
    if likelihood.target_kind == "array":
        if likelihood.name == "binary" and not ((targets >= 0) & (targets <= 1)).all():
            raise ValueError(
                f"{where}: binary targets must be 0 or 1, or probabilities between; got numbers from "
                f"{targets.min()} to {targets.max()}; remap them, as -1 and 1 by (y + 1) / 2"
            )
    elif jnp.issubdtype(targets.dtype, jnp.floating):
        sums = targets.sum(axis=-1, dtype=np.float64)
        if not (np.all(targets >= 0) and np.allclose(sums, 1, atol=1e-3)):
            raise ValueError(
                f"{where}: soft targets must be probabilities, at least 0 and with a sum of 1 over classes; got "
                f"{targets.min():.4g} and more, and sums from {sums.min():.4g} to {sums.max():.4g}; normalise them"
            )
    elif targets.size and not 0 <= targets.min() <= targets.max() < num_outputs:
        raise ValueError(
            f"{where}: labels must lie in 0..{num_outputs - 1}, as the network has {num_outputs} outputs; got labels "
            f"from {targets.min()} to {targets.max()}; remap them or widen the network"
        )


def _transposed(factor_mv: Callable, f: Outputs, v: Outputs) -> Array:
    return jax.linear_transpose(partial(factor_mv, f), v)(v)[0]


def _squared(factor_mv: Callable, factor_transpose_mv: Callable, f: Outputs, v: Outputs) -> Array:
    return factor_mv(f, factor_transpose_mv(f, v))


def _identity(f: Outputs) -> Outputs:
    return f


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


def _gaussian_log_prob(sigma: Array, f: Outputs, y: Targets) -> Array:
    return jnp.sum(-0.5 * ((y - f) / sigma) ** 2 - jnp.log(sigma) - 0.5 * jnp.log(2 * jnp.pi), axis=-1)


def _gaussian_hessian_mv(sigma: Array, f: Outputs, v: Outputs) -> Array:
    return v / sigma**2


def _gaussian_factor_mv(sigma: Array, f: Outputs, u: Outputs) -> Array:
    return u / sigma


def _bernoulli_log_prob(f: Outputs, y: Targets) -> Array:
    return jnp.sum(y * jax.nn.log_sigmoid(f) + (1 - y) * jax.nn.log_sigmoid(-f), axis=-1)


def _bernoulli_hessian_mv(f: Outputs, v: Outputs) -> Array:
    p = jax.nn.sigmoid(f)
    return p * (1 - p) * v


def _bernoulli_factor_mv(f: Outputs, u: Outputs) -> Array:
    # This is sqrt(p (1 - p)), written so that its gradient is finite even if p rounds to 0 or 1.
    return jnp.exp(0.5 * (jax.nn.log_sigmoid(f) + jax.nn.log_sigmoid(-f))) * u
