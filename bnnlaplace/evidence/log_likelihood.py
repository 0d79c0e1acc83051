"""The log likelihood at the weights and its gradient, summed over the data one microbatch at a time."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from bnnlaplace.core.tree import number_type, ravel
from bnnlaplace.core.types import Inputs
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network


class LogLikelihood(NamedTuple):
    """The log likelihood at the weights and what belongs to it. The log likelihoods of batches add up.

    Attributes
    ----------
    value
        scale * sum_n log p(y_n | f_n), in nats.
    gradient
        Its gradient in the weights, shape (P,). With the gradient of the prior it says how far the weights are from a
        mode.
    num_targets
        scale / T * (the number of outputs, at all positions of all examples), each as many times as it counts.
    squared_residuals
        scale / T * sum_n |(y_n - f_n) / sigma|^2, with the temperature T, if the likelihood has a noise sigma,
        otherwise 0. It is summed on its own, because it would lose its digits in the difference of two log likelihoods.
    """

    value: np.float64
    gradient: Float[Array, " P"]
    num_targets: np.float64
    squared_residuals: np.float64

    @classmethod
    def from_arrays(cls, value: Any, gradient: Any, num_targets: Any, squared_residuals: Any) -> "LogLikelihood":
        """The record of arrays as a checkpoint holds them."""
        return cls(np.float64(value), jnp.asarray(gradient), np.float64(num_targets), np.float64(squared_residuals))

    def check(self) -> "LogLikelihood":
        """Return the record, or raise ValueError if no target counts, or the value or the gradient is not finite."""
        if not self.num_targets > 0:
            raise ValueError(
                "fit(data=...) must have a target that counts; got targets that are all left out; look at "
                "ignore_index, class_weights and weights of examples"
            )
        if not (np.isfinite(self.value) and bool(jnp.isfinite(self.gradient).all())):
            raise ValueError(
                "fit: the log likelihood or its gradient is not finite at these weights and data; look for NaN or "
                "infinite values in the inputs, the targets and the weights"
            )
        return self

    def scaled(self, scale: float) -> "LogLikelihood":
        """The log likelihood of `scale` times as many examples."""
        return jax.tree.map(lambda total: scale * total, self)

    def log_joint_at_best_noise(self, sigma_noise: Float[Array, "*C"]) -> LogJoint:
        """The terms of the evidence beside the determinant, with the best noise; `sigma_noise` is that of the model."""
        return LogJoint.at_best_noise(float(self.squared_residuals), float(self.num_targets), sigma_noise)

    def with_noise_variance(self, factor: float, sigma_noise: Float[Array, "*C"]) -> "LogLikelihood":
        """The log likelihood of a regression whose noise variance is `factor` times that of `sigma_noise`."""
        # log p = constant - (r / factor + n log factor) / 2, where r holds the residuals in units of the present noise.
        residuals, count = float(self.squared_residuals), float(self.num_targets)
        constant = self.log_joint_at_best_noise(sigma_noise).constant
        value = constant - 0.5 * (residuals / factor + count * math.log(factor))
        return self._replace(
            value=np.float64(value),
            gradient=self.gradient / factor,
            squared_residuals=self.squared_residuals / factor,
        )


def batch_log_likelihood(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: Inputs,
    targets: Shaped[Array, "..."],
    weights: Float[Array, " N"] | None = None,
    *,
    microbatch: int = 64,
) -> LogLikelihood:
    """Sum the log likelihood of one batch, and its gradient. Examples with weight zero do not count.

    The numbers of single examples are summed in float64 on the host. Cost: one gradient of the batch. Memory: the
    activations of a microbatch.
    """
    gradient, numbers = _batch_sums(network, likelihood, params, inputs, targets, weights, microbatch=microbatch)
    value, squares, counts = (np.sum(number, dtype=np.float64) for number in jax.device_get(numbers))
    temperature = np.float64(likelihood.temperature)
    return LogLikelihood(value, gradient, counts / temperature, squares / temperature)


@partial(jax.jit, static_argnames="microbatch")
def _batch_sums(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: Inputs,
    targets: Shaped[Array, "..."],
    weights: Float[Array, " N"] | None,
    *,
    microbatch: int,
) -> tuple[Float[Array, " P"], tuple[Array, Array, Array]]:
    """The gradient, and for each example log p(y | f), |(y - f) / sigma|^2 and the number of targets."""
    # Inputs and targets are cut alike, each in its own type, so that labels stay integers.
    dtype = number_type(params)
    batches = mb.split(inputs, microbatch, dtype, weights)
    labels = mb.split(targets, microbatch, dtype).inputs

    def value(params: PyTree, batch: mb.Microbatches, targets: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        outputs = network(params, batch.inputs)
        log_prob = likelihood.log_prob(outputs, targets)
        log_prob = mb.over_outputs(batch.weights, log_prob) * log_prob
        # The last microbatch is padded with examples of weight zero, which must not count as targets.
        weights = likelihood.weights_of(targets, batch.weights)
        counts = weights * (outputs.size // weights.size)
        squares = jnp.zeros(len(outputs), dtype)
        if likelihood.sigma_noise is not None:
            residuals = (targets - outputs) / likelihood.sigma_noise
            squares = mb.over_outputs(batch.weights, residuals) * residuals**2
        return jnp.sum(log_prob), tuple(_by_examples(number) for number in (log_prob, squares, counts))

    def gradient_and_numbers(batch_and_targets: tuple[mb.Microbatches, Array]) -> tuple[Array, tuple]:
        (_, numbers), gradient = jax.value_and_grad(value, has_aux=True)(params, *batch_and_targets)
        return ravel(gradient), numbers

    return mb.summed(gradient_and_numbers, (batches, labels), has_aux=True)


def _by_examples(number: Float[Array, "M ..."]) -> Float[Array, " M"]:
    return jnp.sum(number, axis=tuple(range(1, number.ndim)))
