"""Newton steps of the mean: what those in the space of the weights and those in the space of the outputs share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

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
from bnnlaplace.variational.expectations import Expectations


class Move(NamedTuple):
    """A Newton step, of which any length can be taken.

    Attributes
    ----------
    images
        J d for its direction d, at the examples of each batch.
    decrement
        The gradient times the direction; NaN if that is not finite.
    quadratic
        The function from a length l to (u + l d)' P0 (u + l d), with u = m - mu.
    go
        Takes a length, and goes there.
    products
        How many products with the GGN it took.
    """

    images: list[Float[Array, "B ... C"]]
    decrement: float
    quadratic: Callable[[float], float] | None
    go: Callable[[float], None] | None
    products: int = 0


class Newton(ABC):
    """Where the mean is, and Newton steps from there.

    Parameters
    ----------
    model, prior
        The linearised network with its data, and the prior.
    scale, microbatch
        (all training examples) / (examples in the data), and how many examples are linearised at a time.
    """

    def __init__(self, model: Model, prior: Prior, *, scale: float, microbatch: int) -> None:
        self._model, self._prior, self._scale, self._microbatch = model, prior, scale, microbatch
        self._precision = np.asarray(float(prior.precision) * np.asarray(prior.relative, np.float64))
        self._centre = np.asarray(prior.mean, np.float64)

    @abstractmethod
    def move(self, at_sites: Model, expected: Sequence[Expectations]) -> Move:
        """Find the next step.

        Parameters
        ----------
        at_sites
            The model with the curvature that the outputs have on average.
        expected
            The averages over these outputs, with their gradients.
        """

    @abstractmethod
    def mean(self) -> Float[np.ndarray, " P"]:
        """The mean where the steps have led."""

    def gradient(self, expected: Sequence[Expectations]) -> Float[np.ndarray, " P"]:
        """Compute sum_n J_n' r_n, times the scale of the data."""
        residuals = [each.residuals for each in expected]
        return self._scale * pulled(self._model, residuals, microbatch=self._microbatch)


def pulled(model: Model, cotangents: Sequence[Float[Array, "B ... C"]], *, microbatch: int) -> Float[np.ndarray, " P"]:
    """Compute sum_n J_n' u_n for u of each batch."""
    if model.rows is not None:
        return np.asarray(model.rows.pulled(cotangents), np.float64)
    network = model.head.unlinearised()
    terms = (
        _pullback(network, batch.inputs, of_batch, microbatch=microbatch)
        for batch, of_batch in zip(model.data, cotangents, strict=True)
    )
    return np.asarray(accumulated(terms), np.float64)


@partial(jax.jit, static_argnames="microbatch")
def _pullback(network: Network, inputs: object, cotangents: Float[Array, "B ... C"], *, microbatch: int) -> Array:
    """Sum J_n' u_n over the examples of a batch."""
    batches = mb.split((inputs, cotangents), microbatch, number_type(network.params))

    def of_part(part: mb.Microbatches) -> Float[Array, " P"]:
        x, u = part.inputs
        _, pullback = jax.vjp(lambda params: network(params, x), network.params)
        return ravel(pullback(mb.over_outputs(part.weights, u) * u)[0])

    return mb.summed(of_part, batches)


def pushed(model: Model, direction: Float[np.ndarray, " P"], *, microbatch: int) -> list[Float[Array, "B ... C"]]:
    """Compute J_n d for the examples of each batch."""
    network = model.head.unlinearised()
    row = jnp.asarray(direction, number_type(network.params))[None]
    if model.rows is not None:
        return [images[0] for images in model.rows.pushed(row)]
    options = {"microbatch": microbatch, "vectors_at_once": 1}
    return [pushforward(network, batch.inputs, row, **options)[0] for batch in model.data]
