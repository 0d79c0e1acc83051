"""The prior precision by validation data: the predictive as a function of it."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from bnnlaplace import prior
from bnnlaplace.calibration import metrics as calibration
from bnnlaplace.core.tree import examples
from bnnlaplace.model.batched import check_microbatch, outputs
from bnnlaplace.model.likelihood import Likelihood, check_targets
from bnnlaplace.model.spec import output_shape
from bnnlaplace.predictive import link
from bnnlaplace.predictive.functional import FunctionalPosterior, Posterior, functional_posteriors, functional_variances
from bnnlaplace.structure import SampleStructure

# Numbers in the covariances and samples of a part of the validation data, where that is not less than a microbatch.
MOST_NUMBERS = 2**24


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


def needs_samples(likelihood: Likelihood) -> bool:
    """Whether the predictive is an average over samples; of a regression it is a Gaussian.

    Parameters
    ----------
    likelihood
        p(y | f).
    """
    return likelihood.sigma_noise is None


def validation_curve(
    posterior: Posterior,
    likelihood: Likelihood,
    batches: Iterable[tuple[PyTree[Float[Array, "B ..."]], Array]],
    precisions: Iterable[float],
    *,
    key: Array | None = None,
    num_samples: int = 32,
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
    batches
        Validation data: inputs and a target for each output position, read once.
    precisions
        The grid.
    key, num_samples
        Of the samples, as for `posterior.functional_posteriors`, where there are any. The same at every prior
        precision, so that the curve is smooth.
    microbatch
        Inputs differentiated at a time; bounds memory.

    Raises
    ------
    ValueError
        If the grid is not positive, there are no data, inputs or predictions are not finite, or targets do not fit the
        outputs.

    Notes
    -----
    The network is differentiated once for the whole grid: see `posterior.functional_posteriors`. Memory: covariances
    and samples of a microbatch of inputs at all precisions, or of as many inputs as have few of them.
    """
    grid = prior.checked_grid(precisions, "validation_curve(precisions=...)")
    check_microbatch(microbatch)
    options = {"key": key, "num_samples": num_samples, "microbatch": microbatch}
    sizes = len(grid), num_samples, microbatch
    sums = [
        _scores(posterior, likelihood, inputs, targets, grid, part, **options)
        for part, (inputs, targets) in enumerate(_parts(posterior, likelihood, batches, *sizes))
    ]
    if not sums:
        raise ValueError("validation data must hold at least one example; got none; an iterator may be used up already")
    total, count, *gaps = np.sum(sums, axis=0).T
    converged = np.ones(len(grid), bool)
    if isinstance(posterior.structure, SampleStructure):
        converged = np.array([posterior.structure.reservation(precision) is None for precision in grid])
    return ValidationCurve(grid, total / count, np.abs(gaps).sum(axis=0) / count, converged)


def _parts(
    posterior: Posterior,
    likelihood: Likelihood,
    batches: Iterable[tuple[PyTree[Float[Array, "B ..."]], Array]],
    num_precisions: int,
    num_samples: int,
    microbatch: int,
) -> Iterator[tuple[PyTree[Float[Array, "b ..."]], Array]]:
    """The data in parts, each a number of microbatches, after a check of the targets of each batch."""
    for inputs, targets in batches:
        shape = output_shape(posterior.network, inputs)
        check_targets(likelihood, shape, targets, "validation_curve(targets=...)")
        of_input = math.prod(shape[1:]) * (num_precisions * shape[-1] + num_samples)
        size = microbatch * max(1, MOST_NUMBERS // (microbatch * of_input))
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            yield examples(inputs, part), targets[part]


def _scores(
    posterior: Posterior,
    likelihood: Likelihood,
    inputs: PyTree[Float[Array, "b ..."]],
    targets: Array,
    grid: Float[np.ndarray, " D"],
    part: int,
    *,
    key: Array | None,
    num_samples: int,
    microbatch: int,
) -> Float[np.ndarray, "D k"]:
    """At each precision the sum of the NLL, the number of its terms, and the gaps of each bin of the ECE."""
    posterior, inputs = posterior.at_features(inputs, microbatch=microbatch)
    if not needs_samples(likelihood):
        mean = outputs(posterior.network, inputs, microbatch=microbatch)
        variances = functional_variances(posterior, inputs, grid, microbatch=microbatch, marginal=True)
        return np.array([_gaussian_score(likelihood, mean, variance, targets) for variance in variances])
    if part and not isinstance(posterior.structure, SampleStructure):  # the samples of one are of all outputs together
        key = jax.random.fold_in(key, part)
    options = {"key": key, "num_samples": num_samples, "microbatch": microbatch}
    found = functional_posteriors(posterior, inputs, grid, **options)
    score = _label_score if likelihood.target_kind == "label" else _number_score
    return np.array([score(likelihood, at_precision, targets) for at_precision in found])


def _label_score(likelihood: Likelihood, found: FunctionalPosterior, labels: Int[Array, "b ..."]) -> list[float]:
    probs = np.asarray(link.monte_carlo(likelihood, found.mean, found.deviations), np.float64)
    if np.shape(labels) == probs.shape and np.issubdtype(np.asarray(labels).dtype, np.floating):  # soft targets
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(np.asarray(labels) > 0, labels * np.log(probs), 0.0)
        return [-terms.sum(), terms[..., 0].size, np.nan]
    probs, labels = probs.reshape(-1, probs.shape[-1]), np.reshape(labels, -1)
    total = len(labels) * calibration.negative_log_likelihood(probs, labels)
    return [total, len(labels), *calibration.calibration_gaps(probs, labels)]


def _gaussian_score(
    likelihood: Likelihood, mean: Float[Array, "b ... C"], variance: Float[Array, "b ... C"], targets: Array
) -> list[float]:
    variance = variance + likelihood.sigma_noise**2
    log_prob = -0.5 * ((jnp.asarray(targets) - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance))
    return [-float(log_prob.sum()), log_prob.size, np.nan]


def _number_score(likelihood: Likelihood, found: FunctionalPosterior, targets: Float[Array, "b ... C"]) -> list[float]:
    log_probs = likelihood.log_prob(found.mean + found.deviations, jnp.asarray(targets))
    mean = jax.nn.logsumexp(log_probs, axis=0) - np.log(len(log_probs))
    return [-float(mean.sum()), math.prod(jnp.shape(targets)), np.nan]
