"""The full GGN as a matrix. It is exact, serves small networks, and is the oracle of the other structures."""

from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy  # its parts are imported at their first use, which takes half a second
from jax.tree_util import Partial
from jaxtyping import Array, Float, Int

from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.rounding import OF_FLOAT32
from bnnlaplace.core.tree import group_sums
from bnnlaplace.core.types import AnyArray
from bnnlaplace.curvature.jacobian import Jacobian, inner_products
from bnnlaplace.structure.protocol import OutputCovariance, PriorPrecision, PriorPrecisions, RelativePrecisions
from bnnlaplace.structure.words import Words

# Error of the eigenvalues of a sum, over eps of its type times the largest one.
OF_SUMS = 4.0


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True)
class DenseStructure:
    """The full GGN as a matrix.

    The first few prior precisions are answered by a Cholesky factor, and the last one is remembered. From the sixth
    request on, one eigendecomposition of G serves them all. Both are in float64 and give the same answers. What is
    remembered stays with the object. An object that has crossed `jit` computes it again.

    Attributes
    ----------
    matrix
        G, symmetric, shape (P, P), in float64 on the host. Where JAX traces the structure it is `Words`.
    rounding
        Relative error of the derivatives in G.
    """

    matrix: Float[AnyArray, "P P"] | Words
    rounding: float = OF_FLOAT32

    rows_for_output, rows_for_column = 1.0, 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.matrix, Words):
            object.__setattr__(self, "matrix", np.ascontiguousarray(self.matrix))

    @classmethod
    def fit(cls, matrix: Float[AnyArray, "P P"], rounding: float = OF_FLOAT32) -> "DenseStructure":
        """Build the structure from G. Of a matrix that rounding made asymmetric one triangle counts."""
        return cls(matrix, rounding)

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Any, Any], ...], Any]:
        """The words of the matrix, because JAX would round a leaf in float64. They are no copy."""
        words = self._as_words()
        keys = map(jax.tree_util.GetAttrKey, ("matrix", "scale"))
        return tuple(zip(keys, (words.words, words.scale), strict=True)), (words.dtype, self.rounding)

    @classmethod
    def tree_unflatten(cls, meta: tuple[Any, float], leaves: tuple[Any, Any]) -> "DenseStructure":
        """The structure of such leaves, or of what JAX puts in their place."""
        (words, scale), (dtype, rounding) = leaves, meta
        known = (leaf is None or isinstance(leaf, np.ndarray | jax.Array) for leaf in leaves)
        if not all(known) or words is None or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            return cls(Words(words, dtype, scale), rounding)
        structure = cls(np.asarray(words).view(dtype), rounding)
        return structure if scale is None else structure.whitened(1 / np.asarray(scale, np.float64) ** 2)

    def _as_words(self) -> Words:
        matrix = self.matrix
        return matrix if isinstance(matrix, Words) else Words(matrix.view(np.uint32), matrix.dtype)

    def resolution(self) -> float:
        """The prior precision below which curvature of its size cannot be told from rounding.

        An error of the derivatives enters the eigenvalues that should be zero by its square, one of the sums as it is.
        """
        relative = max(self.rounding**2, OF_SUMS * float(jnp.finfo(self.matrix.dtype).eps))
        # The trace bounds the largest eigenvalue.
        return relative * float(np.asarray(np.diagonal(self.matrix)).sum())

    @classmethod
    def from_arrays(cls, arrays: dict[str, AnyArray]) -> "DenseStructure":
        """Rebuild the structure from its fields by name, as a checkpoint holds them."""
        if "eigenvalues" in arrays:  # written by an earlier release
            values, vectors = (np.asarray(arrays[name], np.float64) for name in ("eigenvalues", "eigenvectors"))
            return cls.fit((vectors * values) @ vectors.T)
        return cls(np.asarray(arrays["matrix"]), float(arrays.get("rounding", OF_FLOAT32)))

    def whitened(self, relative: Float[AnyArray, " P"]) -> "DenseStructure":
        """Return the structure of D^-1/2 G D^-1/2."""
        if isinstance(self.matrix, Words) or isinstance(relative, jax.core.Tracer):
            return self._with_scale(relative**-0.5)
        root = np.asarray(relative, np.float64) ** 0.5
        return replace(self, matrix=self.matrix / root / root[:, None])

    def scaled(self, factor: float) -> "DenseStructure":
        """Return the structure of factor * G."""
        if isinstance(self.matrix, Words) or isinstance(factor, jax.core.Tracer):
            return self._with_scale(jnp.asarray(factor**0.5))
        return replace(self, matrix=factor * self.matrix)

    def _with_scale(self, scale: Float[AnyArray, ""] | Float[AnyArray, " P"]) -> "DenseStructure":
        """Return the structure of S G S, of which only S need be known to JAX as numbers."""
        words = self._as_words()
        before = jnp.ones(len(words.words)) if words.scale is None else words.scale
        return replace(self, matrix=words._replace(scale=before * scale))

    def plus(self, other: "DenseStructure") -> "DenseStructure":
        """Return the structure of G + G_other."""
        return DenseStructure(self.matrix + other.matrix, max(self.rounding, other.rounding))

    def product(self, vector: Float[AnyArray, " P"]) -> Float[AnyArray, " P"]:
        """G v. A NumPy array stays on the host and in float64."""
        if isinstance(self.matrix, Words):
            return self.matrix.product(jnp.asarray(vector))
        return self.matrix @ vector if isinstance(vector, np.ndarray) else matmul(jnp.asarray(self.matrix), vector)

    def log_determinant(self, prior_precision: PriorPrecision) -> Float[np.ndarray, " 1"]:
        """log det(I + G / delta), in float64."""
        delta = float(prior_precision)
        # The diagonal of a Cholesky factor is enough.
        if self._is_known(delta):
            diagonal = self._factor_at(delta).diagonal
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
        inverse = self._factor_at(delta).inverse
        # With G + delta I = L L' the diagonal of its inverse holds the squared norms of the columns of L^-1.
        return group_sums(1 - delta * np.einsum("ij,ij->j", inverse, inverse), groups)[None]

    def inverse_quadratic_form(self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision) -> float:
        """v' (G + delta I)^-1 v, in float64."""
        whitened = self._factor_at(float(prior_precision)).whitened(vector)
        return float(whitened @ whitened)

    def inverse_product(
        self, vector: Float[np.ndarray, " P"], prior_precision: PriorPrecision
    ) -> Float[np.ndarray, " P"]:
        """(G + delta I)^-1 v, in float64."""
        return self._factor_at(float(prior_precision)).solved(vector)

    def samples(self, key: Array, num_samples: int, prior_precision: PriorPrecision) -> Float[Array, "S P"]:
        """Draw rows L'^-1 eps with the Cholesky factor L of G + delta I."""
        root = self._root_at(prior_precision)
        return matmul(jax.random.normal(key, (num_samples, len(root))), root.T)

    def output_covariance(self, precisions: PriorPrecisions, relative: RelativePrecisions = 1.0) -> OutputCovariance:
        """Return the function J -> J D^-1/2 (G + delta I)^-1 D^-1/2 J', evaluated at each delta.

        A few precisions are answered by X X' with X = J D^-1/2 L'^-1 and the Cholesky factor L of G + delta I. For many
        of them the product J D^-1/2 V with the eigenvectors of G is formed once instead.
        """
        is_traced = any(isinstance(delta, jax.core.Tracer) for delta in precisions)
        if not isinstance(self.matrix, Words) and (is_traced or self._asks_often_for_covariances(precisions)):
            values, vectors = self._eigenvectors()
            # On the host a small precision is not lost beside large eigenvalues.
            column = jnp.stack(list(precisions))[:, None] if is_traced else np.asarray(precisions, np.float64)[:, None]
            return Partial(_by_eigenvectors, vectors, jnp.asarray(1 / (values + column)), relative)
        return Partial(_by_triangles, [self._root_at(delta) for delta in precisions], relative)

    # Remembered factors are not fields, so checkpoints and pickled copies do not hold them. They are written to
    # `__dict__`, because the dataclass is frozen.

    def __getstate__(self) -> dict[str, AnyArray]:
        return {"matrix": self.matrix, "rounding": self.rounding}

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

    def _factor_at(self, delta: float) -> "_Factor":
        """Return the factor at delta. The last one is kept.

        It is read and written as one record, so that threads do not mix the delta of one with the factor of another.
        """
        last = self.__dict__.get("_last")
        if last is None or last.delta != delta:
            last = self.__dict__["_last"] = _Factor(delta, _shifted_cholesky(self.matrix, delta))
        return last

    def _root_at(self, delta: PriorPrecision) -> Float[Array, "P P"]:
        """Return the upper triangular S with S S' = (G + delta I)^-1, also if JAX traces delta or the matrix."""
        if isinstance(self.matrix, Words):
            words, dtype, scale = self.matrix
            scale = jnp.ones(len(words)) if scale is None else scale
            return _traced_root(words, dtype, scale, jnp.asarray(delta, scale.dtype))
        if isinstance(delta, jax.core.Tracer):
            values, vectors = self._eigenvectors()
            return _triangular(vectors * jax.lax.rsqrt(jnp.asarray(values, vectors.dtype) + delta))
        return self._factor_at(float(delta)).root


class _Factor:
    """The Cholesky factor L in G + delta I = L L', and what has been made of it.

    Attributes
    ----------
    delta
        The prior precision.
    diagonal
        That of L.
    """

    def __init__(self, delta: float, lower: Float[np.ndarray, "P P"]) -> None:
        self.delta, self.diagonal = delta, np.diagonal(lower).copy()
        self._is_inverse_and_matrix = False, lower

    @property
    def inverse(self) -> Float[np.ndarray, "P P"]:
        """L^-1 on the host. It takes the place of L when it is first needed, because it costs as much as L."""
        is_inverse, matrix = self._is_inverse_and_matrix
        if not is_inverse:
            matrix, _ = scipy.linalg.lapack.dtrtri(matrix, lower=True)
            self._is_inverse_and_matrix = True, matrix
        return matrix

    def whitened(self, vector: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        """L^-1 v."""
        is_inverse, matrix = self._is_inverse_and_matrix
        if is_inverse:
            return matrix @ vector
        return scipy.linalg.solve_triangular(matrix, vector, lower=True, check_finite=False)

    def solved(self, vector: Float[np.ndarray, " P"]) -> Float[np.ndarray, " P"]:
        """(L L')^-1 v."""
        is_inverse, matrix = self._is_inverse_and_matrix
        return matrix.T @ (matrix @ vector) if is_inverse else scipy.linalg.cho_solve((matrix, True), vector)

    @cached_property
    def root(self) -> Float[Array, "P P"]:
        """L'^-1 on the device, in the type of JAX's floats."""
        with jax.ensure_compile_time_eval():  # a traced function may ask first; the result outlives its trace
            return jnp.asarray(self.inverse.T)


# --- within `jit` -----------------------------------------------------------------------------------------------


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _traced_root(words: Any, dtype: Any, scale: Float[Array, " P"], delta: Float[Array, ""]) -> Float[Array, "P P"]:
    """Return the upper triangular R with R R' = (S M S + delta I)^-1, rounded after it was computed in float64."""
    # One after another under `vmap`: see `core.linalg.eigh`.
    return jax.custom_batching.sequential_vmap(partial(_root_in_float64, dtype))(words, scale, delta)


def _root_in_float64(dtype: Any, words: Any, scale: Float[Array, " P"], delta: Float[Array, ""]) -> Float[Array, "P P"]:
    rounded, size = delta.dtype, len(words)
    # JAX knows float64 as long as it is switched on, for numbers that neither enter nor leave.
    with jax.enable_x64(True):
        scale, delta = (jnp.asarray(number, jnp.float64) for number in (scale, delta))
        matrix = Words(words, dtype, scale).numbers()
        identity = jnp.eye(size, dtype=jnp.float64)

        def definite() -> Float[Array, "P P"]:
            values, vectors = jnp.linalg.eigh(matrix)
            return jnp.linalg.cholesky(matmul(vectors * jnp.maximum(values, 0), vectors.T) + delta * identity)

        # Rounding can make a semidefinite G slightly indefinite. The Cholesky factor then holds NaN.
        lower = jnp.linalg.cholesky(matrix + delta * identity)
        lower = jax.lax.cond(jnp.isfinite(lower).all(), lambda: lower, definite)
        return jax.scipy.linalg.solve_triangular(lower, identity, lower=True).T.astype(rounded)


@_traced_root.defjvp
def _derivative_of_root(
    dtype: Any, primals: tuple[Any, Array, Array], tangents: tuple[Any, Array, Array]
) -> tuple[Float[Array, "P P"], Float[Array, "P P"]]:
    """The derivative R K of R, with the upper triangular K + K' = -R' dA R and A = S M S + delta I."""
    words, scale, delta = primals
    _, of_scale, of_delta = tangents
    root = _traced_root(words, dtype, scale, delta)
    # dA = E (A - delta I) + (A - delta I) E + d delta I with the diagonal E = dS / S, and A R = R'^-1.
    lower = jax.scipy.linalg.solve_triangular(root.T, jnp.eye(len(root), dtype=root.dtype), lower=True)
    ratio = (of_scale / scale)[:, None]
    mixed = matmul(root.T, ratio * lower)
    inner = mixed + mixed.T + matmul(root.T, (of_delta - 2 * delta * ratio) * root)
    return root, -matmul(root, jnp.triu(inner) - jnp.diag(jnp.diagonal(inner) / 2))


def _triangular(rows: Float[Array, "P P"]) -> Float[Array, "P P"]:
    """Return the upper triangular U with a positive diagonal and U U' = rows rows'."""
    # If rows = U Q with Q orthogonal, then U U' = rows rows'. QR of the transpose gives a lower U; with the order of
    # the rows reversed before and after, U is upper triangular.
    upper = jnp.linalg.qr(rows[::-1].T, mode="r").T[::-1, ::-1]
    return upper * jnp.where(jnp.diagonal(upper) < 0, -1, 1)


# --- on the host ------------------------------------------------------------------------------------------------


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
