"""Newton steps of the mean in the space of the outputs, where data have few of them and rows of J are kept.

With u = m - mu, a Newton step solves (sum_n J_n' W_n J_n + P0) u' = J' b for the next u', where b = r + W J u. By the
Woodbury identity

    u' = P0^-1 J' a,    a = b - A (I + A' K A)^-1 A' K b,    K = J P0^-1 J',    W = A A',

as for the mode of a Gaussian process (Rasmussen and Williams 2006, section 3.4.3). I + A' K A has no eigenvalue below
one, whatever the prior precision. Conjugate gradients in the space of the weights have to resolve those of G + P0 down
to the prior precision, which single precision does not do if that is small. The images J u' = K a and the forms
u'' P0 u' = a' K a need no pass over the rows, so that these are read once at the beginning and once at the end. K
without the prior precision stays the same for a whole fit.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
import scipy  # its parts are imported at their first use, which takes half a second
from jaxtyping import Array, Float

from bnnlaplace.core.tree import number_type
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.prior import Prior
from bnnlaplace.variational.expectations import Expectations
from bnnlaplace.variational.newton import Move, Newton, pulled, pushed
from bnnlaplace.variational.sites import are_by_samples, factors_at

# The most outputs of all examples together. Their matrix is then factorised in a tenth of a second on one core.
MOST_OUTPUTS = 2048


class Kernel:
    """J D^-1 J' for all outputs of the data, computed once for each D. Cost: R^2 P multiplications for R outputs."""

    def __init__(self) -> None:
        self._relative: np.ndarray | None = None
        self._matrix: Float[np.ndarray, "R R"] | None = None

    def of(self, model: Model, prior: Prior) -> Float[np.ndarray, "R R"]:
        """Return it for the ratios D of a prior."""
        relative = np.asarray(prior.relative)
        if self._relative is None or not np.array_equal(self._relative, relative):
            self._matrix = np.asarray(model.whitened(prior).rows.kernel(), np.float64)
            self._relative = relative
        return self._matrix


def is_for(model: Model, num_pairs: int) -> bool:
    """Whether rows are kept, data have few outputs, and sites are matrices."""
    if model.rows is None or model.rows.num_outputs > MOST_OUTPUTS:
        return False
    return not are_by_samples(model.rows.shape[-1], num_pairs)


class OutputNewton(Newton):
    """Newton steps from a mean of the weights.

    Parameters
    ----------
    model, prior
        The linearised network with its data, and the prior.
    kernel
        J D^-1 J' of these.
    mean
        The mean to begin with.
    scale, microbatch
        (all training examples) / (examples in the data), and how many examples are linearised at a time.
    """

    def __init__(
        self,
        model: Model,
        prior: Prior,
        kernel: Float[np.ndarray, "R R"],
        mean: Float[np.ndarray, " P"],
        *,
        scale: float,
        microbatch: int,
    ) -> None:
        super().__init__(model, prior, scale=scale, microbatch=microbatch)
        self._kernel = kernel
        # u = share * start + P0^-1 J' dual, with its images J u and u' P0 u.
        self._start, self._share = mean - self._centre, 1.0
        self._dual = np.zeros(len(kernel))
        self._images = _flat(pushed(model, self._start, microbatch=microbatch))
        self._form = float(prior.precision) * float(prior.squared_norm(self._start))

    def move(self, at_sites: Model, expected: Sequence[Expectations]) -> Move:
        """Find the next Newton step. Cost: the Cholesky factor of a matrix over the outputs."""
        delta, images = float(self._prior.precision), self._images
        blocks = self._factors(at_sites)
        residuals = self._scale * _flat([each.residuals for each in expected])
        target = residuals + _times(blocks, _times(blocks, images, transposed=True))
        kernel_target = self._kernel @ target / delta
        inner = _between(blocks, self._kernel) / delta
        inner[np.diag_indices_from(inner)] += 1.0
        if not np.isfinite(inner).all() or not np.isfinite(kernel_target).all():
            return Move([], np.nan, None, None)
        factor = scipy.linalg.cho_factor(inner, lower=True, overwrite_a=True, check_finite=False)
        solved = scipy.linalg.cho_solve(factor, _times(blocks, kernel_target, transposed=True), check_finite=False)
        dual = target - _times(blocks, solved)
        new_images = self._kernel @ dual / delta
        cross, new_form, form = float(images @ dual), float(dual @ new_images), self._form
        moved = new_images - images

        def quadratic(length: float) -> float:
            rest = 1 - length
            return rest**2 * form + 2 * length * rest * cross + length**2 * new_form

        def go(length: float) -> None:
            self._images, self._form = images + length * moved, quadratic(length)
            self._share *= 1 - length
            self._dual = (1 - length) * self._dual + length * dual

        decrement = float(residuals @ moved) - (cross - form)
        return Move(self._by_batch(moved), decrement, quadratic, go)

    def mean(self) -> Float[np.ndarray, " P"]:
        """The mean where the steps have led."""
        of_outputs = pulled(self._model, self._by_batch(self._dual), microbatch=self._microbatch)
        return self._centre + self._share * self._start + of_outputs / self._precision

    def _factors(self, at_sites: Model) -> Float[np.ndarray, "N C C"]:
        """A at each position of each example, times the root of how much it counts."""
        of_batches = factors_at(at_sites, self._scale, microbatch=self._microbatch)
        return np.concatenate([np.asarray(each, np.float64).reshape(-1, *each.shape[-2:]) for each in of_batches])

    def _by_batch(self, outputs: Float[np.ndarray, " R"]) -> list[Float[Array, "B ... C"]]:
        dtype = number_type(self._model.network.params)
        parts = np.split(outputs.astype(dtype), len(self._model.rows.batches))
        return [jnp.asarray(part.reshape(self._model.rows.shape)) for part in parts]


def _flat(of_batches: Sequence[object]) -> Float[np.ndarray, " R"]:
    return np.concatenate([np.asarray(each, np.float64).ravel() for each in of_batches])


def _times(
    blocks: Float[np.ndarray, "N C C"], outputs: Float[np.ndarray, " R"], *, transposed: bool = False
) -> Float[np.ndarray, " R"]:
    """Compute A v or A' v."""
    by_position = outputs.reshape(len(blocks), -1)
    return np.einsum("ncd,nc->nd" if transposed else "ncd,nd->nc", blocks, by_position).ravel()


def _between(blocks: Float[np.ndarray, "N C C"], kernel: Float[np.ndarray, "R R"]) -> Float[np.ndarray, "R R"]:
    """Compute A' K A."""
    turned, shape = blocks.swapaxes(1, 2), (*blocks.shape[:2], -1)
    half = np.matmul(turned, kernel.reshape(shape)).reshape(kernel.shape)
    return np.matmul(turned, half.T.reshape(shape)).reshape(kernel.shape)
