"""Which weights share a prior precision that is to be chosen."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import size
from bnnlaplace.prior.gaussian import Groups, Precision, Prior, group_names, group_numbers


class Grouping(NamedTuple):
    """Which weights share a precision.

    Attributes
    ----------
    numbers
        For each weight the position of its group.
    names
        The names of the groups, for messages.
    as_given
        The function from one precision for each group to what `Laplace(prior_precision=...)` takes.
    """

    numbers: Int[np.ndarray, " P"]
    names: list[str]
    as_given: Callable[[Float[np.ndarray, " g"]], Precision]

    @classmethod
    def of(cls, prior_structure: str, params: PyTree, groups: Groups) -> "Grouping":
        """The groups of the weights `params` for "scalar", "layerwise" or "diag"."""
        if prior_structure == "scalar":
            return cls(np.zeros(size(params), int), ["all weights"], lambda precisions: float(precisions[0]))
        if prior_structure == "diag":
            return cls(np.arange(size(params)), [f"weight {number}" for number in range(size(params))], np.asarray)
        names = group_names(params, groups)
        by_name = lambda precisions: dict(zip(names, map(float, precisions), strict=True))  # noqa: E731
        return cls(group_numbers(params, groups), names, by_name)

    def precisions(self, prior: Prior) -> Float[np.ndarray, " g"]:
        """The geometric mean of the precisions of each group."""
        relative = np.broadcast_to(np.asarray(prior.relative, np.float64), self.numbers.shape)
        logs = np.bincount(self.numbers, weights=np.log(relative)) / np.bincount(self.numbers)
        return float(prior.precision) * np.exp(logs)

    def warn_of_bounds(self, what: str, precisions: Float[np.ndarray, " g"], at_bound: Bool[np.ndarray, " g"]) -> None:
        """Warn of groups whose precision `what`, such as the evidence, does not determine."""
        stuck = [f"{self.names[i]} at {precisions[i]:.3g}" for i in np.flatnonzero(at_bound)]
        if stuck:
            others = f" and {len(stuck) - 5} more" if len(stuck) > 5 else ""
            checks.warn(
                f"{what} does not determine the prior precision of {', '.join(stuck[:5])}{others}: it was stopped at "
                "an end of the search range; look for weights that are zero or that outputs do not depend on"
            )
