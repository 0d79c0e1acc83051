"""A step of the prior precision towards the maximum of the bound, at the present sites and mean.

While these stay, the bound depends on the prior as the evidence of a Laplace approximation does, so that the maximum
over one precision is a search on the decomposition at hand, and over several of them MacKay's fixed point is a step.
"""

from typing import Any

import numpy as np
from jaxtyping import Array, ArrayLike, Float

from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.prior import Prior, accelerated, fixed_point_step, maximiser, range_above
from bnnlaplace.prior.grouping import Grouping
from bnnlaplace.structure import Structure

Move = tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]


def prior_with(
    grouping: Grouping, precisions: Float[np.ndarray, " g"], mean: Float[ArrayLike, ""] | Float[Array, " P"], dtype: Any
) -> Prior:
    """The prior with one precision for each group."""
    if len(precisions) == 1:
        return Prior(float(precisions[0]), 1.0, mean)
    factor = float(np.exp(np.log(precisions)[grouping.numbers].mean()))
    return Prior(factor, np.asarray((precisions / factor)[grouping.numbers], dtype), mean)


def step(
    grouping: Grouping, prior: Prior, structure: Structure, mean: Float[np.ndarray, " P"], before: Move | None
) -> tuple[Float[np.ndarray, " g"], Move]:
    """Return better precisions, and the move to them, which the next step takes as `before`.

    Parameters
    ----------
    grouping
        Which weights share a precision.
    prior, structure, mean
        Those of the posterior at hand; the structure is in the weights times sqrt(D).
    before
        What the last step returned; None at the first.
    """
    limits = range_above(structure.resolution())
    deviation = mean - np.asarray(prior.mean, np.float64)
    squared = prior.squared_norm(deviation)
    overall = maximiser(structure.log_determinant, LogJoint(0.0), squared, search_range=limits)
    now = grouping.precisions(prior)
    proposed = now * overall / float(prior.precision)
    if len(now) > 1:
        now, effective = proposed, structure.effective_parameters(overall, grouping.numbers)
        proposed = fixed_point_step(effective, LogJoint(0.0), deviation**2, grouping.numbers, now).precisions
    # Sites and mean follow, so that the precisions go on in the same direction.
    return np.clip(accelerated(now, proposed, before), *limits), (now, proposed)
