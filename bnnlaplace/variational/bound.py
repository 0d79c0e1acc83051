"""The evidence lower bound of a posterior, and how much of it is noise."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.curvature.kept import CurvatureAt
from bnnlaplace.curvature.microbatch import over_outputs
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.spec import output_shape
from bnnlaplace.prior import Prior
from bnnlaplace.structure import KroneckerStructure, Structure
from bnnlaplace.variational.draws import are_samples
from bnnlaplace.variational.expectations import Expectations
from bnnlaplace.variational.sites import Sites, at_sites


class Terms(NamedTuple):
    """The evidence lower bound and its parts, in nats.

    Attributes
    ----------
    elbo
        The bound.
    expected
        E log p(D | f).
    sem
        The standard error of that over the samples of the outputs.
    effective
        gamma = tr G (G + P0)^-1.
    by_probe
        Minus half of the log-determinant, by each probe of the structure.
    """

    elbo: float
    expected: float
    sem: float
    effective: float
    by_probe: Float[np.ndarray, " S"]

    def noise_beside(self, other: "Terms") -> float:
        """Return the standard error of the difference from another bound, over the probes. Zero without probes."""
        if len(self.by_probe) < 2 or len(self.by_probe) != len(other.by_probe):
            return 0.0
        return float((self.by_probe - other.by_probe).std(ddof=1)) / math.sqrt(len(self.by_probe))


OVERFLOWED = Terms(-math.inf, -math.inf, 0.0, math.nan, np.zeros(0))
"""The bound of a posterior that is not finite."""


class EffectiveParameters:
    """gamma = sum_n tr W_n C_n by the covariances C_n, where these are those of samples of the weights.

    To first order their error changes the expected log likelihood by -1/2 tr W_n of it, which gamma / 2 takes back. The
    structure knows gamma better by itself, but then that error would stay in the bound.
    """

    def __init__(
        self, model: Model, structure: Structure, sites: Sites | None, *, scale: float, microbatch: int
    ) -> None:
        num_outputs = math.prod(output_shape(model.head, model.data.first)[1:])
        # Of Kronecker factors the sum is not tr G (G + P0)^-1: they are not the curvature at the sites.
        has_sum = sites is not None and not isinstance(structure, KroneckerStructure)
        self.is_read = has_sum and are_samples(num_outputs)
        self._scale, self._sums = scale, []
        if self.is_read:
            there = at_sites(model, sites)
            self._at, self._likelihood = there.curvature_at(microbatch=microbatch), there.likelihood

    @property
    def total(self) -> float | None:
        """The sum over what has been read; None if nothing is."""
        return self._scale * math.fsum(self._sums) if self.is_read else None

    def read(self, roots: Float[Array, "B ... C K"]) -> None:
        """Add a batch."""
        traces = _traces(self._likelihood, self._at[len(self._sums)], roots)
        self._sums.append(float(np.asarray(traces, np.float64).sum()))


@jax.jit
def _traces(likelihood: Likelihood, at: CurvatureAt, roots: Float[Array, "B ... C K"]) -> Float[Array, " K"]:
    """w_n tr R_n' W_n R_n, summed over examples and positions, column by column of R."""

    def of_column(column: Float[Array, "B ... C"]) -> Float[Array, ""]:
        return jnp.sum(over_outputs(at.weights, column) * column * likelihood.hessian_mv(at.points, column))

    return jax.lax.map(of_column, jnp.moveaxis(roots, -1, 0))


def terms_of(
    averages: Sequence[Expectations],
    mean: Float[np.ndarray, " P"],
    prior: Prior,
    structure: Structure,
    gamma: float | None,
    *,
    scale: float,
) -> Terms:
    """Compute the bound with the divergence that the structure knows, unless gamma is given."""
    precision = float(prior.precision)
    expected = scale * math.fsum(each.log_likelihood.sum() for each in averages)
    forms = structure.log_determinant(precision)
    groups = np.zeros(mean.size, int)
    effective = float(structure.effective_parameters(precision, groups).mean()) if gamma is None else gamma
    deviation = mean - np.asarray(prior.mean, np.float64)
    quadratic = precision * prior.squared_norm(deviation)
    elbo = expected - 0.5 * (quadratic - effective + forms.mean())
    # The noise of covariances that probes estimate is not in it.
    sem = scale * math.sqrt(sum(each.squared_error for each in averages))
    return Terms(float(elbo), float(expected), sem, effective, -0.5 * forms) if math.isfinite(elbo) else OVERFLOWED
