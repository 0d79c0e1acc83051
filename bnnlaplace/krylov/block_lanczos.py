"""Block Lanczos: one Krylov space for many start vectors, grown until the caller is satisfied.

S probes span a block. K block steps give a basis of m = K S vectors, in which f(A) z is approximated for *every* probe.
S separate runs of depth K take as many products, and each of them has a space that is S times smaller. A single run of
depth m reaches a higher polynomial degree, but serves one probe. On a spectrum with outliers, such as that of a GGN,
a block needs several times fewer products than separate runs for the same accuracy. Products come S at a time, so that
one forward pass of a network serves all of them and data can be streamed.

With the basis as rows of Q (m x n) and Z the probes as rows:

    Z = L_0 Q_1,    Q A = T Q + E_K L_K Q_{K+1},    T block tridiagonal: D_j on the diagonal, L_j above it.

Source: Golub and Underwood 1977; Golub and Van Loan, Matrix Computations, section 10.3.6.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import matmul
from bnnlaplace.krylov.block_rows import FLOOR, check_probes, first_block, largest_norm, orthonormal_rows
from bnnlaplace.krylov.tridiagonal import ROUNDING


class BlockDecomposition(NamedTuple):
    """K steps of block Lanczos from S probes; m = K S.

    Attributes
    ----------
    basis
        Q: m orthonormal rows, some of which are zero if the space was exhausted.
    tridiagonal
        T = Q A Q', in float64 on the host.
    start
        L_0: the probes in the coordinates of the first block.
    residual
        L_K: the coupling to the block that would follow. Zero if the space is invariant.
    """

    basis: Float[Array, "m n"]
    tridiagonal: Float[np.ndarray, "m m"]
    start: Float[np.ndarray, "S S"]
    residual: Float[np.ndarray, "S S"]


class Ritz(NamedTuple):
    """The eigendecomposition T = U diag(theta) U' of a block decomposition, and what the probes see of it.

    Attributes
    ----------
    values
        theta, ascending. With `ritz(positive=True)`, values that rounding may have made of zero are zero.
    vectors
        U, one Ritz vector in each column, in the coordinates of the basis.
    weights
        C = U' E_1 L_0': the components of each probe along each Ritz vector.
    couplings
        |L_K' E_K' u_j|: the residual norm |A x_j - theta_j x_j| of each Ritz pair.
    tails
        L_K' E_K' U: the residuals themselves, in the coordinates of the next block.
    resolution
        The size up to which a value cannot be told from zero, because products are off by rounding. 0 if nothing is
        known about the sign of the values.
    hidden
        |theta| of the values that were set to zero, and zero for all others.
    """

    values: Float[np.ndarray, " m"]
    vectors: Float[np.ndarray, "m m"]
    weights: Float[np.ndarray, "m S"]
    couplings: Float[np.ndarray, " m"]
    tails: Float[np.ndarray, "S m"]
    resolution: np.float64
    hidden: Float[np.ndarray, " m"]


def block_lanczos(
    product: Callable[[Float[Array, "S n"]], Float[Array, "S n"]],
    probes: Float[Array, "S n"],
    *,
    max_vectors: int,
) -> Iterator[BlockDecomposition]:
    """Grow a block decomposition one block at a time, yielding it after each.

    Parameters
    ----------
    product
        V -> V A for S rows at once, with a symmetric A. It is called once for each block, so it should be compiled.
    probes
        Z, with the S probes as rows.
    max_vectors
        The largest m. No block is started that would exceed it.

    Yields
    ------
    BlockDecomposition
        After 1, 2, ... blocks. Stop iterating when it is accurate enough. The iteration ends by itself when
        `max_vectors` is reached or the space is invariant.

        In an invariant space f(A) z is exact for every probe z. A trace is still an estimate if an eigenvalue has more
        copies than there are probes. If S does not divide n, some rows of the last block are zero, and m exceeds n.

    Raises
    ------
    ValueError
        If there are more probes than `max_vectors` or than dimensions, or a probe is zero or not finite.
    FloatingPointError
        If the product returns values that are not finite.

    Notes
    -----
    Cost of block k: one product with S vectors, and 6 k S^2 n multiplications (two passes of reorthogonalisation before
    the factorisation and one after it). Memory: m n numbers for the basis, which the recurrence shares with the newest
    decomposition, and 2 m n for the moment in which a block is appended. Keeping earlier decompositions keeps their
    bases.
    """
    check_probes("block_lanczos", probes, max_vectors)
    floor, scale = FLOOR * float(jnp.finfo(probes.dtype).eps), 0.0

    def step(basis: Float[Array, "m n"], newest: Float[Array, "S n"]) -> Step:
        nonlocal scale
        images = product(newest)
        block = np.asarray(matmul(images, newest.T), np.float64)
        # The largest image so far stands for |A|: rounding of the early, large products stays in all later blocks.
        scale = max(scale, largest_norm("block_lanczos(product=...)", images))
        following, lower = orthonormal_rows(images, (basis, newest), floor * scale)
        symmetric = (block + block.T) / 2  # as it is but for rounding
        return symmetric, np.asarray(lower, np.float64), following

    yield from grown(step, probes, max_vectors)


# The diagonal block D_k, the coupling L_k to the next block, and the rows of that.
Step = tuple[Float[np.ndarray, "S S"], Float[np.ndarray, "S S"], Float[Array, "S n"]]


def grown(
    step: Callable[[Float[Array, "m n"], Float[Array, "S n"]], Step], probes: Float[Array, "S n"], max_vectors: int
) -> Iterator[BlockDecomposition]:
    """Yield a decomposition after each step of a block recurrence, which gets the basis and the newest block."""
    count, dimension = probes.shape
    newest, start = first_block(probes)
    basis = probes[:0]
    diagonal: list[np.ndarray] = []
    off_diagonal: list[np.ndarray] = []
    while True:
        block, coupling, following = step(basis, newest)
        diagonal.append(block)
        off_diagonal.append(coupling)
        # Appended only now, since the caller still holds the basis without this block. Appended before the step, a
        # second basis would be alive while its products run.
        basis, newest = jnp.concatenate([basis, newest]), following
        tridiagonal = _assemble(diagonal, off_diagonal[:-1])
        yield BlockDecomposition(basis, tridiagonal, np.asarray(start, np.float64), coupling)
        exhausted = len(basis) >= dimension or not coupling.any()
        if exhausted or len(basis) + count > max_vectors:
            return


def ritz(decomposition: BlockDecomposition, *, positive: bool = True, rounding: float | None = None) -> Ritz:
    """Diagonalise T in float64.

    Parameters
    ----------
    decomposition
        A decomposition that `block_lanczos` or `block_golub_kahan` yields.
    positive
        Whether A is positive semidefinite. Then small values are zero: rounding makes such values, of either sign,
        where A has none. There are as many as A has null directions, so that together they would count as curvature.
    rounding
        Values up to this times theta_max are zero, if A is positive. By default 4 eps, with the eps of the basis, for
        products with A in that type. The most negative value shows how large such values are, so values up to twice its
        size are zero as well: they come in pairs of about one size.

    Returns
    -------
    Ritz
        Ritz values and vectors, and the components of the probes along them.
    """
    values, vectors = np.linalg.eigh(decomposition.tridiagonal)
    resolution, hidden = np.float64(0.0), np.zeros_like(values)
    if positive:
        least = ROUNDING * float(jnp.finfo(decomposition.basis.dtype).eps) if rounding is None else rounding
        resolution = np.float64(max(least * np.abs(values).max(), -2 * values.min()))
        is_hidden = values <= resolution
        hidden = np.where(is_hidden, np.abs(values), 0.0)
        values = np.where(is_hidden, 0.0, values)
    count = len(decomposition.start)
    tails = decomposition.residual.T @ vectors[-count:]
    weights = vectors[:count].T @ decomposition.start.T
    return Ritz(values, vectors, weights, np.linalg.norm(tails, axis=0), tails, resolution, hidden)


def _assemble(diagonal: list[np.ndarray], off_diagonal: list[np.ndarray]) -> Float[np.ndarray, "m m"]:
    """Assemble the symmetric matrix T from its blocks."""
    count = len(diagonal[0])
    tridiagonal = np.zeros((len(diagonal) * count,) * 2)
    for j, block in enumerate(diagonal):
        here = slice(j * count, (j + 1) * count)
        tridiagonal[here, here] = block
        if j < len(off_diagonal):
            there = slice((j + 1) * count, (j + 2) * count)
            tridiagonal[here, there] = off_diagonal[j]
            tridiagonal[there, here] = off_diagonal[j].T
    return tridiagonal
