"""A mode of the log joint, found by Gauss-Newton steps with conjugate gradients: what a Laplace approximation expands at.

Stochastic training stops short of a mode where it matters least to predictions and most to the evidence: directions that
the data do not determine decay only at the pace of the prior, and each leaves delta theta^2 / 2 nats in the log joint. A
Gauss-Newton step settles all of them at once.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.curvature import ggn, microbatch as mb
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.tree import ravel, unraveler

_SMALLEST_STEP = 2.0**-10


class Mode(NamedTuple):
    """Weights near a mode of log p(y | theta) - delta |theta|^2 / 2, and how near.

    Attributes
    ----------
    params
        theta.
    log_joint
        Its value there in nats, without the constant of the prior.
    gradient_norm
        |g|, the norm of its gradient.
    decrement
        g' (G + delta I)^-1 g in nats: the squared distance to the mode in posterior standard deviations, and twice what a
        further step would gain. Small against the effective number of parameters is near.
    steps
        Steps taken.
    converged
        Whether the decrement is within the tolerance.
    """

    params: PyTree
    log_joint: float
    gradient_norm: float
    decrement: float
    steps: int
    converged: bool


def find(
    network: Network,
    likelihood: Likelihood,
    data: tuple[Array, Array],
    prior_precision: float,
    *,
    tolerance: float = 0.1,
    max_steps: int = 20,
    max_products: int = 100,
    microbatch: int = 128,
    on_step=None,
) -> Mode:
    """Climb from the network's weights to a mode of the log joint on all the data.

    Each step solves (G + delta I) p = g by conjugate gradients and moves along p, halving the move until the log joint
    rises by a ten-thousandth of what it promises. G is positive semidefinite, so p always points uphill.

    Parameters
    ----------
    network, likelihood, data, prior_precision
        The joint; `data` is (inputs, targets).
    tolerance
        Stop when the decrement falls below this many nats.
    max_steps
        Steps at most; 0 only measures.
    max_products
        Conjugate-gradient iterations of a step at most, one GGN product each.
    microbatch
        Examples linearised at a time.
    on_step
        Called with each `Mode` on the way; for progress.

    Notes
    -----
    Cost of a step: one gradient and at most `max_products` GGN products over the data. Memory: one microbatch.
    """
    inputs, targets = (jnp.asarray(part) for part in data)
    gradient = partial(_gradient, network, likelihood, inputs, targets, prior_precision, microbatch=microbatch)
    direction = partial(
        _direction, network, likelihood, inputs, prior_precision, max_products=max_products, microbatch=microbatch
    )
    params = network.params
    value, slope = gradient(params)
    for steps in range(max_steps + 1):
        move = direction(params, slope)
        decrement = float(slope @ move)
        found = Mode(params, float(value), float(jnp.linalg.norm(slope)), decrement, steps, decrement <= tolerance)
        if on_step is not None:
            on_step(found)
        if found.converged or steps == max_steps:
            return found
        length = 1.0
        while length >= _SMALLEST_STEP:
            trial = _moved(params, length * move)
            trial_value, trial_slope = gradient(trial)
            if float(trial_value - value) > 1e-4 * length * decrement:
                break
            length /= 2
        else:
            return found  # no progress that rounding would not hide
        params, value, slope = trial, trial_value, trial_slope
    return found


@partial(jax.jit, static_argnames="microbatch")
def _gradient(
    network: Network, likelihood: Likelihood, inputs: Array, targets: Array, delta: float, params: PyTree, *, microbatch: int
) -> tuple[Float[Array, ""], Float[Array, " P"]]:
    """The log joint and its gradient."""
    value, gradient = log_likelihood(network, likelihood, params, inputs, targets, microbatch=microbatch)
    weights = ravel(params)
    return value - 0.5 * delta * weights @ weights, gradient - delta * weights


@partial(jax.jit, static_argnames=("max_products", "microbatch"))
def _direction(
    network: Network,
    likelihood: Likelihood,
    inputs: Array,
    delta: float,
    params: PyTree,
    slope: Float[Array, " P"],
    *,
    max_products: int,
    microbatch: int,
) -> Float[Array, " P"]:
    """(G + delta I)^-1 slope, to three digits."""
    product = ggn.block_product(network, likelihood, params, inputs, microbatch=microbatch)

    def matvec(vector: Float[Array, " P"]) -> Float[Array, " P"]:
        return product(vector[None])[0] + delta * vector

    return jax.scipy.sparse.linalg.cg(matvec, slope, tol=1e-3, maxiter=max_products)[0]


@jax.jit
def _moved(params: PyTree, move: Float[Array, " P"]) -> PyTree:
    return unraveler(params)(ravel(params) + move)


def log_likelihood(
    network: Network, likelihood: Likelihood, params: PyTree, inputs: Array, targets: Array, *, microbatch: int
) -> tuple[Float[Array, ""], Float[Array, " P"]]:
    """sum_n log p(y_n | f_n) and its gradient in the weights, a microbatch at a time."""
    dtype = ravel(params).dtype
    batches = mb.split(inputs, microbatch, dtype)
    labels = mb.split(targets, microbatch, dtype).inputs

    def value(params: PyTree, batch: mb.Microbatches, targets: Array) -> Array:
        return jnp.sum(batch.weights * likelihood.log_prob(network(params, batch.inputs), targets))

    def add(total, part):
        return jax.tree.map(jnp.add, total, jax.value_and_grad(value)(params, *part)), None

    zero = jnp.zeros((), dtype), jax.tree.map(jnp.zeros_like, params)
    (total, gradient), _ = jax.lax.scan(add, zero, (batches, labels))
    return total, ravel(gradient)
