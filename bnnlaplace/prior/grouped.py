"""Choose the prior precisions of groups of weights by the evidence.

Let M = P0^-1/2 G P0^-1/2, gamma_g = tr_g M (I + M)^-1 and s_g = |theta - mu|_g^2. The evidence has the slope

    d log p(D) / d log delta_g = (gamma_g - w delta_g s_g) / 2.

The weight w is 1. If the noise variance is at its best factor s, it is 1 / s (see `bnnlaplace.evidence.log_joint`). A
maximum is a fixed point of delta_g = gamma_g / (w s_g): the number of weights that the data determine over their
squared size (MacKay 1992).
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy  # its parts are imported at their first use, which takes half a second
from jaxtyping import Bool, Float, Int

from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.prior.scalar import SEARCH_RANGE
from bnnlaplace.structure.protocol import Structure


class GroupedOptimum(NamedTuple):
    """Prior precisions of groups: the maximum of the evidence, or the next step of the fixed point towards it.

    Attributes
    ----------
    precisions
        delta, one number for each group, shape (g,).
    at_bound
        Marks the groups whose precision is at an end of the search range. The evidence does not determine these: all
        weights of the group are zero, for instance, or its curvature is.
    largest_step
        The largest change of a log delta_g that the fixed point asks for; 0 at the maximum.
    step_error
        Two standard errors of that change; 0 if the curvature is exact.
    """

    precisions: Float[np.ndarray, " g"]
    at_bound: Bool[np.ndarray, " g"]
    largest_step: float
    step_error: float


def grouped_optimum(
    structure: Structure,
    log_joint: LogJoint,
    squares: Float[np.ndarray, " P"],
    groups: Int[np.ndarray, " P"],
    start: Float[np.ndarray, " g"],
    *,
    search_range: tuple[float, float] = SEARCH_RANGE,
) -> GroupedOptimum:
    """Maximise the evidence over one precision for each group, for a structure that can be whitened by any D.

    L-BFGS in log delta, with the slope above, finds a local maximum.

    Parameters
    ----------
    structure
        The curvature G itself, not whitened.
    log_joint
        The function from q = (theta - mu)' P0 (theta - mu) to the other terms of the evidence.
    squares
        (theta - mu)^2, one number for each weight.
    groups
        The number of each weight's group.
    start
        The precisions to start from.
    search_range
        The smallest and the largest delta.
    """
    sums = np.bincount(groups, weights=squares, minlength=len(start))

    def negative(log_delta: Float[np.ndarray, " g"]) -> tuple[float, Float[np.ndarray, " g"]]:
        delta = np.exp(log_delta)
        whitened = structure.whitened(jnp.asarray(delta[groups]))
        q = float(delta @ sums)
        # The trace comes first, because it needs a whole inverse. A structure may remember that for the determinant,
        # which needs less.
        effective = whitened.effective_parameters(1.0, groups).mean(axis=0)
        value = log_joint(q) - 0.5 * float(whitened.log_determinant(1.0).mean())
        slope = 0.5 * effective + log_joint.slope(q) * delta * sums
        return -value, -slope

    bounds = np.log(search_range)
    inside = np.clip(np.log(start), *bounds)
    options = {"maxiter": 200, "ftol": 1e-12, "gtol": 1e-6}
    optimum = scipy.optimize.minimize(
        negative, inside, jac=True, method="L-BFGS-B", bounds=[tuple(bounds)] * len(start), options=options
    )
    at_bound = np.abs(optimum.x[:, None] - bounds).min(axis=1) < 1e-3
    return GroupedOptimum(np.exp(optimum.x), at_bound, 0.0, 0.0)


def accelerated(
    precisions: Float[np.ndarray, " g"],
    proposed: Float[np.ndarray, " g"],
    before: tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]] | None,
    *,
    most: float = 4.0,
) -> Float[np.ndarray, " g"]:
    """Extrapolate the fixed point from its proposals at `precisions` and at the point `before`.

    The fixed point contracts slowly for a group that the data determine only in part. The ratio of its last two moves
    in log delta is the rate r, and the limit lies (1 - r)^-1 times as far away as the next move. This is Aitken's
    extrapolation, here by at most a factor of `most`.

    Parameters
    ----------
    precisions, proposed
        The present delta, and the delta that one step of the fixed point makes of it.
    before
        The same two of the step before; None at the first step.
    most
        How many times as far as the proposal a step goes at most.
    """
    if before is None:
        return proposed
    here, there = np.log(precisions), np.log(proposed)
    change = here - np.log(before[0])
    # A group that hardly moved has no rate that rounding would not spoil: the proposal is taken as it is.
    rate = np.divide(there - np.log(before[1]), change, out=np.zeros_like(change), where=np.abs(change) > 1e-3)
    return np.exp(here + (there - here) / (1 - np.clip(rate, -0.5, 1 - 1 / most)))


def fixed_point_step(
    effective_parameters: Float[np.ndarray, "S g"],
    log_joint: LogJoint,
    squares: Float[np.ndarray, " P"],
    groups: Int[np.ndarray, " P"],
    precisions: Float[np.ndarray, " g"],
    *,
    search_range: tuple[float, float] = SEARCH_RANGE,
) -> GroupedOptimum:
    """Take one step delta_g = gamma_g / (w s_g), for a structure that has to be fitted again after it.

    Parameters
    ----------
    effective_parameters
        The estimate of gamma by each probe, at `precisions`; see `Structure.effective_parameters`.
    log_joint, squares, groups, search_range
        As for `grouped_optimum`.
    precisions
        The precisions at which `effective_parameters` was computed.
    """
    sums = np.bincount(groups, weights=squares, minlength=len(precisions))
    # `slope` is -1 / (2 s), so this is the w of the formula.
    weight = -2 * log_joint.slope(float(precisions @ sums))
    gamma = effective_parameters.mean(axis=0)
    tiny = np.finfo(np.float64).tiny
    proposed = np.clip(np.maximum(gamma, tiny) / np.maximum(weight * sums, tiny), *search_range)
    steps = np.abs(np.log(proposed / precisions))
    largest = int(steps.argmax())
    count = len(effective_parameters)
    sem = effective_parameters[:, largest].std(ddof=1) / np.sqrt(count) if count > 1 else 0.0
    bounds = np.log(search_range)
    at_bound = np.abs(np.log(proposed)[:, None] - bounds).min(axis=1) < 1e-3
    # The step is log gamma plus what is known exactly. So its error is the relative error of gamma.
    return GroupedOptimum(proposed, at_bound, float(steps[largest]), float(2 * sem / max(gamma[largest], tiny)))
