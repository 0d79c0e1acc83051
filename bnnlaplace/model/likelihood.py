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
from bnnlaplace.core.tree import described, summed_type
from bnnlaplace.model import arrays

Outputs = Float[ArrayLike, "*lead C"]
Targets = Shaped[ArrayLike, "..."]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("log_prob", "factor_mv", "mean", "hessian_mv", "factor_transpose_mv"),
    meta_fields=("name", "target_kind", "target_shape"),
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
        targets are numbers shaped like the outputs.
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
    target_shape
        The shape of the target at one position, where it is not that of `target_kind`: a tuple, or a function from the
        number of outputs C to one. With (1,) targets (..., 1) go with any number of outputs, such as a mean and a log
        variance; with lambda c: (c // 2,) targets (..., C / 2) do. Labels are then integers of that shape, which are
        not compared with the number of outputs.

    Raises
    ------
    ValueError
        If `target_kind` or `target_shape` is something else.
    """

    name: str
    target_kind: str
    log_prob: Callable[[Any, Any], Array]
    factor_mv: Callable[[Any, Any], Array]
    mean: Callable[[Any], Array]
    hessian_mv: Callable[[Any, Any], Array] | None = None
    factor_transpose_mv: Callable[[Any, Any], Array] | None = None
    target_shape: tuple[int, ...] | Callable[[int], tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        checks.choice(self.target_kind, "Likelihood(target_kind=...)", ("array", "label"))
        shape = self.target_shape
        is_shape = isinstance(shape, tuple) and all(isinstance(length, int) and length > 0 for length in shape)
        if not (shape is None or callable(shape) or is_shape):
            raise ValueError(
                "Likelihood(target_shape=...) must be a tuple of positive lengths, or a function from the number of "
                f"outputs to one; got {shape!r:.80}; try (1,)"
            )
        if self.factor_transpose_mv is None:
            object.__setattr__(self, "factor_transpose_mv", Partial(_transposed, self.factor_mv))
        if self.hessian_mv is None:
            factors = self.factor_mv, self.factor_transpose_mv
            object.__setattr__(self, "hessian_mv", Partial(_squared, *factors))

    def targets_shape(self, outputs_shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the targets that go with outputs of shape (..., C)."""
        *lead, num_outputs = outputs_shape
        if self.target_shape is None:
            return outputs_shape if self.target_kind == "array" else tuple(lead)
        shape = self.target_shape(num_outputs) if callable(self.target_shape) else self.target_shape
        return (*lead, *shape)

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
    checks.all_positive(sigma, "gaussian(sigma_noise=...)", with_squares=True)
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


_BY_NAME = {"classification": categorical, "regression": gaussian, "binary": bernoulli}


def is_ours(likelihood: Likelihood) -> bool:
    """Whether the functions of a likelihood are those of one that this package defines."""
    known = (make() for make in _BY_NAME.values())
    return jax.tree.structure(likelihood) in map(jax.tree.structure, known)


def resolve(likelihood: str | Likelihood, sigma_noise: Any = 1.0) -> Likelihood:
    """Turn the name of a likelihood into the record. A record is returned as it is.

    Raises
    ------
    ValueError
        If the name is unknown, or the noise is not one positive, finite number or one for each output. Only the shape
        of a traced noise is checked. Also if the noise is not 1 and the likelihood is not "regression".
    """
    if isinstance(likelihood, Likelihood):
        _check_functions(likelihood)
    elif not isinstance(likelihood, str) or likelihood not in _BY_NAME:
        raise ValueError(
            f"Laplace(likelihood=...) must be one of {sorted(_BY_NAME)} or a Likelihood; got {likelihood!r:.80}; "
            "build your own with bnnlaplace.Likelihood"
        )
    traced = isinstance(sigma_noise, jax.core.Tracer)
    is_number = isinstance(sigma_noise, (int, float, np.number, np.ndarray, jax.Array)) and np.ndim(sigma_noise) <= 1
    if not is_number:
        raise ValueError(
            "Laplace(sigma_noise=...) must be one positive, finite number, or one for each output; got "
            f"{described(sigma_noise)}; try 1.0"
        )
    checks.all_positive(sigma_noise, "Laplace(sigma_noise=...)", with_squares=True)
    if likelihood != "regression" and (traced or np.shape(sigma_noise) != () or float(sigma_noise) != 1.0):
        name = likelihood.name if isinstance(likelihood, Likelihood) else likelihood
        raise ValueError(
            f"Laplace(sigma_noise=...) must be left out unless likelihood='regression'; got {sigma_noise} with "
            f"{name!r}; a Likelihood holds its own noise: bnnlaplace.gaussian(sigma)"
        )
    if isinstance(likelihood, Likelihood):
        return likelihood
    return gaussian(sigma_noise) if likelihood == "regression" else _BY_NAME[likelihood]()


def _check_functions(likelihood: Likelihood) -> None:
    """Raise ValueError if something stands where a likelihood of the user's own must have a function."""
    for name in ("log_prob", "factor_mv", "mean", "hessian_mv", "factor_transpose_mv"):
        if not callable(getattr(likelihood, name)):
            raise ValueError(
                f"Likelihood({name}=...) must be a function; got {getattr(likelihood, name)!r:.80}; see the attributes "
                "of bnnlaplace.Likelihood"
            )


def check_targets(likelihood: Likelihood, outputs_shape: tuple[int, ...], targets: Any, where: str) -> None:
    """Check targets against the shape (N, ..., C) of the outputs. Wrong ones would broadcast, or become NaN, silently.

    Parameters
    ----------
    likelihood
        The likelihood, which says what its targets are.
    outputs_shape
        (N, ..., C).
    targets
        Labels (N, ...), or arrays shaped like the outputs, or as `Likelihood.target_shape` says. Only shape and type of
        traced targets are checked.
    where
        What the message calls the argument.

    Raises
    ------
    ValueError
        If labels are neither integers of shape (N, ...) within the classes nor probabilities that sum to one, other
        targets have another shape than the likelihood states, binary targets are outside of [0, 1], targets of a
        regression are not finite, a number does not fit into the type in which it is used, or there is not one noise
        scale for each output.
    """
    noise, num_outputs = likelihood.sigma_noise, outputs_shape[-1]
    if noise is not None and noise.shape not in ((), (num_outputs,)):
        raise ValueError(
            f"Laplace(sigma_noise=...) must be one number, or one for each of the {num_outputs} outputs; got "
            f"{noise.size}"
        )
    if likelihood.name == "classification" and num_outputs == 1:
        raise ValueError(
            f"{where}: 'classification' must have an output for each class, at least two; got one output; use "
            "likelihood='binary', whose output is the logit of class 1, with targets (N, 1)"
        )
    traced = isinstance(targets, jax.core.Tracer)
    # An operation of JAX would be traced inside `jit`.
    targets = targets if traced else np.asarray(arrays.as_array(targets, f"{where}: targets"))
    if arrays.used_type(targets.dtype) is None or jnp.issubdtype(targets.dtype, jnp.complexfloating):
        raise ValueError(f"{where}: targets must be real numbers; got an array of {targets.dtype}; encode them")
    expected, dtype = likelihood.targets_shape(outputs_shape), targets.dtype
    if likelihood.target_kind == "array":
        if targets.shape != expected:
            raise ValueError(
                f"{where}: targets of {likelihood.name!r} must have the shape {expected}"
                f"{' of the outputs' if expected == outputs_shape else ''}; got {targets.shape}; reshape them, or "
                "state their shape by Likelihood(target_shape=...)"
            )
    else:
        takes_soft = likelihood.target_shape is None
        is_label = targets.shape == expected and jnp.issubdtype(dtype, jnp.integer)
        is_soft = takes_soft and targets.shape == outputs_shape and jnp.issubdtype(dtype, jnp.floating)
        if not (is_label or is_soft):
            soft = f", or probabilities of shape {outputs_shape}" if takes_soft else ""
            raise ValueError(
                f"{where}: labels must be integers of shape {expected}{soft}; got {dtype} of shape {targets.shape}; "
                "pass class indices"
            )
    if not traced:
        arrays.check_fits_type(targets, f"{where}: targets")
        _check_numbers(likelihood, num_outputs, targets, where)


def _check_numbers(likelihood: Likelihood, num_outputs: int, targets: np.ndarray, where: str) -> None:
    """Check the numbers of targets whose shape and type are right."""
    if likelihood.target_kind == "array":
        if likelihood.name == "binary" and not ((targets >= 0) & (targets <= 1)).all():
            raise ValueError(
                f"{where}: binary targets must be 0 or 1, or probabilities between; got numbers from "
                f"{targets.min()} to {targets.max()}; remap them, as -1 and 1 by (y + 1) / 2"
            )
        if likelihood.name == "regression":  # NaN may stand for a missing target in a likelihood of the user's own
            arrays.check_finite(targets, f"{where}: targets")
    elif jnp.issubdtype(targets.dtype, jnp.floating):
        sums = targets.sum(axis=-1, dtype=np.float64)
        if not (np.all(targets >= 0) and np.allclose(sums, 1, atol=1e-3)):
            raise ValueError(
                f"{where}: soft targets must be probabilities, at least 0 and with a sum of 1 over classes; got "
                f"{targets.min():.4g} and more, and sums from {sums.min():.4g} to {sums.max():.4g}; normalise them"
            )
    elif likelihood.target_shape is None and targets.size and not 0 <= targets.min() <= targets.max() < num_outputs:
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
