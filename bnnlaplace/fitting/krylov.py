"""Grow a block Krylov decomposition until the posterior has converged where it will be used."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array

from bnnlaplace import krylov
from bnnlaplace.core import checks
from bnnlaplace.core.tree import number_type, size
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.fitting.prepare import Model, rounding_of
from bnnlaplace.prior import bracket, maximiser, range_above
from bnnlaplace.structure import KrylovError, KrylovStructure
from bnnlaplace.structure.finite import not_finite


@dataclass(frozen=True)
class KrylovOptions:
    """The options of `Laplace.fit` that are about the decomposition. Meanings and defaults stand there."""

    key: Array | None
    num_probes: int
    max_vectors: int
    tolerance: float
    target_precision: float | None
    on_block: Callable[[KrylovStructure, KrylovError], None] | None

    def check_types(self) -> None:
        """Raise ValueError if an option is wrong for any structure."""
        is_number = isinstance(self.tolerance, (int, float, np.number)) and not isinstance(self.tolerance, bool)
        if not (is_number and self.tolerance > 0):  # infinity asks for one block alone
            raise ValueError(f"fit(tolerance=...) must be positive; got {self.tolerance!r:.80}; try 0.05")
        if self.on_block is not None and not callable(self.on_block):
            raise ValueError(
                f"fit(on_block=...) must be a function of (structure, error); got {self.on_block!r:.80}; try print"
            )

    def check(self, dimension: int) -> None:
        """Raise ValueError if the options do not suit a network of `dimension` weights."""
        checks.key(self.key, "fit(key=...), which seeds the probes of 'lanczos',")
        checks.count(
            self.num_probes,
            "fit(num_probes=...)",
            least=2,
            advice="the spread of the probes is the error of the evidence; try 32",
        )
        if self.max_vectors < min(self.num_probes, dimension):
            raise ValueError(
                f"fit(max_vectors=...) must be at least num_probes, {self.num_probes}; got {self.max_vectors}; raise "
                "it, or lower num_probes"
            )
        if self.target_precision is not None:
            checks.positive(self.target_precision, "fit(target_precision=...)")


def fit_krylov(
    model: Model,
    scale: float,
    options: KrylovOptions,
    evidence: tuple[LogJoint, float] | None,
    *,
    microbatch: int,
) -> KrylovStructure:
    """Grow the decomposition of a whitened model's GGN until it has converged, or `max_vectors` is reached.

    It has to converge at `target_precision`, by default at the maximum of the evidence. That is placed by `evidence`,
    the log joint and the squared distance of the weights to the prior mean. Converged means two things: the bound on
    the relative error of a posterior sample is below `tolerance`, and truncation moves the log-determinant by less than
    its standard error or 0.1 nat.

    Cost: at most `max_vectors` GGN products, as many at a time as there are probes. Each block is a pass over the data,
    or over the rows of the Jacobian that the model keeps. Memory: the basis, m P numbers, and 2 m P while a block is
    appended to it.
    """
    dimension = size(model.head.params)
    options.check(dimension)
    shape = (min(options.num_probes, dimension), dimension)
    probes = jax.random.normal(options.key, shape, number_type(model.head.params))
    factors = model.ggn_factors(scale, microbatch=microbatch)
    if factors is None:
        product = model.ggn_product(scale, microbatch=microbatch)
        decompositions = krylov.block_lanczos(product, probes, max_vectors=options.max_vectors)
    else:
        decompositions = krylov.block_golub_kahan(*factors, probes, max_vectors=options.max_vectors)
    how = options.tolerance, rounding_of(model)
    for decomposition in _within_range(decompositions, probes.dtype):
        structure = KrylovStructure.from_decomposition(decomposition, *how, of_factors=factors is not None)
        target = options.target_precision
        if target is None:
            target = _hardest_optimum(structure, *evidence)
        error = structure.error(target)
        if options.on_block is not None:
            options.on_block(structure, error)
        if structure.has_converged(error):
            return structure
    checks.warn(f"{structure.reservation(target)}; raise max_vectors")
    return structure


def _within_range(
    decompositions: Iterator[krylov.BlockDecomposition], dtype: np.dtype
) -> Iterator[krylov.BlockDecomposition]:
    """Pass decompositions on; ValueError if a product, or its norm, leaves the range of the type."""
    try:
        yield from decompositions
    except FloatingPointError:
        raise not_finite(dtype) from None


def _hardest_optimum(structure: KrylovStructure, log_joint: LogJoint, squared_norm: float) -> float:
    """The smaller of the maximisers of the two bounds on the evidence.

    The evidence of a short recurrence is too low at small precisions, so its maximiser is too large. A small precision
    is harder to converge at than a large one. So the smaller maximiser is the safe target.
    """
    limits = range_above(structure.resolution())
    return min(
        maximiser(log_determinant, log_joint, squared_norm, search_range=limits)
        for log_determinant in bracket(structure.log_determinant, structure.truncation)
    )
