"""Score the predictive on validation data, as a function of the prior precision."""

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num, PyTree, Shaped

from bnnlaplace.calibration.metrics import calibration_gaps, negative_log_likelihood
from bnnlaplace.core import checks
from bnnlaplace.core.tree import examples
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.batched import check_microbatch, outputs
from bnnlaplace.model.data import PairOrBatches, checked_pairs
from bnnlaplace.model.likelihood import Likelihood, check_targets
from bnnlaplace.model.spec import output_shape
from bnnlaplace.predictive import link
from bnnlaplace.predictive.functional import FunctionalPosterior, functional_posteriors, functional_variances
from bnnlaplace.prior.scalar import checked_grid, lowest
from bnnlaplace.structure import SampleStructure

# How many numbers the covariances and samples of one slice of the validation data hold. A slice has at least the inputs
# of a microbatch, even if these need more.
MOST_NUMBERS = 2**24

# Prior precisions that `optimize_prior_precision("gridsearch")` tries by default.
DEFAULT_GRID = np.geomspace(1e-2, 1e4, 25)


class ValidationCurve(NamedTuple):
    """The scores of the predictive on validation data at D prior precisions; arrays of shape (D,).

    Attributes
    ----------
    prior_precision
        The grid.
    negative_log_likelihood
        In nats per label, or per output if the targets are numbers.
    expected_calibration_error
        With bins of equal width. NaN if the targets are not labels of classes.
    converged
        Whether the structure has converged at each prior precision. Elsewhere NLL and ECE are not those of the
        posterior.
    """

    prior_precision: Float[np.ndarray, " D"]
    negative_log_likelihood: Float[np.ndarray, " D"]
    expected_calibration_error: Float[np.ndarray, " D"]
    converged: Bool[np.ndarray, " D"]

    @property
    def best_precision(self) -> float:
        """The prior precision with the lowest NLL among those where the structure has converged.

        Raises
        ------
        ValueError
            If the structure has converged at none of them, or the NLL at all of those is not a number.
        """
        if not self.converged.any():
            raise ValueError(
                "the decomposition must have converged at one prior precision of the grid at least; it has at none "
                f"from {self.prior_precision.min():g} to {self.prior_precision.max():g}; try larger ones, or fit with "
                "more max_vectors"
            )
        eligible = np.where(self.converged, self.negative_log_likelihood, np.nan)
        return float(self.prior_precision[lowest(eligible, "the validation NLL")])


def needs_samples(likelihood: Likelihood) -> bool:
    """Whether the predictive is an average over samples. For a regression it is a Gaussian instead."""
    return likelihood.sigma_noise is None


def validation_curve(
    fitted: Fitted,
    data: PairOrBatches,
    precisions: Iterable[float] | None,
    *,
    key: Array | None = None,
    num_samples: int | None = None,
    microbatch: int = 64,
) -> ValidationCurve:
    """Compute NLL and ECE of the predictive at many prior precisions.

    Class labels are scored by Monte Carlo, with probabilities averaged over samples. Soft targets are scored by their
    cross-entropy, without an ECE. The predictive of a regression is a Gaussian for each output: its variance is the
    variance of the linearised output plus that of the noise. Any other likelihood is scored by the mean of p(y | f)
    over samples.

    Parameters
    ----------
    fitted
        The posterior of the weights. Its own prior gives the ratios of the precisions.
    data
        Validation data: (x, y), or batches of such pairs, read once.
    precisions
        The grid. None stands for 25 values from 0.01 to 10,000.
    key, num_samples
        The random key and the number of the samples, which are the same at every prior precision, so that the curve is
        smooth. By default 32 samples, or fewer if a `SampleStructure` has fewer. A regression needs neither.
    microbatch
        Inputs differentiated at a time; bounds memory.

    Raises
    ------
    ValueError
        If the grid is not positive, there are no data, inputs or predictions are not finite, targets do not fit the
        outputs, or the key is missing although samples are needed.

    Notes
    -----
    The network is differentiated once for the whole grid; see `functional_posteriors`. Memory: covariances and samples
    at all precisions, for the inputs of a microbatch or for more inputs if these numbers are few.
    """
    if needs_samples(fitted.likelihood):
        checks.key(key, "validation_curve(key=...)")
    if num_samples is None:
        num_samples = min(32, fitted.structure.num_probes) if isinstance(fitted.structure, SampleStructure) else 32
    checks.count(num_samples, "validation_curve(num_samples=...)", advice="try 32")
    batches = checked_pairs(fitted.network, data)
    grid = checked_grid(DEFAULT_GRID if precisions is None else precisions, "validation_curve(precisions=...)")
    check_microbatch(microbatch)
    options = {"key": key, "num_samples": num_samples, "microbatch": microbatch}
    sums = [
        _scores(fitted, inputs, targets, grid, number, **options)
        for number, (inputs, targets) in enumerate(_slices(fitted, batches, len(grid), num_samples, microbatch))
    ]
    if not sums:
        raise ValueError("validation data must hold at least one example; got none; an iterator may be used up already")
    # The gaps of the bins keep their signs until all slices are summed: the ECE is the sum of their absolute values.
    total, count, *gaps = np.sum(sums, axis=0).T
    converged = np.ones(len(grid), bool)
    if isinstance(fitted.structure, SampleStructure):
        converged = np.array([fitted.structure.reservation(precision) is None for precision in grid])
    return ValidationCurve(grid, total / count, np.abs(gaps).sum(axis=0) / count, converged)


def _slices(
    fitted: Fitted,
    batches: Iterable[tuple[Inputs, AnyArray]],
    num_precisions: int,
    num_samples: int,
    microbatch: int,
) -> Iterator[tuple[PyTree[Shaped[AnyArray, "b ..."]], AnyArray]]:
    """Yield the data in slices of one or more microbatches, after a check of the targets of each batch."""
    for inputs, targets in batches:
        shape = output_shape(fitted.network, inputs)
        check_targets(fitted.likelihood, shape, targets, "validation_curve(targets=...)")
        numbers_of_input = math.prod(shape[1:]) * (num_precisions * shape[-1] + num_samples)
        size = microbatch * max(1, MOST_NUMBERS // (microbatch * numbers_of_input))
        for start in range(0, len(targets), size):
            window = slice(start, start + size)
            yield examples(inputs, window), targets[window]


def _scores(
    fitted: Fitted,
    inputs: PyTree[Shaped[AnyArray, "b ..."]],
    targets: Shaped[AnyArray, "..."],
    grid: Float[np.ndarray, " D"],
    number: int,
    *,
    key: Array | None,
    num_samples: int,
    microbatch: int,
) -> Float[np.ndarray, "D k"]:
    """Score one slice: for each precision the sum of the NLL, the number of its terms, and the gap of each ECE bin.

    `number` is the position of the slice among all slices.
    """
    likelihood = fitted.likelihood
    fitted, inputs = fitted.at_features(inputs, microbatch=microbatch)
    if not needs_samples(likelihood):
        mean = outputs(fitted.network, inputs, microbatch=microbatch)
        variances = functional_variances(fitted, inputs, grid, microbatch=microbatch, marginal=True)
        return np.array([_gaussian_score(likelihood, mean, variance, targets) for variance in variances])
    # A sample of a `SampleStructure` is a function, which must be the same one in all slices. Samples from covariances
    # are drawn at each input, so every slice gets noise of its own.
    if number and not isinstance(fitted.structure, SampleStructure):
        key = jax.random.fold_in(key, number)
    options = {"key": key, "num_samples": num_samples, "microbatch": microbatch}
    posteriors = functional_posteriors(fitted, inputs, grid, **options)
    score = _label_score if likelihood.target_kind == "label" else _number_score
    return np.array([score(likelihood, posterior, targets) for posterior in posteriors])


def _label_score(
    likelihood: Likelihood, posterior: FunctionalPosterior, labels: Num[AnyArray, "b ..."]
) -> list[float | int]:
    """Score class labels or soft targets: the summed NLL, the number of labels, and the gaps of the bins."""
    probs = np.asarray(link.monte_carlo(likelihood, posterior.mean, posterior.deviations), np.float64)
    if np.shape(labels) == probs.shape and np.issubdtype(np.asarray(labels).dtype, np.floating):  # soft targets
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(np.asarray(labels) > 0, labels * np.log(probs), 0.0)
        return [-terms.sum(), terms[..., 0].size, np.nan]
    probs, labels = probs.reshape(-1, probs.shape[-1]), np.reshape(labels, -1)
    total = len(labels) * negative_log_likelihood(probs, labels)
    return [total, len(labels), *calibration_gaps(probs, labels)]


def _gaussian_score(
    likelihood: Likelihood, mean: Float[Array, "b ... C"], variance: Float[Array, "b ... C"], targets: AnyArray
) -> list[float | int]:
    """Score the targets of a regression by Gaussians: the summed NLL, the number of outputs, and no gaps."""
    variance = variance + likelihood.sigma_noise**2
    log_prob = -0.5 * ((jnp.asarray(targets) - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance))
    return [-float(log_prob.sum()), log_prob.size, np.nan]


def _number_score(
    likelihood: Likelihood, posterior: FunctionalPosterior, targets: Num[AnyArray, "b ..."]
) -> list[float | int]:
    """Score numbers by the mean of p(y | f) over samples: the summed NLL, the number of targets, and no gaps."""
    log_probs = likelihood.log_prob(posterior.mean + posterior.deviations, jnp.asarray(targets))
    mean = jax.nn.logsumexp(log_probs, axis=0) - np.log(len(log_probs))
    return [-float(mean.sum()), math.prod(jnp.shape(targets)), np.nan]
