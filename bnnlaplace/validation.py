"""The prior precision by validation data: the predictive as a function of it."""

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from bnnlaplace import calibration, link, prior
from bnnlaplace.likelihood import Likelihood, check_targets
from bnnlaplace.posterior import FunctionalPosterior, Posterior, functional_posteriors
from bnnlaplace.structure import SampleStructure


class ValidationCurve(NamedTuple):
    """The predictive on validation data as a function of the prior precision; arrays of shape (D,).

    Attributes
    ----------
    prior_precision
        The grid.
    negative_log_likelihood
        In nats per label, or per output where the targets are numbers.
    expected_calibration_error
        With equal-width bins; NaN where there are no classes.
    converged
        Whether the structure has converged there; NLL and ECE elsewhere are not those of the posterior.
    """

    prior_precision: Float[np.ndarray, " D"]
    negative_log_likelihood: Float[np.ndarray, " D"]
    expected_calibration_error: Float[np.ndarray, " D"]
    converged: Bool[np.ndarray, " D"]

    @property
    def best_precision(self) -> float:
        """The prior precision of the lowest NLL among those where the structure has converged.

        Raises
        ------
        ValueError
            If it has converged at none of them, or the NLL there is not a number.
        """
        if not self.converged.any():
            raise ValueError(
                "the decomposition must have converged at one prior precision of the grid at least; it has at none "
                f"from {self.prior_precision.min():g} to {self.prior_precision.max():g}; try larger ones, or fit with "
                "more max_vectors"
            )
        eligible = np.where(self.converged, self.negative_log_likelihood, np.nan)
        return float(self.prior_precision[prior.lowest(eligible, "the validation NLL")])


def validation_curve(
    posterior: Posterior,
    likelihood: Likelihood,
    inputs: PyTree[Float[Array, "N ..."]],
    targets: Array,
    precisions: Iterable[float],
    *,
    key: Array,
    num_samples: int,
    microbatch: int = 64,
) -> ValidationCurve:
    """NLL and ECE of the predictive at many prior precisions.

    Of class labels by Monte Carlo, probabilities averaged over samples; of soft targets the cross-entropy, and no ECE.
    Of a regression the Gaussian of each output is known: its variance is that of the linearised output and of the
    noise. Of any other likelihood the mean of p(y | f) over samples.

    Parameters
    ----------
    posterior, likelihood
        Of the weights, and what outputs mean.
    inputs, targets
        Validation data: a target for each output position.
    precisions
        The grid.
    key, num_samples
        Of the samples, as for `posterior.functional_posteriors`. The same at every prior precision, so that the curve
        is smooth.
    microbatch
        Inputs differentiated at a time; bounds memory.

    Raises
    ------
    ValueError
        If the grid is not positive, inputs or predictions not finite, or targets do not fit the outputs.

    Notes
    -----
    The network is differentiated once for the whole grid: see `posterior.functional_posteriors`.
    """
    grid = prior.checked_grid(precisions, "validation_curve(precisions=...)")
    posteriors = functional_posteriors(posterior, inputs, grid, key=key, num_samples=num_samples, microbatch=microbatch)
    score = _label_scores if likelihood.target_kind == "label" else _number_scores
    nll, ece = np.transpose([score(likelihood, found, targets) for found in posteriors])
    converged = np.ones(len(grid), bool)
    if isinstance(posterior.structure, SampleStructure):
        converged = np.array([posterior.structure.reservation(precision) is None for precision in grid])
    return ValidationCurve(grid, nll, ece, converged)


def _label_scores(
    likelihood: Likelihood, found: FunctionalPosterior, labels: Int[Array, "N ..."]
) -> tuple[float, float]:
    check_targets(likelihood, found.mean.shape, labels, "validation_curve(targets=...)")
    probs = np.asarray(link.monte_carlo(likelihood, found.mean, found.deviations), np.float64)
    if np.shape(labels) == probs.shape and np.issubdtype(np.asarray(labels).dtype, np.floating):  # soft targets
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(np.asarray(labels) > 0, labels * np.log(probs), 0.0)
        return -float(terms.sum(axis=-1).mean()), np.nan
    probs, labels = probs.reshape(-1, probs.shape[-1]), np.reshape(labels, -1)
    nll = calibration.negative_log_likelihood(probs, labels)
    return nll, calibration.expected_calibration_error(probs, labels)


def _number_scores(
    likelihood: Likelihood, found: FunctionalPosterior, targets: Float[Array, "N ... C"]
) -> tuple[float, float]:
    targets = jnp.asarray(targets)
    check_targets(likelihood, found.mean.shape, targets, "validation_curve(targets=...)")
    if likelihood.sigma_noise is not None:
        variance = jnp.diagonal(found.variance, axis1=-2, axis2=-1) + likelihood.sigma_noise**2
        log_prob = -0.5 * ((targets - found.mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance))
        return -float(log_prob.mean()), np.nan
    log_probs = likelihood.log_prob(found.mean + found.deviations, targets)
    mean = jax.nn.logsumexp(log_probs, axis=0) - np.log(len(log_probs))
    return -float(mean.mean()) / targets.shape[-1], np.nan
