"""What the evidence needs of the data beside the curvature: the log likelihood at the weights, and its gradient."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import number_type, ravel
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network


class DataTerms(NamedTuple):
    """The log likelihood at the weights, and its gradient; they add up over batches.

    Attributes
    ----------
    log_likelihood
        scale * sum_n log p(y_n | f_n), in nats.
    log_likelihood_gradient
        Its gradient in the weights, shape (P,): with the prior's, it says how far from a mode the weights are.
    num_outputs
        scale * (the number of outputs, of all positions of all examples).
    squared_residuals
        scale * sum_n |(y_n - f_n) / sigma|^2 of a likelihood with noise sigma, else 0. It follows from the log
        likelihood by a difference, but not with enough digits.
    """

    log_likelihood: Float[Array, ""]
    log_likelihood_gradient: Float[Array, " P"]
    num_outputs: Float[Array, ""]
    squared_residuals: Float[Array, ""]

    def check(self) -> "DataTerms":
        """Return them, or raise ValueError where the log likelihood or its gradient is not finite."""
        if not bool(jnp.isfinite(self.log_likelihood) & jnp.isfinite(self.log_likelihood_gradient).all()):
            raise ValueError(
                "fit: the log likelihood or its gradient is not finite at these weights and data; look for NaN or "
                "infinite values in the inputs, the targets and the weights"
            )
        return self


@partial(jax.jit, static_argnames="microbatch")
def data_terms(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Float[Array, "N ..."]],
    targets: Array,
    weights: Float[Array, " N"] | None = None,
    *,
    scale: float = 1.0,
    microbatch: int = 64,
) -> DataTerms:
    """The log likelihood of one batch and its gradient, a microbatch at a time; examples at weight zero do not count.

    Cost: one gradient of the batch. Memory: the activations of a microbatch.
    """
    dtype = number_type(params)
    batches = mb.split(inputs, microbatch, dtype, weights)
    labels = mb.split(targets, microbatch, dtype).inputs

    def value(params: PyTree, batch: mb.Microbatches, targets: Array) -> tuple[Array, tuple[Array, Array]]:
        outputs = network(params, batch.inputs)
        log_prob = likelihood.log_prob(outputs, targets)
        count = jnp.sum(batch.weights) * (outputs.size // len(outputs))
        squares = jnp.zeros_like(count)
        if likelihood.sigma_noise is not None:
            residuals = (targets - outputs) / likelihood.sigma_noise
            squares = jnp.sum(mb.over_outputs(batch.weights, residuals) * residuals**2)
        return jnp.sum(mb.over_outputs(batch.weights, log_prob) * log_prob), (count, squares)

    def of_batch(part: tuple[mb.Microbatches, Array]) -> DataTerms:
        (log_likelihood, (count, squares)), gradient = jax.value_and_grad(value, has_aux=True)(params, *part)
        return DataTerms(log_likelihood, ravel(gradient), count, squares)

    return jax.tree.map(lambda part: scale * part, mb.summed(of_batch, (batches, labels)))
