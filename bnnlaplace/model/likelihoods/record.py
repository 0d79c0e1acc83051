"""A likelihood in output space: it knows outputs and targets, and never sees the weights.

f stands for the outputs of one example, Lambda = -d^2 log p(y | f) / df^2 for their curvature, and B for a factor of
it, Lambda = B B'. A new likelihood is one function that returns a `Likelihood`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Shaped

from bnnlaplace.core import checks

Outputs = Float[ArrayLike, "*lead C"]
Targets = Shaped[ArrayLike, "..."]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("log_prob", "factor_mv", "mean", "hessian_mv", "factor_transpose_mv", "target_weights"),
    meta_fields=("name", "target_kind", "target_shape"),
)
@dataclass(frozen=True)
class Likelihood:
    """The probability p(y | f) of targets given outputs, and products with its curvature in output space.

    Every function takes outputs of shape (..., C) and works along the last axis. Write functions with parameters, such
    as a noise scale, as `jax.tree_util.Partial`s: then these are leaves of this pytree and can be differentiated.

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
    target_weights
        y -> w >= 0, shape (...,): the curvature at a target y is w B B', where `log_prob` has the factor w as well. By
        default all are one. So a target that is not known can be left out, with w = 0.

    Raises
    ------
    ValueError
        If `name`, `target_kind` or `target_shape` is something else. Functions are checked when data are fitted.
    """

    name: str
    target_kind: str
    log_prob: Callable[[Any, Any], Array]
    factor_mv: Callable[[Any, Any], Array]
    mean: Callable[[Any], Array]
    hessian_mv: Callable[[Any, Any], Array] | None = None
    factor_transpose_mv: Callable[[Any, Any], Array] | None = None
    target_shape: tuple[int, ...] | Callable[[int], tuple[int, ...]] | None = None
    target_weights: Callable[[Any], Array] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise ValueError(f"Likelihood(name=...) must be a string; got {self.name!r:.80}; try 'poisson'")
        checks.choice(self.target_kind, "Likelihood(target_kind=...)", ("array", "label"))
        shape = self.target_shape
        is_shape = isinstance(shape, tuple) and all(isinstance(length, int) and length > 0 for length in shape)
        if not (shape is None or callable(shape) or is_shape):
            raise ValueError(
                "Likelihood(target_shape=...) must be a tuple of positive lengths, or a function from the number of "
                f"outputs to one; got {shape!r:.80}; try (1,)"
            )
        for field in ("log_prob", "factor_mv", "mean", "hessian_mv", "factor_transpose_mv", "target_weights"):
            function = getattr(self, field)
            if callable(function) and jax.tree_util.all_leaves([function]):  # no pytree, which JAX would not take
                object.__setattr__(self, field, Partial(function))
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

    def weights_of(self, targets: Targets | None, weights: Float[ArrayLike, " N"]) -> Float[Array, "N ..."]:
        """How many times the curvature counts: for each example (N,), or for each position if `target_weights` say so.

        `weights` are those of the examples. Targets are needed only where `target_weights` are.
        """
        if self.target_weights is None:
            return weights
        of_targets = self.target_weights(targets)
        return of_targets * weights.reshape(-1, *[1] * (of_targets.ndim - 1))

    @property
    def sigma_noise(self) -> Float[Array, "*C"] | None:
        """Noise scale of a `gaussian` likelihood; None for any other."""
        from bnnlaplace.model.likelihoods import gaussian  # which needs this class

        return gaussian.noise_of(self)

    @property
    def temperature(self) -> Float[Array, ""] | float:
        """T of a `tempered` likelihood; 1.0 for any other."""
        from bnnlaplace.model.likelihoods import tempered  # which needs this class

        temperature = tempered.untempered(self)[1]
        return 1.0 if temperature is None else temperature

    @property
    def ignore_index(self) -> int | None:
        """The label that a `categorical` likelihood leaves out; None if it has none."""
        from bnnlaplace.model.likelihoods import categorical  # which needs this class

        ignored = categorical.parameters_of(self)["ignore_index"]
        return ignored if ignored is None else int(ignored)


def _transposed(factor_mv: Callable, f: Outputs, v: Outputs) -> Array:
    return jax.linear_transpose(partial(factor_mv, f), v)(v)[0]


def _squared(factor_mv: Callable, factor_transpose_mv: Callable, f: Outputs, v: Outputs) -> Array:
    return factor_mv(f, factor_transpose_mv(f, v))
