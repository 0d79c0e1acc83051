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
        The standard error of that over the samples of the outputs, and of the weights where these give covariances.
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
    structure knows gamma better by itself, but then that error would stay in the bound. It does with Kronecker factors:
    they are not the curvature at the sites, and the sum is not tr G (G + P0)^-1.
    """

    def __init__(
        self, model: Model, structure: Structure, sites: Sites | None, *, scale: float, microbatch: int
    ) -> None:
        num_outputs = math.prod(output_shape(model.head, model.data.first)[1:])
        self.is_read = sites is not None and are_samples(num_outputs)
        self._has_sum = self.is_read and not isinstance(structure, KroneckerStructure)
        self._scale, self._traces = scale, []
        if self.is_read:
            there = at_sites(model, sites)
            self._at, self._likelihood = there.curvature_at(microbatch=microbatch), there.likelihood

    @property
    def total(self) -> float | None:
        """The sum over what has been read; None if nothing is, or if it would be another number."""
        return float(self._by_sample().sum()) if self._has_sum else None

    @property
    def sem(self) -> float:
        """The standard error of what the error of the covariances leaves in the bound."""
        if not self.is_read or self._has_sum:
            return 0.0
        by_sample = self._by_sample()
        return 0.5 * float(by_sample.std(ddof=1)) * math.sqrt(len(by_sample))

    def _by_sample(self) -> Float[np.ndarray, " K"]:
        return self._scale * np.sum(self._traces, axis=0)

    def read(self, roots: Float[Array, "B ... C K"]) -> None:
        """Add a batch."""
        traces = _traces(self._likelihood, self._at[len(self._traces)], roots)
        self._traces.append(np.asarray(traces, np.float64))


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
    gamma: EffectiveParameters,
    *,
    scale: float,
) -> Terms:
    """Compute the bound with the divergence that the structure knows, unless gamma was read."""
    precision = float(prior.precision)
    expected = scale * math.fsum(each.log_likelihood.sum() for each in averages)
    forms = structure.log_determinant(precision)
    groups = np.zeros(mean.size, int)
    effective = gamma.total
    if effective is None:
        effective = float(structure.effective_parameters(precision, groups).mean())
    deviation = mean - np.asarray(prior.mean, np.float64)
    quadratic = precision * prior.squared_norm(deviation)
    elbo = expected - 0.5 * (quadratic - effective + forms.mean())
    # The noise of covariances that probes estimate is not in it.
    sem = math.hypot(scale * math.sqrt(sum(each.squared_error for each in averages)), gamma.sem)
    return Terms(float(elbo), float(expected), sem, effective, -0.5 * forms) if math.isfinite(elbo) else OVERFLOWED
