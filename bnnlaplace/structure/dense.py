"""The full GGN as a matrix: exact, for small networks, and the oracle of the others."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.tree import group_sums
from bnnlaplace.curvature.jacobian import Jacobian, inner_products
from bnnlaplace.structure.protocol import OutputCovariance, RelativePrecisions


@partial(jax.tree_util.register_dataclass, data_fields=("matrix",), meta_fields=())
@dataclass(frozen=True)
class DenseStructure:
    """G as a matrix.

    At a few prior precisions the inverse of a Cholesky factor answers, the last one being remembered. From the sixth on
    G is decomposed into eigenvectors, once, and serves them all. What is remembered stays with the object, and is found
    again after that has crossed `jit`.

    Attributes
    ----------
    matrix
        G, symmetric, shape (P, P).
    """

    matrix: Float[Array, "P P"]

    rows_for_output, rows_for_column = 1.0, 1.0

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
        if self._is_known(delta):
            diagonal = 1 / np.diagonal(self._remembered(delta).factor)
        elif self._many("determinants"):
            return np.log1p(self._eigenvalues() / delta).sum(keepdims=True)
        else:
            diagonal = np.diagonal(_shifted_cholesky(self.matrix, delta))
        return 2 * np.log(diagonal / np.sqrt(delta)).sum(keepdims=True)

    def truncation(self, prior_precision: float) -> Float[np.ndarray, " 1"]:
        """Zero: nothing is truncated."""
        return np.zeros(1)

    def effective_parameters(self, prior_precision: float, groups: Int[np.ndarray, " P"]) -> Float[np.ndarray, "1 g"]:
        """tr_g G (G + delta I)^-1 = sum_g 1 - delta [(G + delta I)^-1]_ii over the weights of each group."""
        delta, inverse = float(prior_precision), self._remembered(float(prior_precision)).factor
        # With G + delta I = L L' the diagonal of its inverse holds the squared norms of the columns of L^-1.
        return group_sums(1 - delta * np.einsum("ij,ij->j", inverse, inverse), groups)[None]

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: float) -> float:
        """v' (G + delta I)^-1 v, in float64."""
        whitened = self._remembered(float(prior_precision)).factor @ vector
        return float(whitened @ whitened)

    def samples(self, key: Array, num_samples: int, prior_precision: float) -> Float[Array, "S P"]:
        """Rows S eps with S S' = (G + delta I)^-1, S being L'^-1 for the Cholesky factor L of G + delta I."""
        noise = jax.random.normal(key, (num_samples, len(self.matrix)), self.matrix.dtype)
        if self._is_traced(prior_precision):
            return matmul(noise, _traced_root(self.matrix, prior_precision).T)
        return matmul(noise, self._remembered(float(prior_precision)).root.T)

    def output_covariance(self, precisions: Sequence[float], relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """J -> (J L'^-1) (J L'^-1)' for each delta, or by J V (lambda + delta)^-1/2 where there are many."""
        if not isinstance(self.matrix, jax.core.Tracer) and self._many_covariances(precisions):
            values, vectors = self._eigenvectors()
            variances = 1 / (values + jnp.asarray(precisions, values.dtype)[:, None])
            return Partial(_by_eigenvectors, vectors, variances, relative)
        roots = [
            _traced_root(self.matrix, delta) if self._is_traced(delta) else self._remembered(float(delta)).root
            for delta in precisions
        ]
        return Partial(_by_triangles, roots, relative)

    # What is remembered lives beside the fields, so that no checkpoint holds it, nor a pickled copy.

    def __getstate__(self) -> dict[str, Array]:
        return {"matrix": self.matrix}

    def _many(self, what: str, times: int = 1) -> bool:
        """Whether this has been asked more than five times."""
        asked = self.__dict__.setdefault("_asked", {})
        asked[what] = asked.get(what, 0) + times
        return asked[what] > 5

    def _many_covariances(self, precisions: Sequence[float]) -> bool:
        """Whether covariances have been asked for at more than five precisions, but for the one that is remembered."""
        new = sum(isinstance(delta, jax.core.Tracer) or not self._is_known(float(delta)) for delta in precisions)
        return new > 0 and self._many("covariances", new)

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

    def _is_known(self, delta: float) -> bool:
        last = self.__dict__.get("_last")
        return last is not None and last.delta == delta

    def _remembered(self, delta: float) -> "_Inverse":
        """The inverse factor at delta; the last one is kept, as one record, so that threads do not mix two of them."""
        last = self.__dict__.get("_last")
        if last is None or last.delta != delta:
            inverse, _ = scipy.linalg.lapack.dtrtri(_shifted_cholesky(self.matrix, delta), lower=True, overwrite_c=True)
            last = _Inverse(delta, inverse, self.matrix.dtype)
            self.__dict__["_last"] = last
        return last

    def _is_traced(self, prior_precision: float) -> bool:
        return isinstance(prior_precision, jax.core.Tracer) or isinstance(self.matrix, jax.core.Tracer)


class _Inverse:
    """L^-1 with G + delta I = L L'.

    Attributes
    ----------
    delta
        The prior precision.
    factor
        In float64, on the host.
    """

    def __init__(self, delta: float, factor: Float[np.ndarray, "P P"], dtype: Any) -> None:
        self.delta, self.factor, self._dtype = delta, factor, dtype

    @cached_property
    def root(self) -> Float[Array, "P P"]:
        """L'^-1, on the device."""
        with jax.ensure_compile_time_eval():  # what a traced function asks for is remembered beyond its trace
            return jax.device_put(self.factor.T.astype(self._dtype))


def _traced_root(matrix: Float[Array, "P P"], delta: float) -> Float[Array, "P P"]:
    """S with S S' = (G + delta I)^-1; from eigenvectors where rounding of G costs definiteness."""
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    lower = jnp.linalg.cholesky(matrix + delta * identity)

    def from_cholesky() -> Float[Array, "P P"]:
        return jax.scipy.linalg.solve_triangular(lower, identity, lower=True).T

    def from_eigenvectors() -> Float[Array, "P P"]:
        values, vectors = jnp.linalg.eigh(matrix)
        rows = vectors * jax.lax.rsqrt(jnp.maximum(values, 0) + delta)
        # From the other end, that of a triangle above: S S' = U U' for the triangle U of S = U Q.
        return jnp.linalg.qr(rows[::-1].T, mode="r").T[::-1, ::-1]

    return jax.lax.cond(jnp.isfinite(lower).all(), from_cholesky, from_eigenvectors)


def _shifted_cholesky(matrix: Float[Array, "P P"], delta: float) -> Float[np.ndarray, "P P"]:
    """The lower factor of G + delta I in float64; rounding of G that costs definiteness is removed."""

    def factor(symmetric: Float[np.ndarray, "P P"]) -> Float[np.ndarray, "P P"]:
        np.fill_diagonal(symmetric, np.diagonal(symmetric) + delta)
        # Its transpose, the same matrix, lies in memory as LAPACK wants it.
        return scipy.linalg.cholesky(symmetric.T, lower=True, overwrite_a=True, check_finite=False)

    try:
        return factor(np.array(matrix, np.float64))
    except scipy.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(np.asarray(matrix, np.float64))
        return factor((vectors * np.maximum(values, 0)) @ vectors.T)


def _by_triangles(
    roots: list[Float[Array, "P P"]], relative: RelativePrecisions, jacobian: Jacobian
) -> Float[Array, "D M U C C"]:
    """(J D^-1/2 S) (J D^-1/2 S)' for each S, which is upper triangular."""
    return jnp.stack([_by_triangle(root, relative, jacobian) for root in roots])


def _by_triangle(
    root: Float[Array, "P P"], relative: RelativePrecisions, jacobian: Jacobian
) -> Float[Array, "M U C C"]:
    """In four blocks of columns: most zeros of the triangle are left out."""
    ends = np.unique(np.linspace(0, len(root), 5).astype(int))  # fewer where there are fewer columns
    blocks = zip(ends[:-1], ends[1:], strict=True)
    return sum(inner_products(jacobian.times(_divided(root[:end, start:end], relative))) for start, end in blocks)


def _by_eigenvectors(
    vectors: Float[Array, "P P"],
    variances: Float[Array, "D P"],
    relative: RelativePrecisions,
    jacobian: Jacobian,
) -> Float[Array, "D M U C C"]:
    rows = jacobian.times(_divided(vectors, relative))
    return jax.lax.map(lambda variance: inner_products(rows * jnp.sqrt(variance)), variances)


def _divided(matrix: Float[Array, "p R"], relative: RelativePrecisions) -> Float[Array, "p R"]:
    """The first p rows of D^-1/2 times a matrix of p rows."""
    return matrix if jnp.ndim(relative) == 0 else matrix / jnp.sqrt(relative)[: len(matrix), None]
