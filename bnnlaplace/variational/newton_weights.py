"""Newton steps of the mean in the space of the weights, by conjugate gradients: for data of any size."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bnnlaplace.core.tree import number_type
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.prior import Prior
from bnnlaplace.structure import Structure
from bnnlaplace.variational.expectations import Expectations
from bnnlaplace.variational.newton import Move, Newton, pushed

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
        super().__init__(model, prior, scale=scale, microbatch=microbatch)
        self._inverse_at, self._mean = inverse_at, mean
        self._inverse: Structure | None = None

    def move(self, at_sites: Model, expected: Sequence[Expectations]) -> Move:
        """Find the next Newton step.

        Cost: a gradient, a forward-mode derivative, and the products of conjugate gradients, each one pass over the
        data, or over the rows of the Jacobian that the model keeps.
        """
        deviation = self._mean - self._centre
        ascent = self.gradient(expected) - self._precision * deviation
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

        images = pushed(self._model, direction, microbatch=self._microbatch)
        return Move(images, decrement, quadratic, go, used)

    def mean(self) -> Float[np.ndarray, " P"]:
        """The mean where the steps have led."""
        return self._mean


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
