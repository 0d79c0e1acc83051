"""A step of the prior precision towards the maximum of the bound.

Where mean and covariance maximise the bound at their prior, its derivative in the log precision of a group of weights
is that of the prior alone, (gamma - delta s) / 2, with the effective parameters gamma of the group and the squared norm
s of its mean. So the maximum is the fixed point of delta -> gamma / s (MacKay). But mean and covariance follow the
precision: where only the scale of the outputs counts, s falls as much as delta rises, and a step of the fixed point
goes a small part of the way. Hence the step is that of the secant method, and nats say whether it is worth it.

A Krylov decomposition of limited size has not converged at small precisions. There its numbers are not those of the
bound, and a search that went there would follow them. So no step goes below the precisions where it has converged.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, ArrayLike, Float

from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.prior import Prior, accelerated, fixed_point_step, range_above
from bnnlaplace.prior.grouping import Grouping
from bnnlaplace.structure import SampleStructure, Structure

# Halvings of the interval, on a logarithmic scale, in which the smallest precision that converges is looked for.
_HALVINGS = 12
# Where the steps ahead promise to raise the bound by less than this part of the tolerance of a fit, none is taken. The
# promise is that of a straight line between slopes, and the bound is not a parabola.
SHARE_OF_TOLERANCE = 0.2
# A precision is worth another step if the fixed point makes it smaller by more than this factor.
NEAR = 1.1
# The first step goes this many times as far as the fixed point does, and no further than by a factor of three; others
# are those of the secant, at most so many times that of the fixed point, and no further than by a factor of ten.
_FIRST, _MOST, _FIRST_LOG, _LONGEST_LOG = 10.0, 30.0, np.log(3), np.log(10)


class Move(NamedTuple):
    """A step of the precisions.

    Attributes
    ----------
    before, proposed, after
        The precisions before the step, what one step of the fixed point makes of them, and where the step goes.
    gain
        What the bound promises to gain by this step and those that would follow in its direction, in nats; inf if the
        decomposition has not converged before it.
    falls
        Whether a precision may be far above the best one, where the bound is flat.
    is_held
        Whether the decomposition has not converged where the step would go, so that it ends above that.
    """

    before: Float[np.ndarray, " g"]
    proposed: Float[np.ndarray, " g"]
    after: Float[np.ndarray, " g"]
    gain: float
    falls: bool = False
    is_held: bool = False

    def pays(self, tolerance: float) -> bool:
        """Whether to take the step, for a fit with this tolerance in nats."""
        return self.falls or self.gain > SHARE_OF_TOLERANCE * tolerance

    @property
    def factor(self) -> float:
        """The largest factor by which a precision changes."""
        return float(np.exp(np.abs(np.log(self.after / self.before)).max()))


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
    max_vectors: float,
) -> Move:
    """Return the step to better precisions.

    Parameters
    ----------
    grouping
        Which weights share a precision.
    prior, structure, mean
        Those of the posterior at hand; the structure is in the weights times sqrt(D).
    last
        The step that was taken before; None at the first.
    max_vectors
        The most vectors that a Krylov decomposition may have.
    """
    limits, precision = range_above(structure.resolution()), float(prior.precision)
    relative = np.broadcast_to(np.asarray(prior.relative, np.float64), mean.shape)
    squares = relative * (mean - np.asarray(prior.mean, np.float64)) ** 2
    present, gamma = grouping.precisions(prior), structure.effective_parameters(precision, grouping.numbers)
    # Ratios within a group stay as they are: its squares and its precision are relative to their geometric mean.
    inner = present / precision
    squares = squares / inner[grouping.numbers]
    proposed = fixed_point_step(
        gamma, LogJoint(0.0), squares, grouping.numbers, present, search_range=limits
    ).precisions
    target = _target(present, proposed, last)
    longest = _FIRST_LOG if last is None else _LONGEST_LOG
    after = present * np.exp(np.clip(np.log(target / present), -longest, longest))
    wanted = precision * float((after / present).min())
    least = present * _smallest_converged(structure, wanted, max_vectors) / precision
    held = np.clip(np.maximum(after, least), *limits)
    sums = np.bincount(grouping.numbers, weights=squares, minlength=len(present))
    gradient = 0.5 * (gamma.mean(axis=0) - present * sums)
    most = gamma.mean(axis=0) + (2 * gamma.std(axis=0, ddof=1) / np.sqrt(len(gamma)) if len(gamma) > 1 else 0.0)
    gain = 0.5 * float(gradient @ np.log(np.clip(np.maximum(target, least), *limits) / present))
    if (held > np.maximum(after, present)).any():
        gain = np.inf
    falls = (most < present * sums / NEAR) & (held < present / NEAR)
    return Move(present, proposed, held, gain, bool(falls.any()), bool((after < least).any()))


def _target(
    present: Float[np.ndarray, " g"], proposed: Float[np.ndarray, " g"], last: Move | None
) -> Float[np.ndarray, " g"]:
    """The precisions at which the fixed point would propose no further step."""
    if last is None:
        return present * (proposed / present) ** _FIRST
    return accelerated(present, proposed, (last.before, last.proposed), most=_MOST)


def _smallest_converged(structure: Structure, wanted: float, max_vectors: float) -> float:
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


def warn_of_bounds(grouping: Grouping, prior: Prior, structure: Structure) -> None:
    """Warn of groups whose precision the bound does not determine."""
    limits = np.log(range_above(structure.resolution()))
    precisions = grouping.precisions(prior)
    at_bound = np.abs(np.log(precisions)[:, None] - limits).min(axis=1) < 1e-2
    grouping.warn_of_bounds("the lower bound", precisions, at_bound)
