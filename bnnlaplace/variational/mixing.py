"""The next sites from those of the last steps: Anderson's mixing.

The sites W are a fixed point of W -> E Lambda(f), where the averages are those of the posterior with the sites W. Where
training has saturated the softmax this map turns back: larger sites make a narrower posterior, whose outputs stay where
the curvature is small. So steps all the way to the averages go back and forth between two posteriors that are equally
bad, and the bound seems to have settled. The last steps show how the residual r = E Lambda(f) - W changes with W. To
first order it vanishes at

    W + s r - sum_i g_i (dW_i + s dr_i),    g = argmin |r - sum_i g_i dr_i|^2,

with the differences dW_i, dr_i of consecutive steps, and the share s of the residual that they do not explain. (D. G.
Anderson, "Iterative procedures for nonlinear integral equations", J. ACM 12, 1965.)
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from bnnlaplace.variational.sites import Sites

# How many differences there are at most.
DEPTH = 2
# Differences that others explain to this part count as explained.
RCOND = 1e-4

Batches = list[Float[np.ndarray, "..."]]


class Past(NamedTuple):
    """The sites of the last steps, of which each was accepted, and their residuals; the latest are last."""

    sites: tuple[Batches, ...] = ()
    residuals: tuple[Batches, ...] = ()
    depth: int = DEPTH

    @property
    def is_mixed(self) -> bool:
        """Whether the next step depends on more than one."""
        return len(self.sites) > 1

    def with_step(self, sites: Sites, proposed: Sites) -> "Past":
        """Add a step, and drop the oldest one if there are too many."""
        if sites.by_samples or self.depth == 0:  # samples have no differences: only their distribution counts
            return self
        if not proposed.are_finite():
            return self.forgotten()
        residual = [new - old for old, new in zip(sites.batches, proposed.batches, strict=True)]
        return self._replace(
            sites=(*self.sites[-self.depth :], sites.batches), residuals=(*self.residuals[-self.depth :], residual)
        )

    def forgotten(self) -> "Past":
        """Without any step: the next ones have other residuals, such as those of another prior."""
        return Past(depth=self.depth)

    def given_up(self) -> "Past":
        """Without any step, and none is to come."""
        return Past(depth=0)

    def next(self, sites: Sites, proposed: Sites, share: float) -> Sites:
        """The sites of the next step. The latest step is the one with `sites`. Without others it goes that share."""
        if not self.is_mixed:
            return sites.towards(proposed, share)
        mixed = [old + share * by for old, by in zip(self.sites[-1], self.residuals[-1], strict=True)]
        changes = _differences(self.sites), _differences(self.residuals)
        for factor, of_sites, of_residual in zip(_factors(self.residuals[-1], changes[1]), *changes, strict=True):
            pairs = zip(mixed, of_sites, of_residual, strict=True)
            mixed = [each - factor * (by + share * changed) for each, by, changed in pairs]
        return Sites(mixed, False, sites.turn + 1)


def _differences(steps: tuple[Batches, ...]) -> list[Batches]:
    return [[b - a for a, b in zip(old, new, strict=True)] for old, new in zip(steps, steps[1:], strict=False)]


def _factors(residual: Batches, changes: list[Batches]) -> Float[np.ndarray, " i"]:
    """Solve the least squares by their normal equations: the numbers of all examples stay in their batches."""
    matrix = np.array([[_inner(a, b) for b in changes] for a in changes])
    return np.linalg.pinv(matrix, rcond=RCOND**2, hermitian=True) @ np.array([_inner(a, residual) for a in changes])


def _inner(first: Batches, second: Batches) -> float:
    return sum(float(np.vdot(a.astype(np.float64), b.astype(np.float64))) for a, b in zip(first, second, strict=True))
