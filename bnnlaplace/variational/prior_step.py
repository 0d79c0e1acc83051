"""A step of the prior precision towards the maximum of the bound, at the present sites and mean.

While these stay, the bound depends on the prior as the evidence of a Laplace approximation does, so that the maximum
over one precision is a search on the decomposition at hand, and over several of them MacKay's fixed point is a step.

A Krylov decomposition of limited size has not converged at small precisions. There its numbers are not those of the
bound, and a search that went there would follow them. So no step goes below the precisions where it has converged.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, ArrayLike, Float

from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.prior import Prior, accelerated, fixed_point_step, maximiser, range_above
from bnnlaplace.prior.grouping import Grouping
from bnnlaplace.structure import SampleStructure, Structure

# Halvings of the interval, on a logarithmic scale, in which the smallest precision that converges is looked for.
_HALVINGS = 12


class Move(NamedTuple):
    """A step of the precisions.

    Attributes
    ----------
    before, proposed
        The precisions before the step, and those that the bound prefers at the present sites and mean.
    is_held
        Whether the decomposition has not converged at the proposed ones, so that the step ended above them.
    """

    before: Float[np.ndarray, " g"]
    proposed: Float[np.ndarray, " g"]
    is_held: bool


def prior_with(
    grouping: Grouping, precisions: Float[np.ndarray, " g"], mean: Float[ArrayLike, ""] | Float[Array, " P"], dtype: Any
) -> Prior:
    """The prior with one precision for each group."""
    if len(precisions) == 1:
        return Prior(float(precisions[0]), 1.0, mean)
    factor = float(np.exp(np.log(precisions)[grouping.numbers].mean()))
    return Prior(factor, np.asarray((precisions / factor)[grouping.numbers], dtype), mean)


def step(
    grouping: Grouping,
    prior: Prior,
    structure: Structure,
    mean: Float[np.ndarray, " P"],
    last: Move | None,
    max_vectors: int,
) -> tuple[Float[np.ndarray, " g"], Move]:
    """Return better precisions, and the move to them, which the next step takes as `last`.

    Parameters
    ----------
    grouping
        Which weights share a precision.
    prior, structure, mean
        Those of the posterior at hand; the structure is in the weights times sqrt(D).
    last
        What the last step returned; None at the first.
    max_vectors
        The most vectors that a Krylov decomposition may have.
    """
    limits = range_above(structure.resolution())
    deviation = mean - np.asarray(prior.mean, np.float64)
    squared = prior.squared_norm(deviation)
    overall = maximiser(structure.log_determinant, LogJoint(0.0), squared, search_range=limits)
    present = grouping.precisions(prior)
    now, proposed = present, present * overall / float(prior.precision)
    if len(present) > 1:
        now, effective = proposed, structure.effective_parameters(overall, grouping.numbers)
        proposed = fixed_point_step(effective, LogJoint(0.0), deviation**2, grouping.numbers, now).precisions
    # Sites and mean follow, so that the precisions go on in the same direction.
    after = accelerated(now, proposed, None if last is None else (last.before, last.proposed))
    least = present * _smallest_converged(structure, overall, max_vectors) / float(prior.precision)
    move = Move(now, proposed, bool((after < least).any()))
    return np.clip(np.maximum(after, least), *limits), move


def _smallest_converged(structure: Structure, wanted: float, max_vectors: int) -> float:
    """The smallest precision from `wanted` on at which the decomposition has converged; 0 if that does not bind.

    It does not if the decomposition is exact, or may still grow: the next one grows until it has converged.
    """
    if not isinstance(structure, SampleStructure) or structure.num_vectors + structure.num_probes <= max_vectors:
        return 0.0
    if structure.reservation(wanted) is None:
        return 0.0
    low, high = np.log(wanted), np.log(range_above(structure.resolution())[1])
    for _ in range(_HALVINGS):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if structure.reservation(np.exp(middle)) is None else (middle, high)
    return float(np.exp(high))
