"""The full GGN by its eigendecomposition: exact, for small networks, and the oracle of the others."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bnnlaplace.precise import einsum, matmul
from bnnlaplace.structure.groups import group_sums


class DenseStructure(NamedTuple):
    """G = V diag(lambda) V'.

    Attributes
    ----------
    eigenvalues
        lambda >= 0, ascending, shape (P,).
    eigenvectors
        V, one eigenvector in each column, shape (P, P).
    """

    eigenvalues: Float[Array, " P"]
    eigenvectors: Float[Array, "P P"]

    @classmethod
    def fit(cls, matrix: Float[Array, "P P"]) -> "DenseStructure":
        """Decompose G; eigenvalues that rounding made negative become zero."""
        values, vectors = jnp.linalg.eigh((matrix + matrix.T) / 2)
        return cls(jnp.maximum(values, 0), vectors)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> "DenseStructure":
        """Rebuild from its fields by name, as a checkpoint holds them."""
        return cls(**{name: jnp.asarray(array) for name, array in arrays.items()})

    def whitened(self, relative: Float[Array, " P"]) -> "DenseStructure":
        """That of D^-1/2 G D^-1/2."""
        rows = self.eigenvectors / jnp.sqrt(relative)[:, None]
        return DenseStructure.fit(matmul(rows * self.eigenvalues, rows.T))

    def scaled(self, factor: float) -> "DenseStructure":
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
        return group_sums(matmul(self.eigenvectors**2, ratio), groups)[None]

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: float) -> float:
        """v' (G + delta I)^-1 v."""
        along = np.asarray(self.eigenvectors, np.float64).T @ vector
        return float(np.sum(along**2 / (np.asarray(self.eigenvalues, np.float64) + prior_precision)))

    def samples(self, key: Array, num_samples: int, prior_precision: float) -> Float[Array, "S P"]:
        """Rows V diag((lambda + delta)^-1/2) eps."""
        noise = jax.random.normal(key, (num_samples, self.eigenvalues.size), self.eigenvectors.dtype)
        return matmul(noise / jnp.sqrt(self.eigenvalues + prior_precision), self.eigenvectors.T)

    def functional_variance(self, jacobian: Float[Array, "B C P"], prior_precision: float) -> Float[Array, "B C C"]:
        """J (G + delta I)^-1 J', exactly."""
        rotated = matmul(jacobian, self.eigenvectors)
        scaled = rotated / (self.eigenvalues + prior_precision)
        return einsum("bcp,bdp->bcd", scaled, rotated)
