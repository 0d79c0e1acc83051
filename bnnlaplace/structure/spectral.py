"""The GGN by all its nonzero eigenpairs: exact for data with few outputs, whatever the size of the network."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, ArrayLike, Float, Int, Num

from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.rounding import OF_FLOAT32
from bnnlaplace.core.tree import group_sums
from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature.jacobian import Jacobian, inner_products
from bnnlaplace.structure.protocol import OutputCovariance, PriorPrecision, PriorPrecisions, RelativePrecisions

# Error of the singular values of a decomposition, over eps times the largest one.
OF_DECOMPOSITION = 8.0


class SpectralStructure(NamedTuple):
    """G = V' diag(lambda) V, where V has one row for each output of all data, r = N C rows.

    This is the dual form of the determinant, det(I_P + J' B B' J / delta) = det(I_r + B' J J' B / delta), with its
    eigenvectors carried over to the weights. Everything is exact. Memory: r P numbers.

    Attributes
    ----------
    eigenvalues
        lambda >= 0, shape (r,).
    eigenvectors
        V, orthonormal rows, shape (r, P).
    rounding
        Relative error of the derivatives.
    """

    eigenvalues: Float[Array, " r"]
    eigenvectors: Float[Array, "r P"]
    rounding: Num[AnyArray, ""] | np.float64 = np.float64(OF_FLOAT32)

    rows_for_output, rows_for_column = 2.0, 0.0

    @classmethod
    def fit(cls, rows: Float[Array, "R P"], rounding: Num[ArrayLike, ""] = OF_FLOAT32) -> "SpectralStructure":
        """Build the structure from rows with rows' rows = G, and the relative error of the rows.

        QR and the singular values of the triangle keep the digits of eigenvalues far below the largest one. The Gram
        matrix of the rows would lose them, because it squares the singular values.
        """
        columns, upper = jnp.linalg.qr(rows.T)
        left, values, _ = jnp.linalg.svd(upper)
        # Rounding makes singular values of this size where there are none.
        error = jnp.maximum(_error_of_decomposition(values), rounding)
        values = jnp.where(values <= error * values.max(), 0, values)
        values = jnp.zeros(left.shape[1], values.dtype).at[: len(values)].set(values)
        return cls(values**2, matmul(left.T, columns.T), jnp.asarray(rounding, values.dtype))

    def resolution(self) -> float:
        """The prior precision below which curvature of its size cannot be told from the rounding of derivatives.

        Zero if there is larger curvature in every direction.
        """
        values = np.asarray(self.eigenvalues)
        is_complete = np.count_nonzero(values) == self.eigenvectors.shape[1]
        # NumPy, because a traced function that closes over the structure may ask, too.
        error = max(_error_of_decomposition(values), float(np.asarray(self.rounding)))
        return 0.0 if is_complete else error**2 * float(values.max())

    @classmethod
    def from_arrays(cls, arrays: dict[str, AnyArray]) -> "SpectralStructure":
        """Rebuild the structure from its fields by name, as a checkpoint holds them."""
        return cls(**{name: array if name == "rounding" else jnp.asarray(array) for name, array in arrays.items()})

    def whitened(self, relative: Float[AnyArray, " P"]) -> "SpectralStructure":
        """Return the structure of D^-1/2 G D^-1/2."""
        # Whitened eigenvectors are not orthogonal any more, so the scaled rows are decomposed again.
        rows = jnp.sqrt(self.eigenvalues)[:, None] * self.eigenvectors / jnp.sqrt(relative)
        return SpectralStructure.fit(rows, self.rounding)

    def scaled(self, factor: float) -> "SpectralStructure":
        """Return the structure of factor * G."""
        return self._replace(eigenvalues=factor * self.eigenvalues)

    def log_determinant(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """log det(I + G / delta), in float64."""
        return np.log1p(np.asarray(self.eigenvalues, np.float64) / float(prior_precision)).sum(keepdims=True)

    def truncation(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """Zero, because nothing is truncated."""
        return np.zeros(1)

    def effective_parameters(
        self, prior_precision: PriorPrecision, groups: Int[np.ndarray, " P"]
    ) -> Float[np.ndarray, "1 g"]:
        """tr_g G (G + delta I)^-1 over the weights of each group."""
        ratio = self.eigenvalues / (self.eigenvalues + prior_precision)
        return group_sums(matmul(ratio, self.eigenvectors**2), groups)[None]

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision) -> float:
        """v' (G + delta I)^-1 v, in float64 because the part outside the eigenvectors is a difference of squares."""
        # One row at a time, as a copy of all eigenvectors in float64 would take twice their memory.
        along = np.array([np.asarray(row, np.float64) @ vector for row in self.eigenvectors])
        outside = max(vector @ vector - along @ along, 0.0)
        values = np.asarray(self.eigenvalues, np.float64)
        return float(np.sum(along**2 / (values + prior_precision)) + outside / prior_precision)

    def inverse_product(
        self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision
    ) -> Float[np.ndarray, " P"]:
        """V' (lambda + delta)^-1 V v + (v - V' V v) / delta."""
        inside, outside = _inside_and_outside(self.eigenvectors, jnp.asarray(vector, self.eigenvectors.dtype))
        inside = matmul(inside / (self.eigenvalues + prior_precision), self.eigenvectors)
        return np.asarray(inside + outside / prior_precision, np.float64)

    def samples(self, key: Array, num_samples: int, prior_precision: PriorPrecision) -> Float[Array, "S P"]:
        """Draw rows V' (lambda + delta)^-1/2 V eps + (eps - V' V eps) / sqrt(delta).

        Outside the rows of V the posterior has the variance of the prior.
        """
        vectors = self.eigenvectors
        noise = jax.random.normal(key, (num_samples, vectors.shape[1]), vectors.dtype)
        inside, outside = _inside_and_outside(vectors, noise)
        inside = matmul(inside / jnp.sqrt(self.eigenvalues + prior_precision), vectors)
        return inside + outside / jnp.sqrt(prior_precision)

    def output_covariance(self, precisions: PriorPrecisions, relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """Return the function J -> J V' (lambda + delta)^-1 V J' + R R' / delta, evaluated at each delta.

        J is whitened by `relative` first, and R = J - J V' V is its part outside the rows of V.
        """
        return Partial(_covariances, self, jnp.asarray(precisions, self.eigenvalues.dtype), relative)


def _error_of_decomposition(values: Float[AnyArray, " r"]) -> float:
    """Error of singular values over the largest one."""
    return OF_DECOMPOSITION * float(jnp.finfo(values.dtype).eps)


def _covariances(
    structure: SpectralStructure,
    precisions: Float[Array, " D"],
    relative: RelativePrecisions,
    jacobian: Jacobian,
) -> Float[Array, "D M U C C"]:
    """Compute the covariance of outputs inside and outside the rows of V, at each delta."""
    inside, outside_rows = _inside_and_outside(structure.eigenvectors, jacobian.rows() / jnp.sqrt(relative))
    # R is formed before it is squared. A difference of two squares would be rounding alone if the data determine almost
    # everything.
    outside = inner_products(outside_rows)

    def at(delta: Float[Array, ""]) -> Float[Array, "M U C C"]:
        return inner_products(inside * jax.lax.rsqrt(structure.eigenvalues + delta)) + outside / delta

    return jax.lax.map(at, precisions)


def _inside_and_outside(
    eigenvectors: Float[Array, "r P"], rows: Float[Array, "... P"]
) -> tuple[Float[Array, "... r"], Float[Array, "... P"]]:
    """Return the coordinates of rows in the eigenvectors, and their part outside of them.

    The part is taken twice, because the eigenvectors are orthonormal to rounding only: what a first pass leaves along
    them has the large variance of the prior.
    """
    inside = matmul(rows, eigenvectors.T)
    outside = rows - matmul(inside, eigenvectors)
    return inside, outside - matmul(matmul(outside, eigenvectors.T), eigenvectors)
