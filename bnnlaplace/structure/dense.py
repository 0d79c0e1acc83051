"""The full GGN as a matrix. It is exact, serves small networks, and is the oracle of the other structures."""

from dataclasses import dataclass
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # its parts are imported at their first use, which takes half a second
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.tree import group_sums
from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature.jacobian import Jacobian, inner_products
from bnnlaplace.structure.protocol import OutputCovariance, PriorPrecision, PriorPrecisions, RelativePrecisions


@partial(jax.tree_util.register_dataclass, data_fields=("matrix",), meta_fields=())
@dataclass(frozen=True)
class DenseStructure:
    """The full GGN as a matrix.

    The first few prior precisions are answered by the inverse of a Cholesky factor, and the last one is remembered.
    From the sixth request on, one eigendecomposition of G serves them all. Both are in float64 and give the same
    answers. What is remembered stays with the object. An object that has crossed `jit` computes it again.

    Attributes
    ----------
    matrix
        G, symmetric, shape (P, P): in float64 on the host. In an object that has crossed `jit` it is an array of JAX in
        the type of JAX's floats.
    """

    matrix: Float[AnyArray, "P P"]

    rows_for_output, rows_for_column = 1.0, 1.0

    @classmethod
    def fit(cls, matrix: Float[AnyArray, "P P"]) -> "DenseStructure":
        """Build the structure from G. Of a matrix that rounding made asymmetric one triangle counts."""
        return cls(matrix)

    def resolution(self) -> float:
        """The prior precision below which curvature of its size cannot be told from rounding.

        In a matrix in float64 it is the rounding of the derivatives, which are in float32. Otherwise it is that of the
        matrix.
        """
        is_float64 = self.matrix.dtype == np.float64
        relative = (
            (8 * float(np.finfo(np.float32).eps)) ** 2 if is_float64 else 4 * float(jnp.finfo(self.matrix.dtype).eps)
        )
        # The trace bounds the largest eigenvalue.
        return relative * float(np.asarray(np.diagonal(self.matrix)).sum())

    @classmethod
    def from_arrays(cls, arrays: dict[str, AnyArray]) -> "DenseStructure":
        """Rebuild the structure from its fields by name, as a checkpoint holds them."""
        if "eigenvalues" in arrays:  # written by an earlier release
            values, vectors = (np.asarray(arrays[name], np.float64) for name in ("eigenvalues", "eigenvectors"))
            return cls.fit((vectors * values) @ vectors.T)
        return cls(np.asarray(arrays["matrix"]))

    def whitened(self, relative: Float[AnyArray, " P"]) -> "DenseStructure":
        """Return the structure of D^-1/2 G D^-1/2."""
        if not isinstance(relative, jax.core.Tracer):
            relative = np.asarray(relative, np.float64)
        root = relative**0.5 * np.ones(len(self.matrix))
        return DenseStructure(self.matrix / root / root[:, None])

    def scaled(self, factor: float) -> "DenseStructure":
        """Return the structure of factor * G."""
        return DenseStructure(factor * self.matrix)

    def log_determinant(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """log det(I + G / delta), in float64."""
        delta = float(prior_precision)
        # The diagonal of a Cholesky factor is enough. The remembered factor is an inverse, hence the reciprocals.
        if self._is_known(delta):
            diagonal = 1 / np.diagonal(self._inverse_at(delta).factor)
        elif self._asked_often("determinants"):
            return np.log1p(self._eigenvalues() / delta).sum(keepdims=True)
        else:
            diagonal = np.diagonal(_shifted_cholesky(self.matrix, delta))
        return 2 * np.log(diagonal / np.sqrt(delta)).sum(keepdims=True)

    def truncation(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """Zero, because nothing is truncated."""
        return np.zeros(1)

    def effective_parameters(
        self, prior_precision: PriorPrecision, groups: Int[np.ndarray, " P"]
    ) -> Float[np.ndarray, "1 g"]:
        """tr_g G (G + delta I)^-1, the sum of 1 - delta [(G + delta I)^-1]_ii over the weights of each group."""
        delta = float(prior_precision)
        inverse = self._inverse_at(delta).factor
        # With G + delta I = L L' the diagonal of its inverse holds the squared norms of the columns of L^-1.
        return group_sums(1 - delta * np.einsum("ij,ij->j", inverse, inverse), groups)[None]

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision) -> float:
        """v' (G + delta I)^-1 v, in float64."""
        whitened = self._inverse_at(float(prior_precision)).factor @ vector
        return float(whitened @ whitened)

    def samples(self, key: Array, num_samples: int, prior_precision: PriorPrecision) -> Float[Array, "S P"]:
        """Draw rows L'^-1 eps with the Cholesky factor L of G + delta I."""
        noise = jax.random.normal(key, (num_samples, len(self.matrix)))
        return matmul(noise, self._root_at(prior_precision).T)

    def output_covariance(self, precisions: PriorPrecisions, relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """Return the function J -> J D^-1/2 (G + delta I)^-1 D^-1/2 J', evaluated at each delta.

        A few precisions are answered by X X' with X = J D^-1/2 L'^-1 and the Cholesky factor L of G + delta I. For many
        of them the product J D^-1/2 V with the eigenvectors of G is formed once instead.
        """
        is_traced = any(isinstance(delta, jax.core.Tracer) for delta in precisions)
        if not isinstance(self.matrix, jax.core.Tracer) and (is_traced or self._asks_often_for_covariances(precisions)):
            values, vectors = self._eigenvectors()
            # On the host a small precision is not lost beside large eigenvalues.
            column = jnp.stack(list(precisions))[:, None] if is_traced else np.asarray(precisions, np.float64)[:, None]
            return Partial(_by_eigenvectors, vectors, jnp.asarray(1 / (values + column)), relative)
        return Partial(_by_triangles, [self._root_at(delta) for delta in precisions], relative)

    # Remembered factors are not fields, so checkpoints and pickled copies do not hold them. They are written to
    # `__dict__`, because the dataclass is frozen.

    def __getstate__(self) -> dict[str, AnyArray]:
        return {"matrix": self.matrix}

    def _asked_often(self, what: str, times: int = 1) -> bool:
        """Count the requests for `what`, and say whether there have been more than five.

        An eigendecomposition costs several Cholesky factorisations, so it pays only if it serves many requests.
        """
        asked = self.__dict__.setdefault("_asked", {})
        asked[what] = asked.get(what, 0) + times
        return asked[what] > 5

    def _asks_often_for_covariances(self, precisions: PriorPrecisions) -> bool:
        """Count the precisions other than the remembered one, and say whether there have been more than five."""
        new = sum(isinstance(delta, jax.core.Tracer) or not self._is_known(float(delta)) for delta in precisions)
        return new > 0 and self._asked_often("covariances", new)

    def _eigenvalues(self) -> Float[np.ndarray, " P"]:
        """Eigenvalues of G in float64. G is semidefinite, so negative ones are rounding and become zero."""
        if "_vectors" in self.__dict__:
            return self.__dict__["_vectors"][0]
        if "_values" not in self.__dict__:
            self.__dict__["_values"] = np.maximum(scipy.linalg.eigvalsh(_host_copy(self.matrix)), 0)
        return self.__dict__["_values"]

    def _eigenvectors(self) -> tuple[Float[np.ndarray, " P"], Float[Array, "P P"]]:
        """Eigenvalues of G in float64, and eigenvectors on the device.

        The eigenvectors are rounded after they have been computed in float64. Those of a float32 decomposition are off
        by eps lambda_max / gap, and the variance in directions of small curvature with them.
        """
        if "_vectors" not in self.__dict__:
            values, vectors = scipy.linalg.eigh(_host_copy(self.matrix), driver="evd", overwrite_a=True)
            with jax.ensure_compile_time_eval():  # a traced function may ask first; the result outlives its trace
                self.__dict__["_vectors"] = np.maximum(values, 0), jnp.asarray(vectors)
        return self.__dict__["_vectors"]

    def _is_known(self, delta: float) -> bool:
        """Whether the remembered inverse is the one at delta."""
        last = self.__dict__.get("_last")
        return last is not None and last.delta == delta

    def _inverse_at(self, delta: float) -> "_Inverse":
        """Return the inverse factor at delta. The last one is kept.

        It is read and written as one record, so that threads do not mix the delta of one with the factor of another.
        """
        last = self.__dict__.get("_last")
        if last is None or last.delta != delta:
            inverse, _ = scipy.linalg.lapack.dtrtri(_shifted_cholesky(self.matrix, delta), lower=True, overwrite_c=True)
            last = _Inverse(delta, inverse)
            self.__dict__["_last"] = last
        return last

    def _root_at(self, delta: PriorPrecision) -> Float[Array, "P P"]:
        """Return the upper triangular S with S S' = (G + delta I)^-1, also if JAX traces delta or the matrix."""
        if isinstance(self.matrix, jax.core.Tracer):
            return _traced_root(self.matrix, delta)
        if isinstance(delta, jax.core.Tracer):
            values, vectors = self._eigenvectors()
            return _triangular(vectors * jax.lax.rsqrt(jnp.asarray(values, vectors.dtype) + delta))
        return self._inverse_at(float(delta)).root


class _Inverse:
    """The inverse L^-1 of the Cholesky factor in G + delta I = L L'.

    Attributes
    ----------
    delta
        The prior precision.
    factor
        L^-1 in float64, on the host.
    """

    def __init__(self, delta: float, factor: Float[np.ndarray, "P P"]) -> None:
        self.delta, self.factor = delta, factor

    @cached_property
    def root(self) -> Float[Array, "P P"]:
        """L'^-1 on the device, in the type of JAX's floats."""
        with jax.ensure_compile_time_eval():  # a traced function may ask first; the result outlives its trace
            return jnp.asarray(self.factor.T)


def _traced_root(matrix: Float[Array, "P P"], delta: PriorPrecision) -> Float[Array, "P P"]:
    """Return an upper triangular S with S S' = (G + delta I)^-1, for a G that JAX traces."""
    identity = jnp.eye(len(matrix), dtype=matrix.dtype)
    lower = jnp.linalg.cholesky(matrix + delta * identity)

    def from_cholesky() -> Float[Array, "P P"]:
        return jax.scipy.linalg.solve_triangular(lower, identity, lower=True).T

    def from_eigenvectors() -> Float[Array, "P P"]:
        values, vectors = jnp.linalg.eigh(matrix)
        return _triangular(vectors * jax.lax.rsqrt(jnp.maximum(values, 0) + delta))

    # Rounding can make a semidefinite G slightly indefinite. The Cholesky factor then holds NaN.
    return jax.lax.cond(jnp.isfinite(lower).all(), from_cholesky, from_eigenvectors)


def _triangular(rows: Float[Array, "P P"]) -> Float[Array, "P P"]:
    """Return the upper triangular U with a positive diagonal and U U' = rows rows'."""
    # If rows = U Q with Q orthogonal, then U U' = rows rows'. QR of the transpose gives a lower U; with the order of
    # the rows reversed before and after, U is upper triangular.
    upper = jnp.linalg.qr(rows[::-1].T, mode="r").T[::-1, ::-1]
    return upper * jnp.where(jnp.diagonal(upper) < 0, -1, 1)


def _shifted_cholesky(matrix: Float[AnyArray, "P P"], delta: float) -> Float[np.ndarray, "P P"]:
    """Return the lower Cholesky factor of G + delta I in float64.

    If rounding of G makes G + delta I indefinite, the negative eigenvalues of G are set to zero first.
    """

    def factor(symmetric: Float[np.ndarray, "P P"]) -> Float[np.ndarray, "P P"]:
        np.fill_diagonal(symmetric, np.diagonal(symmetric) + delta)
        # The transpose is the same matrix in the column order of LAPACK, which can then overwrite it without a copy.
        return scipy.linalg.cholesky(symmetric.T, lower=True, overwrite_a=True, check_finite=False)

    try:
        return factor(_host_copy(matrix))
    except scipy.linalg.LinAlgError:
        values, vectors = scipy.linalg.eigh(_host_copy(matrix), overwrite_a=True)
        return factor((vectors * np.maximum(values, 0)) @ vectors.T)


def _host_copy(matrix: Float[AnyArray, "P P"]) -> Float[np.ndarray, "P P"]:
    """A copy in float64 on the host, which LAPACK may overwrite."""
    return np.array(matrix, np.float64)


def _by_triangles(
    roots: list[Float[Array, "P P"]], relative: RelativePrecisions, jacobian: Jacobian
) -> Float[Array, "D M U C C"]:
    """Compute (J D^-1/2 S) (J D^-1/2 S)' for each upper triangular S."""
    return jnp.stack([_by_triangle(root, relative, jacobian) for root in roots])


def _by_triangle(
    root: Float[Array, "P P"], relative: RelativePrecisions, jacobian: Jacobian
) -> Float[Array, "M U C C"]:
    """Compute (J D^-1/2 S) (J D^-1/2 S)' for one upper triangular S, in four blocks of its columns."""
    # Below row `end` the columns before `end` are zero. With four blocks about 3/8 of the arithmetic is left out.
    ends = np.unique(np.linspace(0, len(root), 5).astype(int))  # fewer blocks if there are fewer than four columns
    blocks = zip(ends[:-1], ends[1:], strict=True)
    columns = (_divided(root[:end, start:end], relative, jacobian) for start, end in blocks)
    return sum(inner_products(jacobian.times(some)) for some in columns)


def _by_eigenvectors(
    vectors: Float[Array, "P P"],
    variances: Float[Array, "D P"],
    relative: RelativePrecisions,
    jacobian: Jacobian,
) -> Float[Array, "D M U C C"]:
    """Compute J D^-1/2 V diag(variances) V' D^-1/2 J' for the variances at each delta."""
    # J V is formed once for all deltas. They follow one another, because each needs a scaled copy of it.
    rows = jacobian.times(_divided(vectors, relative, jacobian))
    roots = jnp.sqrt(variances).astype(rows.dtype)
    return jax.lax.map(lambda root: inner_products(rows * root), roots)


def _divided(matrix: Float[Array, "p R"], relative: RelativePrecisions, jacobian: Jacobian) -> Float[Array, "p R"]:
    """Multiply a matrix of p rows by the first p rows and columns of D^-1/2, in the type of the derivatives."""
    matrix = matrix.astype(jacobian.leaves[0].derivatives.dtype)
    return matrix if jnp.ndim(relative) == 0 else matrix / jnp.sqrt(relative)[: len(matrix), None]
