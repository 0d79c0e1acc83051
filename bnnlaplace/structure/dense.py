"""The full GGN as a matrix: exact, for small networks, and the oracle of the others."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from bnnlaplace.precise import matmul
from bnnlaplace.structure.groups import group_sums
from bnnlaplace.structure.protocol import JacobianRoot


@partial(jax.tree_util.register_dataclass, data_fields=("matrix",), meta_fields=())
@dataclass(frozen=True)
class DenseStructure:
    """G as a matrix.

    At one prior precision or two a Cholesky factorisation answers. From the third on G is decomposed into eigenvectors,
    once, and serves them all; that is remembered with the object, and found again after it has crossed `jit`.

    Attributes
    ----------
    matrix
        G, symmetric, shape (P, P).
    """

    matrix: Float[Array, "P P"]

    @classmethod
    def fit(cls, matrix: Float[Array, "P P"]) -> "DenseStructure":
        """G less the asymmetry of rounding."""
        return cls((matrix + matrix.T) / 2)

    @classmethod
    def from_arrays(cls, arrays: dict[str, Array]) -> "DenseStructure":
        """Rebuild from its fields by name, as a checkpoint holds them."""
        if "eigenvalues" in arrays:  # as an earlier release wrote it
            values, vectors = (jnp.asarray(arrays[name]) for name in ("eigenvalues", "eigenvectors"))
            return cls.fit(matmul(vectors * values, vectors.T))
        return cls(jnp.asarray(arrays["matrix"]))

    def whitened(self, relative: Float[Array, " P"]) -> "DenseStructure":
        """That of D^-1/2 G D^-1/2."""
        root = jnp.broadcast_to(jnp.sqrt(relative), self.matrix.shape[:1])
        return DenseStructure(self.matrix / root / root[:, None])

    def scaled(self, factor: float) -> "DenseStructure":
        """That of factor * G."""
        return DenseStructure(factor * self.matrix)

    def log_determinant(self, prior_precision: float) -> Float[np.ndarray, " 1"]:
        """log det(I + G / delta), in float64."""
        delta = float(prior_precision)
        if self._many("determinants"):
            return np.log1p(self._eigenvalues() / delta).sum(keepdims=True)
        diagonal = np.diagonal(self._cholesky(delta))
        return 2 * np.log(diagonal / np.sqrt(delta)).sum(keepdims=True)

    def truncation(self, prior_precision: float) -> Float[np.ndarray, " 1"]:
        """Zero: nothing is truncated."""
        return np.zeros(1)

    def effective_parameters(self, prior_precision: float, groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "1 g"]:
        """tr_g G (G + delta I)^-1 = sum_g 1 - delta [(G + delta I)^-1]_ii over the weights of each group."""
        delta = float(prior_precision)
        # With G + delta I = L L' the diagonal of its inverse holds the squared norms of the columns of L^-1.
        inverse, _ = scipy.linalg.lapack.dtrtri(self._cholesky(delta), lower=True)
        return group_sums(1 - delta * np.sum(inverse**2, axis=0), groups)[None]

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: float) -> float:
        """v' (G + delta I)^-1 v, in float64."""
        whitened = scipy.linalg.solve_triangular(self._cholesky(float(prior_precision)), vector, lower=True)
        return float(whitened @ whitened)

    def samples(self, key: Array, num_samples: int, prior_precision: float) -> Float[Array, "S P"]:
        """Rows L'^-1 eps, with the Cholesky factor L of G + delta I."""
        noise = jax.random.normal(key, (num_samples, len(self.matrix)), self.matrix.dtype)
        return _solved(self._root(prior_precision), noise, transposed=True)

    def covariance_root(self, prior_precision: float) -> JacobianRoot:
        """J -> J L'^-1, or J V (lambda + delta)^-1/2 where many precisions are asked for."""
        if not isinstance(self.matrix, jax.core.Tracer) and self._many("covariances"):
            values, vectors = self._eigenvectors()
            return Partial(_scaled_rotation, vectors, jax.lax.rsqrt(values + prior_precision))
        return Partial(_solved, self._root(prior_precision))

    # What is remembered lives beside the fields, so that neither a copy nor a checkpoint holds it.

    def _many(self, what: str) -> bool:
        """Whether this has been asked more than twice."""
        asked = self.__dict__.setdefault("_asked", {})
        asked[what] = asked.get(what, 0) + 1
        return asked[what] > 2

    def _eigenvalues(self) -> Float[np.ndarray, " P"]:
        """Of the matrix in float64, where rounding makes none negative that matters; others become zero."""
        if "_values" not in self.__dict__:
            values = scipy.linalg.eigvalsh(np.asarray(self.matrix, np.float64))
            self.__dict__["_values"] = np.maximum(values, 0)
        return self.__dict__["_values"]

    def _eigenvectors(self) -> tuple[Float[Array, " P"], Float[Array, "P P"]]:
        if "_vectors" not in self.__dict__:
            with jax.ensure_compile_time_eval():  # what a traced function asks for is remembered beyond its trace
                values, vectors = jnp.linalg.eigh(self.matrix)
                values = jnp.maximum(values, 0)
            self.__dict__["_vectors"] = values, vectors
        return self.__dict__["_vectors"]

    def _cholesky(self, delta: float) -> Float[np.ndarray, "P P"]:
        """The lower factor of G + delta I in float64, the last one remembered."""
        if self.__dict__.get("_factor", (None,))[0] != delta:
            self.__dict__["_factor"] = delta, _shifted_cholesky(np.asarray(self.matrix, np.float64), delta)
        return self.__dict__["_factor"][1]

    def _root(self, prior_precision: float) -> Float[Array, "P P"]:
        """The lower factor on the device: from float64 on the host, or traced."""
        if isinstance(prior_precision, jax.core.Tracer) or isinstance(self.matrix, jax.core.Tracer):
            return jnp.linalg.cholesky(self.matrix + prior_precision * jnp.eye(len(self.matrix)))
        return jnp.asarray(self._cholesky(float(prior_precision)), self.matrix.dtype)


def _shifted_cholesky(matrix: Float[np.ndarray, "P P"], delta: float) -> Float[np.ndarray, "P P"]:
    """The lower factor of G + delta I; rounding of G in its own precision, which costs definiteness, is removed."""
    identity = np.eye(len(matrix))
    try:
        return scipy.linalg.cholesky(matrix + delta * identity, lower=True)
    except scipy.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(matrix)
        return scipy.linalg.cholesky((vectors * np.maximum(values, 0)) @ vectors.T + delta * identity, lower=True)


def _solved(
    root: Float[Array, "P P"], rows: Float[Array, "... P"], *, transposed: bool = False
) -> Float[Array, "... P"]:
    """rows L'^-1, or rows L^-1."""
    flat = rows.reshape(-1, rows.shape[-1])
    solved = jax.scipy.linalg.solve_triangular(root, flat.T, lower=True, trans=int(transposed))
    return solved.T.reshape(rows.shape)


def _scaled_rotation(
    vectors: Float[Array, "P P"], scales: Float[Array, " P"], rows: Float[Array, "... P"]
) -> Float[Array, "... P"]:
    return matmul(rows, vectors) * scales
