"""Grow a block Krylov decomposition until the posterior has converged where it will be used."""

import warnings
from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array

from bnnlaplace import krylov, prior
from bnnlaplace.core.tree import number_type, size
from bnnlaplace.curvature import streamed
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.model.data import Data
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.structure.krylov import KrylovError, KrylovStructure


def fit_krylov(
    network: Network,
    likelihood: Likelihood,
    data: Data,
    scale: float,
    *,
    key: Array,
    log_joint: LogJoint,
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
    log_joint, squared_norm
        See `prior.optimum`: they place the maximum of the evidence.
    num_probes, max_vectors
        Size of a block, and of all blocks together.
    on_block
        Called after each block with (structure, error); for progress. Keeping the structures keeps their bases.

    Raises
    ------
    ValueError
        As `check_block` does.

    Notes
    -----
    Cost: at most `max_vectors` GGN products, S at a time, each S a pass over the data. Memory: the basis, m P numbers,
    and 2 m P while a block is appended to it. Warns where `max_vectors` is reached first.
    """
    dimension = size(network.params)
    check_block(num_probes, max_vectors, target_precision, dimension)
    probes = jax.random.normal(key, (min(num_probes, dimension), dimension), number_type(network.params))
    product = streamed.primal_product(network, likelihood, data, scale, microbatch=microbatch)
    for decomposition in krylov.block_lanczos(product, probes, max_vectors=max_vectors):
        structure = KrylovStructure.from_decomposition(decomposition, tolerance)
        target = target_precision
        if target is None:
            target = hardest_optimum(structure, log_joint, squared_norm)
        error = structure.error(target)
        if on_block is not None:
            on_block(structure, error)
        if structure.has_converged(error):
            return structure
    warnings.warn(f"{structure.reservation(target)}; raise max_vectors", stacklevel=4)
    return structure


def check_block(num_probes: int, max_vectors: int, target_precision: float | None, dimension: int) -> None:
    """Check the options of `fit_krylov` for a network of `dimension` weights.

    Raises
    ------
    ValueError
        If there are fewer than two probes or more than `max_vectors`, or `target_precision` is not positive.
    """
    if not isinstance(num_probes, (int, np.integer)) or num_probes < 2:
        raise ValueError(
            "fit(num_probes=...) must be an integer of at least 2, as their spread is the error of the evidence; got "
            f"{num_probes}"
        )
    if max_vectors < min(num_probes, dimension):
        raise ValueError(
            f"fit(max_vectors=...) must be at least num_probes, {num_probes}; got {max_vectors}; raise it, or lower "
            "num_probes"
        )
    if target_precision is not None:
        prior.check(target_precision, "fit(target_precision=...)")


def hardest_optimum(structure: KrylovStructure, log_joint: LogJoint, squared_norm: float) -> float:
    """The smaller of the maximisers of the upper and the lower bound on the evidence."""
    return min(
        prior.maximiser(log_determinant, log_joint, squared_norm)
        for log_determinant in prior.bracket(structure.log_determinant, structure.truncation)
    )
