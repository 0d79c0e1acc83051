"""Blocks of rows for block recurrences: checks of the probes, and orthonormal rows that reveal the rank."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import matmul

# A direction whose singular value is below this times eps, relative to the largest one, is rounding.
FLOOR = 10


def check_probes(caller: str, probes: Float[Array, "S n"], max_vectors: int) -> None:
    """Raise ValueError if there are too many probes, or one is zero or not finite."""
    count, dimension = probes.shape
    if not 1 <= count <= min(max_vectors, dimension):
        raise ValueError(
            f"{caller}(probes=...) must have between 1 and min(max_vectors, n) = {min(max_vectors, dimension)} "
            f"rows; got {count}; use fewer probes or raise max_vectors"
        )
    norms = np.asarray(jnp.linalg.norm(probes, axis=1))
    if not (np.isfinite(norms).all() and (norms > 0).all()):
        raise ValueError(
            f"{caller}(probes=...) must have finite nonzero rows; got norms {norms}; draw them with normal_probes"
        )


def first_block(probes: Float[Array, "S n"]) -> tuple[Float[Array, "S n"], Float[Array, "S S"]]:
    """Write the probes as L Q with orthonormal or zero rows of Q; return Q, L."""
    largest = float(jnp.max(jnp.linalg.norm(probes, axis=1)))
    return orthonormal_rows(probes, (), FLOOR * float(jnp.finfo(probes.dtype).eps) * largest)


def largest_norm(what: str, rows: Float[Array, "S n"]) -> float:
    """The largest norm of a row; FloatingPointError if it is not finite."""
    largest = float(jnp.max(jnp.linalg.norm(rows, axis=1)))
    if not np.isfinite(largest):
        raise FloatingPointError(
            f"{what} must return finite values; got a row of norm {largest}; check the weights and the data that it "
            "uses"
        )
    return largest


def orthonormal_rows(
    rows: Float[Array, "S n"], basis: tuple[Float[Array, "_ n"], ...], floor: float
) -> tuple[Float[Array, "S n"], Float[Array, "S S"]]:
    """Write rows = (something in the span of `basis`) + L Q, with Q orthonormal and orthogonal to `basis`; return Q, L.

    `basis` comes in parts. A direction whose singular value is below `floor` would be normalised rounding: its row of Q
    and its column of L are set to zero.
    """
    rows = _orthogonalise(_orthogonalise(rows, basis), basis)
    rows, lower = _factorise(rows, floor)
    # If L is ill-conditioned, the factorisation has magnified what rounding left along the basis. Hence another pass.
    # Its rows have length one or zero, so any floor between will do.
    rows, correction = _factorise(_orthogonalise(rows, basis), 0.5)
    return rows, matmul(lower, correction)


def _orthogonalise(rows: Float[Array, "S n"], basis: tuple[Float[Array, "_ n"], ...]) -> Float[Array, "S n"]:
    """Remove from `rows` what lies along `basis`, block after block, as in modified Gram-Schmidt."""
    for vectors in basis:
        # Blocks of one size, so that one compiled program serves every length of the basis.
        for first in range(0, len(vectors), len(rows)):
            rows = _remove(rows, jax.lax.dynamic_slice_in_dim(vectors, first, len(rows)))
    return rows


@jax.jit
def _remove(rows: Float[Array, "S n"], block: Float[Array, "S n"]) -> Float[Array, "S n"]:
    return rows - matmul(matmul(rows, block.T), block)


@jax.jit
def _factorise(
    rows: Float[Array, "S n"], floor: Float[ArrayLike, ""]
) -> tuple[Float[Array, "S n"], Float[Array, "S S"]]:
    """Write rows = L Q with orthonormal or zero rows of Q; return Q, L."""
    # The factorisation must reveal the rank: QR alone invents a direction for a dependent row, and later rows have
    # components along it. The singular values of the small triangular factor tell which directions are there.
    columns, upper = jnp.linalg.qr(rows.T)
    left, values, right = jnp.linalg.svd(upper)
    alive = values > floor
    return matmul(left.T, columns.T) * alive[:, None], right.T * (values * alive)
