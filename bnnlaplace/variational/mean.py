"""The mean of the variational posterior: Newton's method at a fixed covariance.

At fixed deviations of the samples, and for a log likelihood that is concave in the outputs, the bound is a concave
function of the mean m,

    phi(m) = sum_n E log p(y_n | f_n + J_n m + deviation) - 1/2 (m - mu)' P0 (m - mu),

with gradient sum_n J_n' r_n - P0 (m - mu) and Hessian -(sum_n J_n' W_n J_n + P0), both averages over the same samples.
The outputs are linear in m, so that a line search needs no pass through the network.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.summation import accumulated
from bnnlaplace.core.tree import number_type, ravel, unraveler
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.model.batched import pushforward
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Prior
from bnnlaplace.structure import Structure
from bnnlaplace.variational.draws import Draws
from bnnlaplace.variational.expectations import Expectations, expectations, log_likelihood_at
from bnnlaplace.variational.sites import at_sites, sites_of

# Residual of conjugate gradients relative to the gradient, and the largest number of products of one Newton step.
RESIDUAL, MOST_PRODUCTS = 0.1, 100
# A Newton step with more products than this is worth another preconditioner.
MANY_PRODUCTS = 20
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
    """

    mean: Float[np.ndarray, " P"]
    draws: list[Draws]
    expected: list[Expectations]
    gradient: Float[np.ndarray, " P"]
    steps: int
    products: int


def settle(
    model: Model,
    prior: Prior,
    inverse_at: Callable[[Model], Structure],
    draws: Sequence[Draws],
    mean: Float[np.ndarray, " P"],
    *,
    scale: float,
    tolerance: float,
    max_steps: int,
    microbatch: int,
) -> MeanStep:
    """Maximise the bound over the mean of the weights, at the deviations of `draws`.

    Parameters
    ----------
    model, prior
        The linearised network with its data, and the prior.
    inverse_at
        A function of the model at its sites. It returns a curvature whose inverse preconditions conjugate gradients.
    draws, mean
        The outputs under the posterior with this mean.
    scale
        (all training examples) / (examples in the data).
    tolerance
        Newton's method ends if a step promises to gain less than this, in nats.
    max_steps, microbatch
        The largest number of Newton steps, and how many examples are linearised at a time.

    Notes
    -----
    Cost for each Newton step: a gradient, a forward-mode derivative, and the products of conjugate gradients, each one
    pass over the data, or over the rows of the Jacobian that the model keeps.
    """
    relative = np.asarray(prior.relative, np.float64)
    precision = np.asarray(float(prior.precision) * relative)
    centre = np.asarray(prior.mean, np.float64)
    draws, products, decrement, inverse = list(draws), 0, np.inf, None
    for step in range(max_steps + 1):  # noqa: B007
        expected = [expectations(model.likelihood, each) for each in draws]
        gradient = _pulled(model, draws, expected, scale, microbatch=microbatch)
        ascent = gradient - precision * (mean - centre)
        if step == max_steps or 0.5 * decrement <= tolerance:
            break
        there = at_sites(model, sites_of(model.likelihood, draws))
        inverse = inverse_at(there) if inverse is None else inverse
        product = _hessian_product(there, scale, precision, microbatch=microbatch)
        direction, used = _newton_direction(product, inverse, prior, ascent)
        products += used
        inverse = inverse if used <= MANY_PRODUCTS else None  # the sites have moved on
        decrement = float(ascent @ direction)
        if not decrement > 0:  # rounding alone is left
            break
        moved = _pushed(model, direction, microbatch=microbatch)
        length = _line_search(model, draws, moved, scale, mean - centre, precision, direction, decrement)
        if length == 0:
            break
        mean = mean + length * direction
        draws = [each._replace(mean=each.mean + length * by) for each, by in zip(draws, moved, strict=True)]
    return MeanStep(mean, draws, expected, gradient, step, products)


def _hessian_product(
    there: Model, scale: float, precision: Float[np.ndarray, "..."], *, microbatch: int
) -> Callable[[np.ndarray], np.ndarray]:
    """Return v -> (sum_n J_n' W_n J_n + P0) v."""
    ggn_product = there.ggn_product(scale, microbatch=microbatch)
    dtype = number_type(there.head.params)
    return lambda v: np.asarray(ggn_product(jnp.asarray(v, dtype)[None])[0], np.float64) + precision * v


def _newton_direction(
    product: Callable[[np.ndarray], np.ndarray], structure: Structure, prior: Prior, ascent: Float[np.ndarray, " P"]
) -> tuple[Float[np.ndarray, " P"], int]:
    """Solve (G + P0) d = g by conjugate gradients. The structure is in the weights times sqrt(D)."""
    from scipy.sparse.linalg import LinearOperator, cg  # slow to import, and seldom needed

    root, count = np.sqrt(np.asarray(prior.relative, np.float64)), 0

    def precondition(v: np.ndarray) -> np.ndarray:
        return structure.inverse_product(v / root, float(prior.precision)) / root

    def counted(v: np.ndarray) -> np.ndarray:
        nonlocal count
        count += 1
        return product(v)

    shape = (len(ascent), len(ascent))
    hessian, inverse = LinearOperator(shape, counted, dtype=float), LinearOperator(shape, precondition, dtype=float)
    direction, _ = cg(hessian, ascent, x0=precondition(ascent), rtol=RESIDUAL, maxiter=MOST_PRODUCTS, M=inverse)
    return direction, count


def _line_search(
    model: Model,
    draws: Sequence[Draws],
    moved: Sequence[Float[Array, "B ... C"]],
    scale: float,
    deviation: Float[np.ndarray, " P"],
    precision: Float[np.ndarray, "..."],
    direction: Float[np.ndarray, " P"],
    decrement: float,
) -> float:
    """Halve the step until the bound rises by a part of what the gradient promises; 0 if it never does."""

    def bound(length: float) -> float:
        pairs = zip(draws, moved, strict=True)
        value = sum(log_likelihood_at(model.likelihood, each, by, length) for each, by in pairs)
        point = deviation + length * direction
        return scale * value - 0.5 * float(point @ (precision * point))

    start = bound(0.0)
    for halving in range(MAX_HALVINGS):
        length = 0.5**halving
        if bound(length) >= start + ARMIJO * length * decrement:
            return length
    return 0.0


def _pulled(
    model: Model, draws: Sequence[Draws], expected: Sequence[Expectations], scale: float, *, microbatch: int
) -> Float[np.ndarray, " P"]:
    """Compute scale * sum_n J_n' r_n."""
    if model.rows is not None:
        return scale * np.asarray(model.rows.pulled([each.residuals for each in expected]), np.float64)
    network = model.head.unlinearised()
    terms = (
        _pullback(network, batch.inputs, of_batch.residuals, microbatch=microbatch)
        for batch, of_batch in zip(model.data, expected, strict=True)
    )
    return scale * np.asarray(accumulated(terms), np.float64)


@partial(jax.jit, static_argnames="microbatch")
def _pullback(network: Network, inputs: object, cotangents: Float[Array, "B ... C"], *, microbatch: int) -> Array:
    """Sum J_n' u_n over the examples of a batch."""
    batches = mb.split((inputs, cotangents), microbatch, number_type(network.params))

    def pulled(part: mb.Microbatches) -> Float[Array, " P"]:
        x, u = part.inputs
        _, pullback = jax.vjp(lambda params: network(params, x), network.params)
        return ravel(pullback(mb.over_outputs(part.weights, u) * u)[0])

    return mb.summed(pulled, batches)


def _pushed(model: Model, direction: Float[np.ndarray, " P"], *, microbatch: int) -> list[Float[Array, "B ... C"]]:
    """Compute J_n d for the examples of each batch."""
    network = model.head.unlinearised()
    row = jnp.asarray(direction, number_type(network.params))[None]
    if model.rows is not None:
        return [images[0] for images in model.rows.pushed(row)]
    options = {"microbatch": microbatch, "vectors_at_once": 1}
    return [pushforward(network, batch.inputs, row, **options)[0] for batch in model.data]


def with_mean(model: Model, mean: Float[np.ndarray, " P"]) -> Model:
    """The linearised model at another mean of the weights."""
    params = model.network.params
    return model.at(unraveler(params)(jnp.asarray(mean, number_type(params))))
