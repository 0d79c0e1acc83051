"""Newton steps of the mean in the space of the weights, by conjugate gradients: for data of any size."""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.summation import accumulated
from bnnlaplace.core.tree import number_type, ravel
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.model.batched import pushforward
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Prior
from bnnlaplace.structure import Structure
from bnnlaplace.variational.expectations import Expectations
from bnnlaplace.variational.newton import Move, Newton

# Residual of conjugate gradients relative to the gradient, and the largest number of products of one Newton step.
RESIDUAL, MOST_PRODUCTS = 0.1, 100
# A Newton step with more products than this is worth another preconditioner.
MANY_PRODUCTS = 20


class WeightNewton(Newton):
    """Newton steps from a mean of the weights.

    Parameters
    ----------
    model, prior
        The linearised network with its data, and the prior.
    inverse_at
        A function of the model at its sites. It returns a curvature whose inverse preconditions conjugate gradients.
    mean
        The mean to begin with.
    scale, microbatch
        (all training examples) / (examples in the data), and how many examples are linearised at a time.
    """

    def __init__(
        self,
        model: Model,
        prior: Prior,
        inverse_at: Callable[[Model], Structure],
        mean: Float[np.ndarray, " P"],
        *,
        scale: float,
        microbatch: int,
    ) -> None:
        self._model, self._prior, self._inverse_at, self._mean = model, prior, inverse_at, mean
        self._scale, self._microbatch = scale, microbatch
        self._precision = np.asarray(float(prior.precision) * np.asarray(prior.relative, np.float64))
        self._inverse: Structure | None = None

    def move(self, at_sites: Model, expected: Sequence[Expectations]) -> Move:
        """Find the next Newton step.

        Cost: a gradient, a forward-mode derivative, and the products of conjugate gradients, each one pass over the
        data, or over the rows of the Jacobian that the model keeps.
        """
        deviation = self._mean - np.asarray(self._prior.mean, np.float64)
        gradient = pulled(self._model, expected, self._scale, microbatch=self._microbatch)
        ascent = gradient - self._precision * deviation
        self._inverse = self._inverse_at(at_sites) if self._inverse is None else self._inverse
        product = _hessian_product(at_sites, self._scale, self._precision, microbatch=self._microbatch)
        direction, used = _newton_direction(product, self._inverse, self._prior, ascent)
        self._inverse = self._inverse if used <= MANY_PRODUCTS else None  # the sites have moved on
        decrement, before = float(ascent @ direction), self._mean
        if not decrement > 0:  # rounding alone is left
            return Move([], decrement, None, None, used)

        def quadratic(length: float) -> float:
            point = deviation + length * direction
            return float(point @ (self._precision * point))

        def go(length: float) -> None:
            self._mean = before + length * direction

        images = _pushed(self._model, direction, microbatch=self._microbatch)
        return Move(images, decrement, quadratic, go, used)

    def mean(self) -> Float[np.ndarray, " P"]:
        """The mean where the steps have led."""
        return self._mean


def pulled(model: Model, expected: Sequence[Expectations], scale: float, *, microbatch: int) -> Float[np.ndarray, " P"]:
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
