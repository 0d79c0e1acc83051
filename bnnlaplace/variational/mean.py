"""The mean of the variational posterior: Newton's method at a fixed covariance.

At fixed deviations of the samples, and for a log likelihood that is concave in the outputs, the bound is a concave
function of the mean m,

    phi(m) = sum_n E log p(y_n | f_n + J_n m + deviation) - 1/2 (m - mu)' P0 (m - mu),

with gradient sum_n J_n' r_n - P0 (m - mu) and Hessian -(sum_n J_n' W_n J_n + P0), both averages over the same samples.
The outputs are linear in m, so that a line search needs no pass through the network. Newton steps are found in the
space of the outputs (`newton_outputs`) or in that of the weights (`newton_weights`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bnnlaplace.core.tree import number_type, unraveler
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.variational.draws import Draws
from bnnlaplace.variational.expectations import Expectations, expectations, log_likelihood_at
from bnnlaplace.variational.newton import Move, Newton
from bnnlaplace.variational.sites import at_sites, sites_of

# Halvings of a step, and Armijo's constant.
MAX_HALVINGS, ARMIJO = 30, 1e-4


class MeanStep(NamedTuple):
    """The mean at which Newton's method ended.

    Attributes
    ----------
    mean
        m, (P,), in float64.
    draws, expected
        The outputs of each batch there, and the averages over them.
    gradient
        sum_n J_n' r_n, times the scale of the data, (P,).
    steps, products
        Newton steps and GGN products.
    is_settled
        Whether the last step promised less than the tolerance, or none was to be taken.
    """

    mean: Float[np.ndarray, " P"]
    draws: list[Draws]
    expected: list[Expectations]
    gradient: Float[np.ndarray, " P"]
    steps: int
    products: int
    is_settled: bool


def settle(
    model: Model,
    newton: Newton,
    draws: Sequence[Draws],
    *,
    scale: float,
    tolerance: float,
    max_steps: int,
) -> MeanStep:
    """Maximise the bound over the mean of the weights, at the deviations of `draws`.

    Parameters
    ----------
    model
        The linearised network with its data.
    newton
        The mean to begin with, and how Newton steps from there are found.
    draws
        The outputs under the posterior with that mean.
    scale
        (all training examples) / (examples in the data).
    tolerance
        Newton's method ends if a step promises to gain less than this, in nats, or less than the rounding of the bound.
    max_steps
        The largest number of Newton steps.
    """
    draws, products, decrement = list(draws), 0, np.inf
    for step in range(max_steps + 1):  # noqa: B007
        expected = [expectations(model.likelihood, each) for each in draws]
        least = max(tolerance, _rounding(expected, scale))
        if step == max_steps or 0.5 * decrement <= least:
            break
        move = newton.move(at_sites(model, sites_of(model.likelihood, draws)), expected)
        products, decrement = products + move.products, move.decrement
        if not decrement > 0:  # rounding alone is left
            break
        length = _line_search(model, draws, move, scale)
        if length == 0:
            break
        move.go(length)
        draws = [each._replace(mean=each.mean + length * by) for each, by in zip(draws, move.images, strict=True)]
    is_settled = step < max_steps or max_steps == 0 or 0.5 * decrement <= least
    return MeanStep(newton.mean(), draws, expected, newton.gradient(expected), step, products, is_settled)


def _rounding(expected: Sequence[Expectations], scale: float) -> float:
    """The rounding of the expected log likelihood, in nats: a smaller gain is none."""
    total = sum(float(np.abs(each.log_likelihood).sum()) for each in expected)
    return float(jnp.finfo(expected[0].residuals.dtype).eps) * scale * total


def _line_search(model: Model, draws: Sequence[Draws], move: Move, scale: float) -> float:
    """Halve the step until the bound rises by a part of what the gradient promises; 0 if it never does."""

    def bound(length: float) -> float:
        pairs = zip(draws, move.images, strict=True)
        value = sum(log_likelihood_at(model.likelihood, each, by, length) for each, by in pairs)
        return scale * value - 0.5 * move.quadratic(length)

    start = bound(0.0)
    for halving in range(MAX_HALVINGS):
        length = 0.5**halving
        if bound(length) >= start + ARMIJO * length * move.decrement:
            return length
    return 0.0


def with_mean(model: Model, mean: Float[np.ndarray, " P"]) -> Model:
    """The linearised model at another mean of the weights."""
    params = model.network.params
    return model.at(unraveler(params)(jnp.asarray(mean, number_type(params))))
