"""What Newton's method for the mean needs of a space that it works in: that of the weights, or that of the outputs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.fitting.prepare import Model
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
    """Where the mean is, and Newton steps from there."""

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
