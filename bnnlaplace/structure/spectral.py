"""The GGN by all of its eigenpairs that are not zero: exact for data with few outputs, whatever the network's size."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.tree import group_sums
from bnnlaplace.curvature.jacobian import Jacobian, inner_products
from bnnlaplace.structure.protocol import OutputCovariance, RelativePrecisions


class SpectralStructure(NamedTuple):
    """G = V' diag(lambda) V with as many rows as there are outputs of all data, r = N C.

    It is the dual form, det(I_P + J' B B' J / delta) = det(I_r + B' J J' B / delta), with its eigenvectors carried over
    to the weights: everything is exact, in r P numbers of memory.

    Attributes
    ----------
    eigenvalues
        lambda >= 0, shape (r,).
    eigenvectors
        V, orthonormal rows, shape (r, P).
    """

    eigenvalues: Float[Array, " r"]
    eigenvectors: Float[Array, "r P"]

    rows_for_output, rows_for_column = 2.0, 0.0

    @classmethod
    def fit(cls, rows: Float[Array, "R P"]) -> "SpectralStructure":
        """From a factor with rows' rows = G, by QR and the singular values of the triangle: eigenvalues of G far below
        the largest keep their digits, as they would not in the Gram matrix."""
        columns, upper = jnp.linalg.qr(rows.T)
        left, values, _ = jnp.linalg.svd(upper)
        values = jnp.zeros(left.shape[1], values.dtype).at[: len(values)].set(values)
        return cls(values**2, matmul(left.T, columns.T))

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> "SpectralStructure":
        """Rebuild from its fields by name, as a checkpoint holds them."""
        return cls(**{name: jnp.asarray(array) for name, array in arrays.items()})

    def whitened(self, relative: Float[Array, " P"]) -> "SpectralStructure":
        """That of D^-1/2 G D^-1/2."""
        return SpectralStructure.fit(jnp.sqrt(self.eigenvalues)[:, None] * self.eigenvectors / jnp.sqrt(relative))

    def scaled(self, factor: float) -> "SpectralStructure":
        """That of factor * G."""
        return self._replace(eigenvalues=factor * self.eigenvalues)

    def log_determinant(self, prior_precision: float) -> Float[np.ndarray, " 1"]:
        """log det(I + G / delta), in float64."""
        return np.log1p(np.asarray(self.eigenvalues, np.float64) / float(prior_precision)).sum(keepdims=True)

    def truncation(self, prior_precision: float) -> Float[np.ndarray, " 1"]:
        """Zero: nothing is truncated."""
        return np.zeros(1)

    def effective_parameters(self, prior_precision: float, groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "1 g"]:
        """tr_g G (G + delta I)^-1 over the weights of each group."""
        ratio = self.eigenvalues / (self.eigenvalues + prior_precision)
        return group_sums(matmul(ratio, self.eigenvectors**2), groups)[None]

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: float) -> float:
        """v' (G + delta I)^-1 v; in float64, as the part outside of the eigenvectors is a difference."""
        along = np.array([np.asarray(row, np.float64) @ vector for row in self.eigenvectors])
        outside = max(vector @ vector - along @ along, 0.0)
        values = np.asarray(self.eigenvalues, np.float64)
        return float(np.sum(along**2 / (values + prior_precision)) + outside / prior_precision)

    def samples(self, key: Array, num_samples: int, prior_precision: float) -> Float[Array, "S P"]:
        """Rows eps / sqrt(delta) + V' [(lambda + delta)^-1/2 - delta^-1/2] V eps: outside V the prior's variance."""
        vectors = self.eigenvectors
        noise = jax.random.normal(key, (num_samples, vectors.shape[1]), vectors.dtype)
        change = 1 / jnp.sqrt(self.eigenvalues + prior_precision) - 1 / jnp.sqrt(prior_precision)
        return noise / jnp.sqrt(prior_precision) + matmul(matmul(noise, vectors.T) * change, vectors)

    def output_covariance(self, precisions: Sequence[float], relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """J -> J V' (lambda + delta)^-1 V J' inside of V, and the prior's outside, for each delta.

        The part of J outside is formed before it is squared: as a difference of two squares it would be rounding where
        the data leave next to nothing open.
        """
        return Partial(_covariances, self, jnp.asarray(precisions, self.eigenvalues.dtype), relative)


def _covariances(
    structure: SpectralStructure,
    precisions: Float[Array, " D"],
    relative: RelativePrecisions,
    jacobian: Jacobian,
) -> Float[Array, "D M U C C"]:
    rows = jacobian.rows() / jnp.sqrt(relative)
    inside = matmul(rows, structure.eigenvectors.T)
    outside = inner_products(rows - matmul(inside, structure.eigenvectors))

    def at(delta: Float[Array, ""]) -> Float[Array, "M U C C"]:
        return inner_products(inside * jax.lax.rsqrt(structure.eigenvalues + delta)) + outside / delta

    return jax.lax.map(at, precisions)
