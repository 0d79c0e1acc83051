"""Block Golub-Kahan: the decomposition of block Lanczos for A = R' R, from products with R and R' one after the other.

A product with A is off by a rounding of its largest eigenvalue. Eigenvalues below that are lost, and where A has many
of them they matter together. The singular values of R are the roots of these eigenvalues, and products with R are off
by a rounding of the largest *root*: so eigenvalues are known down to the square of the rounding. With orthonormal rows
Q of the space of the weights and Y of the space of the images,

    Z = L_0 Q_1,    Q_k R' = M_k Y_{k-1} + N_k Y_k,    Y_k R = N_k' Q_k + M_{k+1}' Q_{k+1},

so that Q R' = B Y with B block lower bidiagonal, and T = Q A Q' = B B' is block tridiagonal. It is that of block
Lanczos for A, and the coupling to the next block is N_K M_{K+1}'. Both are products of numbers that the recurrence
knows to a rounding of the largest root, and they are multiplied in float64.

Source: Golub and Kahan 1965; for blocks Golub, Luk and Overton 1981. That quadrature needs products with the factors,
and no product with A: Golub and Meurant 2010, Matrices, Moments and Quadrature, section 4.
"""

from collections.abc import Callable, Iterator

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.krylov.block_lanczos import BlockDecomposition, Step, grown
from bnnlaplace.krylov.block_rows import FLOOR, check_probes, largest_norm, orthonormal_rows


def block_golub_kahan(
    images: Callable[[Float[Array, "S n"]], Float[Array, "S r"]],
    back: Callable[[Float[Array, "S r"]], Float[Array, "S n"]],
    probes: Float[Array, "S n"],
    *,
    max_vectors: int,
) -> Iterator[BlockDecomposition]:
    """Grow a block decomposition of A = R' R one block at a time, yielding it after each.

    In exact arithmetic it yields what `block_lanczos` does. Diagonalise with `ritz(rounding=(10 * eps)**2)` or more:
    directions in which R is below 10 eps |R| are left out.

    Parameters
    ----------
    images
        V -> V R' for S rows at once. It is called once for each block, so it should be compiled.
    back
        Y -> Y R for S rows at once.
    probes, max_vectors
        As for `block_lanczos`.

    Yields
    ------
    BlockDecomposition
        After 1, 2, ... blocks, as `block_lanczos` does.

    Raises
    ------
    ValueError
        If there are more probes than `max_vectors`, dimensions or rows of R, or a probe is zero or not finite.
    FloatingPointError
        If a product returns values that are not finite.

    Notes
    -----
    Cost of block k: one product with each factor for S vectors, and 6 k S^2 (n + r) multiplications. Memory: that of
    `block_lanczos`, and m r numbers for Y.

    Examples
    --------
    >>> factor = jnp.diag(jnp.array([3.0, 2.0, 1.0]))
    >>> *_, last = block_golub_kahan(lambda v: v @ factor.T, lambda y: y @ factor, jnp.eye(3)[:1] + 1, max_vectors=3)
    >>> np.allclose(np.linalg.eigvalsh(last.tridiagonal), [1, 4, 9], atol=1e-4)
    True
    """
    check_probes("block_golub_kahan", probes, max_vectors)
    count = len(probes)
    floor, scale = FLOOR * float(jnp.finfo(probes.dtype).eps), 0.0
    images_basis, coupled = None, np.zeros((count, count))  # Y and M_k

    def step(basis: Float[Array, "m n"], newest: Float[Array, "S n"]) -> Step:
        nonlocal scale, images_basis, coupled
        rows = images(newest)
        # The largest image so far stands for |R|, by which every product is rounded.
        scale = max(scale, largest_norm("block_golub_kahan(images=...)", rows))
        if rows.shape[1] < count:
            raise ValueError(
                f"block_golub_kahan(probes=...) must have at most as many rows as R, {rows.shape[1]}; got {count}; use "
                "fewer probes"
            )
        images_basis = rows[:0] if images_basis is None else images_basis
        beside, lower = orthonormal_rows(rows, (images_basis,), floor * scale)
        images_basis = jnp.concatenate([images_basis, beside])
        own = np.asarray(lower, np.float64)  # N_k
        block = coupled @ coupled.T + own @ own.T
        returned = back(beside)
        scale = max(scale, largest_norm("block_golub_kahan(back=...)", returned))
        following, lower = orthonormal_rows(returned, (basis, newest), floor * scale)
        coupled = np.asarray(lower, np.float64).T  # M_{k+1}: what is left of Y_k R is M_{k+1}' Q_{k+1}
        return block, own @ coupled.T, following

    yield from grown(step, probes, max_vectors)
