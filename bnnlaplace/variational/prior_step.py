"""A step of the prior precision towards the maximum of the bound, at the present sites and mean.

While these stay, the bound depends on the prior as the evidence of a Laplace approximation does, so that the maximum
over one precision is a search on the decomposition at hand, and over several of them MacKay's fixed point is a step.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bnnlaplace.core.tree import number_type, size
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.fitted import Settings
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Prior, accelerated, fixed_point_step, group_names, group_numbers, maximiser, range_above
from bnnlaplace.prior.gaussian import Precision
from bnnlaplace.structure import Structure

Move = tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]


class Grouping(NamedTuple):
    """Which weights share a precision.

    Attributes
    ----------
    numbers
        For each weight the number of its group, (P,).
    names
        The names of the groups, for messages.
    as_given
        From one precision for each group to what `Laplace(prior_precision=...)` takes.
    """

    numbers: Int[np.ndarray, " P"]
    names: list[str]
    as_given: Callable[[Float[np.ndarray, " g"]], Precision]

    @classmethod
    def of(cls, prior_structure: str, network: Network, settings: Settings) -> "Grouping":
        """The groups of "scalar", "layerwise" or "diag"."""
        params = network.params
        if prior_structure == "scalar":
            return cls(np.zeros(size(params), int), ["all weights"], lambda precisions: float(precisions[0]))
        if prior_structure == "diag":
            return cls(np.arange(size(params)), [f"weight {i}" for i in range(size(params))], np.asarray)
        names = group_names(params, settings.prior_groups)
        numbers = group_numbers(params, settings.prior_groups)
        return cls(numbers, names, lambda precisions: dict(zip(names, map(float, precisions), strict=True)))

    def precisions(self, prior: Prior) -> Float[np.ndarray, " g"]:
        """The geometric mean of the precisions of each group."""
        relative = np.broadcast_to(np.asarray(prior.relative, np.float64), self.numbers.shape)
        logs = np.bincount(self.numbers, weights=np.log(relative)) / np.bincount(self.numbers)
        return float(prior.precision) * np.exp(logs)

    def prior(self, precisions: Float[np.ndarray, " g"], mean: Any, params: Any) -> Prior:
        """The prior with these precisions."""
        if len(precisions) == 1:
            return Prior(float(precisions[0]), 1.0, mean)
        factor = float(np.exp(np.log(precisions)[self.numbers].mean()))
        relative = (precisions / factor)[self.numbers]
        return Prior(factor, np.asarray(relative, number_type(params)), mean)


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
    squared = float(deviation @ (np.asarray(prior.relative, np.float64) * deviation))
    overall = maximiser(structure.log_determinant, LogJoint(0.0), squared, search_range=limits)
    now = grouping.precisions(prior)
    proposed = now * overall / float(prior.precision)
    if len(now) > 1:
        now, effective = proposed, structure.effective_parameters(overall, grouping.numbers)
        proposed = fixed_point_step(effective, LogJoint(0.0), deviation**2, grouping.numbers, now).precisions
    # Sites and mean follow, so that the precisions go on in the same direction.
    return np.clip(accelerated(now, proposed, before), *limits), (now, proposed)
