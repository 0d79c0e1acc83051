"""Fit a structure to a network and data: curvature in, the posterior's answers out."""

import warnings
from collections.abc import Callable
from functools import partial

import jax
from jaxtyping import Array, Float

from bnnlaplace import krylov, prior
from bnnlaplace.curvature import dense, diagonal, ggn
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.structure.dense import DenseStructure
from bnnlaplace.structure.diagonal import DiagonalStructure
from bnnlaplace.structure.krylov import KrylovError, KrylovStructure
from bnnlaplace.tree import ravel, size


@partial(jax.jit, static_argnames="microbatch")
def fit_diagonal(
    network: Network, likelihood: Likelihood, inputs: Float[Array, "N ..."], scale: float, *, microbatch: int
) -> DiagonalStructure:
    """The exact diagonal of the GGN."""
    # One gradient per example is alive at a time: a quarter of the images of other passes keeps memory level.
    count = max(1, microbatch // 4)
    return DiagonalStructure(
        diagonal.ggn_diagonal(network, likelihood, network.params, inputs, scale=scale, microbatch=count)
    )


@jax.jit
def fit_dense(network: Network, likelihood: Likelihood, inputs: Float[Array, "N ..."], scale: float) -> DenseStructure:
    """The eigendecomposition of the whole GGN: P^2 numbers in memory, P^3 work."""
    return DenseStructure.fit(dense.ggn(network, likelihood, network.params, inputs, scale=scale))


@partial(jax.jit, static_argnames="microbatch")
def block_product(
    network: Network,
    likelihood: Likelihood,
    inputs: Float[Array, "N ..."],
    scale: float,
    vectors: Float[Array, "S P"],
    *,
    microbatch: int,
) -> Float[Array, "S P"]:
    """V G for a block of rows, compiled once per shape; see `curvature.ggn.block_product`."""
    return ggn.block_product(network, likelihood, network.params, inputs, scale=scale, microbatch=microbatch)(vectors)


def fit_krylov(
    network: Network,
    likelihood: Likelihood,
    inputs: Float[Array, "N ..."],
    scale: float,
    *,
    key: Array,
    log_likelihood: float,
    squared_norm: float,
    num_probes: int,
    max_vectors: int,
    tolerance: float,
    microbatch: int,
    target_precision: float | None = None,
    on_block: Callable[[KrylovStructure, KrylovError], None] | None = None,
) -> KrylovStructure:
    """Grow a block Krylov decomposition until the posterior has converged where it will be used.

    That is at `target_precision`, by default where the evidence has its maximum. While the recurrence is short its
    evidence is too low at small precisions, so that its maximiser is too large: both ends of the bracket, Gauss and
    Gauss-Radau, are maximised and the smaller precision, the harder one, is taken. Converged means: the bound on the
    relative error of a sample is below `tolerance`, and truncation moves the log-determinant by less than its standard
    error or 0.1 nat.

    Parameters
    ----------
    key
        Of the normal probes.
    log_likelihood, squared_norm
        sum_n log p(y_n | f_n) and |theta - mu|^2, which place the maximum of the evidence.
    num_probes, max_vectors
        Size of a block, and of all blocks together.
    on_block
        Called after each block with (structure, error); for progress. Keeping the structures keeps their bases.

    Raises
    ------
    ValueError
        If there are fewer than two probes or more than `max_vectors`, or `target_precision` is not positive.

    Notes
    -----
    Cost: at most `max_vectors` GGN products, S at a time. Memory: the basis, m P numbers, and 2 m P while a block is
    appended to it. Warns where `max_vectors` is reached first.
    """
    dimension = size(network.params)
    if num_probes < 2:
        raise ValueError(
            f"fit(num_probes=...) must be at least 2, as their spread is the error of the evidence; got {num_probes}"
        )
    probes = jax.random.normal(key, (min(num_probes, dimension), dimension), ravel(network.params).dtype)
    if target_precision is not None:
        prior.check(target_precision, "fit(target_precision=...)")
    product = partial(block_product, network, likelihood, inputs, scale, microbatch=microbatch)
    for decomposition in krylov.block_lanczos(product, probes, max_vectors=max_vectors):
        structure = KrylovStructure.from_decomposition(decomposition, tolerance)
        target = target_precision
        if target is None:
            target = hardest_optimum(structure, log_likelihood, squared_norm)
        error = structure.error(target)
        if on_block is not None:
            on_block(structure, error)
        if structure.has_converged(error):
            return structure
    warnings.warn(f"{structure.reservation(target)}; raise max_vectors", stacklevel=3)
    return structure


def hardest_optimum(structure: KrylovStructure, log_likelihood: float, squared_norm: float) -> float:
    """The smaller of the maximisers of the upper and the lower bound on the evidence."""
    return min(
        prior.maximiser(log_determinant, log_likelihood, squared_norm)
        for log_determinant in prior.bracket(structure.log_determinant, structure.truncation)
    )
