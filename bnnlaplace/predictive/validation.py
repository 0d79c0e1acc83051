"""Score the predictive on validation data, as a function of the prior precision."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Num

from bnnlaplace.calibration.metrics import calibration_gaps, negative_log_likelihood
from bnnlaplace.core import checks
from bnnlaplace.core.types import AnyArray
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.batched import check_microbatch, outputs
from bnnlaplace.model.data import PairOrBatches
from bnnlaplace.model.likelihood import Likelihood, check_targets
from bnnlaplace.model.spec import output_shape
from bnnlaplace.predictive import link
from bnnlaplace.predictive.functional import FunctionalPosterior, functional_variances, shared_posteriors
from bnnlaplace.predictive.link import LinkApproximation
from bnnlaplace.predictive.reading import Draws, draws_functions
from bnnlaplace.predictive.validation_data import Batch, checked_batches
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
        In nats per label, or per output if the targets are numbers: the weighted mean, if examples have weights.
    expected_calibration_error
        With bins of equal width, weighted alike. NaN if the targets are not labels: classes, or 0 and 1 of a binary
        likelihood.
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

    def choose(self) -> float:
        """Return `best_precision`, with a warning if it is at an end of the precisions that could be chosen.

        A grid of one precision leaves no choice and causes no warning.
        """
        best, eligible = self.best_precision, self.prior_precision[self.converged]
        smallest, largest = self.prior_precision.min(), self.prior_precision.max()
        if smallest == largest or eligible.min() < best < eligible.max():
            return best
        is_lowest = best == eligible.min()
        if best == (smallest if is_lowest else largest):
            where, advice = "the grid", f"pass precisions= with {'smaller' if is_lowest else 'larger'} ones"
        else:
            where, advice = "the prior precisions that have converged", "fit with more max_vectors or target_precision="
        checks.warn(
            f"the validation NLL is lowest at an end of {where}, prior precision {best:.3g}: the optimum may lie "
            f"beyond it; {advice}"
        )
        return best


def has_classes(likelihood: Likelihood) -> bool:
    """Whether predictions are scored as probabilities of classes: those of labels, or of 0 and 1."""
    return likelihood.target_kind == "label" or likelihood.name == "binary"


def default_link(likelihood: Likelihood) -> LinkApproximation:
    """The link of `predictive` for the likelihoods that it is made for; "mc" for others."""
    return "probit" if likelihood.name in ("classification", "binary") else "mc"


def validation_curve(
    fitted: Fitted,
    data: PairOrBatches,
    precisions: Iterable[float] | None,
    *,
    link_approx: LinkApproximation | None = None,
    key: Array | None = None,
    num_samples: int | None = None,
    microbatch: int = 64,
) -> ValidationCurve:
    """Compute NLL and ECE of the predictive at many prior precisions.

    Classes and binary targets are scored with the probabilities that `predictive` gives with the same link. Soft
    targets are scored by their cross-entropy, without an ECE. The predictive of a regression is a Gaussian for each
    output: its variance is the variance of the linearised output plus that of the noise. Any other likelihood is scored
    by the mean of p(y | f) over samples. Scores are means over the targets, each as many times as its example counts.
    Unknown targets, such as `ignore_index` or those with `target_weights` of zero, are left out of them. Other weights
    that a likelihood gives to targets, such as `class_weights`, do not enter: they do not change p(y | f).

    Parameters
    ----------
    fitted
        The posterior of the weights. Its own prior gives the ratios of the precisions.
    data
        Validation data: (x, y), or (x, y, w) with weights (N,) that say how many times each example counts, or batches
        of either; read once.
    precisions
        The grid. None stands for 25 values from 0.01 to 10,000.
    link_approx
        The approximation of E[y | x], as for `predictive`; the same by default: "probit", which needs the variances of
        the outputs alone. A regression does not use it, and likelihoods of your own have "mc".
    key, num_samples
        For "mc": the random key and the number of the samples, which are the same at every prior precision, so that the
        curve is smooth. By default 32 samples, or fewer if a `SampleStructure` has fewer.
    microbatch
        Inputs differentiated at a time; bounds memory.

    Raises
    ------
    ValueError
        If the grid is not positive, there are no data, inputs or predictions are not finite, targets do not fit the
        outputs, weights are not one number for each example, the link does not fit the likelihood, or the key is
        missing although samples are needed.

    Notes
    -----
    The network is differentiated once for the whole grid; see `functional_posteriors`. "probit" needs C numbers for
    each input and precision, "bridge" C^2, and "mc" as many and the samples, or the samples alone if there are many
    outputs. Memory: these numbers at all precisions, for the inputs of a microbatch or for more inputs if they are few.
    """
    options = {"link_approx": link_approx, "key": key, "num_samples": num_samples, "microbatch": microbatch}
    return validation_curves([fitted], data, precisions, **options)[0]


def validation_curves(
    posteriors: Sequence[Fitted],
    data: PairOrBatches,
    precisions: Iterable[float] | None,
    *,
    link_approx: LinkApproximation | None = None,
    key: Array | None = None,
    num_samples: int | None = None,
    microbatch: int = 64,
) -> list[ValidationCurve]:
    """Compute the `validation_curve` of each of several posteriors of one network and likelihood, on the same grid.

    With samples, those of a convolutional network share a Jacobian; see `shared_posteriors`.

    Parameters
    ----------
    posteriors
        At least one. Data are checked against the network and likelihood of the first.
    data, precisions, link_approx, key, num_samples, microbatch
        As for `validation_curve`.
    """
    caller, likelihood, network = "validation_curve", posteriors[0].likelihood, posteriors[0].network
    link_approx = default_link(likelihood) if link_approx is None else link_approx
    link.check_link(likelihood, link_approx, caller)
    is_sampled = link_approx == "mc" or not has_classes(likelihood)
    if key is not None or (is_sampled and likelihood.sigma_noise is None):
        checks.key(key, f"{caller}(key=...), which seeds the samples of link_approx='mc',")
    if num_samples is None:
        structures = [fitted.structure for fitted in posteriors]
        most = [structure.num_probes for structure in structures if isinstance(structure, SampleStructure)]
        num_samples = min([32, *most])
    checks.count(num_samples, "validation_curve(num_samples=...)", advice="try 32")
    batches = checked_batches(network, data)
    grid = checked_grid(DEFAULT_GRID if precisions is None else precisions, "validation_curve(precisions=...)")
    check_microbatch(microbatch)
    options = {"link_approx": link_approx, "key": key, "num_samples": num_samples, "microbatch": microbatch}
    sums = [
        _scores(posteriors, batch, grid, number, **options)
        for number, batch in enumerate(_slices(posteriors[0], batches, len(grid), num_samples, microbatch))
    ]
    if not sums:
        raise ValueError(
            "validation data must hold at least one example; got none; an iterator may be used up already, or all "
            "weights are 0"
        )
    return [_curve(fitted, grid, total) for fitted, total in zip(posteriors, np.sum(sums, axis=0), strict=True)]


def _curve(fitted: Fitted, grid: Float[np.ndarray, " D"], sums: Float[np.ndarray, "D k"]) -> ValidationCurve:
    """Turn the sums of `_scores` over all slices into means."""
    # The gaps of the bins keep their signs until all slices are summed: the ECE is the sum of their absolute values.
    total, count, *gaps = sums.T
    if not count.all():
        raise ValueError(
            "validation data must hold at least one known target; got ignore_index, or a weight of 0, everywhere; pass "
            "others"
        )
    converged = np.ones(len(grid), bool)
    if isinstance(fitted.structure, SampleStructure):
        converged = np.array([fitted.structure.reservation(precision) is None for precision in grid])
    return ValidationCurve(grid, total / count, np.abs(gaps).sum(axis=0) / count, converged)


def _slices(
    fitted: Fitted, batches: Iterable[Batch], num_precisions: int, num_samples: int, microbatch: int
) -> Iterator[Batch]:
    """Yield the data in slices of one or more microbatches, after a check of the targets of each batch."""
    for batch in batches:
        shape = output_shape(fitted.network, batch.inputs)
        check_targets(fitted.likelihood, shape, batch.targets, "validation_curve(targets=...)")
        numbers_of_input = math.prod(shape[1:]) * (num_precisions * shape[-1] + num_samples)
        size = microbatch * max(1, MOST_NUMBERS // (microbatch * numbers_of_input))
        for start in range(0, len(batch.weights), size):
            yield batch.part(slice(start, start + size))


def _scores(
    posteriors: Sequence[Fitted],
    batch: Batch,
    grid: Float[np.ndarray, " D"],
    number: int,
    *,
    link_approx: LinkApproximation,
    key: Array | None,
    num_samples: int,
    microbatch: int,
) -> Float[np.ndarray, "F D k"]:
    """Score one slice: for each posterior and precision the sum of the NLL, how many terms it has, the gaps of bins.

    All are weighted. `number` is the position of the slice among all slices.
    """
    likelihood, targets = posteriors[0].likelihood, (batch.targets, batch.weights)
    is_regression = likelihood.sigma_noise is not None
    if is_regression or (has_classes(likelihood) and link_approx != "mc"):
        options = {"link_approx": link_approx, "microbatch": microbatch}
        return np.array([_scores_of_variances(fitted, batch, grid, **options) for fitted in posteriors])
    if has_classes(likelihood):
        expected = partial(link.monte_carlo_double, likelihood)

        def score(posterior: FunctionalPosterior) -> list[float]:
            return _class_score(likelihood, expected, posterior.mean, posterior.deviations, *targets)
    else:

        def score(posterior: FunctionalPosterior) -> list[float]:
            return _number_score(likelihood, posterior, *targets)

    # A sample that is a function must be the same one in all slices. Samples from covariances are drawn at each input,
    # so every slice gets noise of its own.
    draws = Draws(key, num_samples, microbatch, spread="none")
    are_functions = [draws_functions(fitted, batch.inputs, draws, len(grid)) for fitted in posteriors]
    keys = [key if fixed or not number else jax.random.fold_in(key, number) for fixed in are_functions]
    options = {"keys": keys, "num_samples": num_samples, "microbatch": microbatch, "spread": "none"}
    shared = shared_posteriors(posteriors, batch.inputs, [grid] * len(posteriors), **options)
    return np.array([[score(posterior) for posterior in of_one] for of_one in shared])


def _scores_of_variances(
    fitted: Fitted, batch: Batch, grid: Float[np.ndarray, " D"], *, link_approx: LinkApproximation, microbatch: int
) -> Float[np.ndarray, "D k"]:
    """Score one slice by predictions that need variances and no samples."""
    likelihood, targets = fitted.likelihood, (batch.targets, batch.weights)
    is_regression = likelihood.sigma_noise is not None
    fitted, inputs = fitted.at_features(batch.inputs, microbatch=microbatch)
    mean = outputs(fitted.network, inputs, microbatch=microbatch)
    # Only the bridge needs covariances between outputs. Their diagonal alone is much cheaper.
    options = {"microbatch": microbatch, "marginal": is_regression or link_approx == "probit"}
    variances = functional_variances(fitted, inputs, grid, **options)
    if is_regression:
        return np.array([_gaussian_score(likelihood, mean, variance, *targets) for variance in variances])
    function = partial(link.probit, likelihood) if link_approx == "probit" else link.bridge_mean
    expected = partial(link.in_double, function)
    return np.array([_class_score(likelihood, expected, mean, variance, *targets) for variance in variances])


def _class_score(
    likelihood: Likelihood,
    expected: Callable[[Array, Array], np.ndarray],
    mean: Float[Array, "b ... C"],
    spread: Float[Array, "..."],
    targets: Num[AnyArray, "b ..."],
    weights: Float[np.ndarray, " b"],
) -> list[float]:
    """Score class labels, soft targets or binary targets: the summed NLL, how many labels count, the gaps of bins.

    `expected` maps the mean of the outputs and their `spread`, variances or samples, to E[y] in double precision.
    """
    if likelihood.name == "binary":
        # P(class 0) is computed as that of class 1 for -f: 1 - p would be zero where p rounds to 1.
        of_zero = expected(-mean, -spread if spread.ndim > mean.ndim else spread)
        probs = np.stack([of_zero, expected(mean, spread)], axis=-1)
        targets = np.asarray(targets, np.float64)
        is_hard = np.isin(targets, (0, 1)).all()
        targets = targets.astype(np.int64) if is_hard else np.stack([1 - targets, targets], axis=-1)
    else:
        probs, targets = expected(mean, spread), np.asarray(targets)
    of_labels = _over(weights, probs.shape[:-1])
    if targets.shape == probs.shape:  # soft targets
        with np.errstate(divide="ignore", invalid="ignore"):
            terms = np.where(targets > 0, targets * np.log(probs), 0.0)
        return [*_sums(terms.sum(axis=-1), of_labels), np.nan]
    probs, labels, of_labels = probs.reshape(-1, probs.shape[-1]), targets.reshape(-1), of_labels.reshape(-1)
    known = of_labels > 0
    if likelihood.ignore_index is not None:
        known = known & (labels != likelihood.ignore_index)
    if not known.any():
        return [0, 0, *np.zeros_like(calibration_gaps(probs, probs.argmax(axis=-1)))]
    probs, labels, of_labels = probs[known], labels[known], of_labels[known]
    total = of_labels.sum() * negative_log_likelihood(probs, labels, weights=of_labels)
    return [total, of_labels.sum(), *calibration_gaps(probs, labels, weights=of_labels)]


def _gaussian_score(
    likelihood: Likelihood,
    mean: Float[Array, "b ... C"],
    variance: Float[Array, "b ... C"],
    targets: AnyArray,
    weights: Float[np.ndarray, " b"],
) -> list[float]:
    """Score the targets of a regression by Gaussians: the summed NLL, how many outputs count, and no gaps."""
    variance = variance + likelihood.sigma_noise**2
    log_prob = -0.5 * ((jnp.asarray(targets) - mean) ** 2 / variance + jnp.log(2 * jnp.pi * variance))
    return [*_sums(log_prob, _over(weights, log_prob.shape)), np.nan]


def _number_score(
    likelihood: Likelihood,
    posterior: FunctionalPosterior,
    targets: Num[AnyArray, "b ..."],
    weights: Float[np.ndarray, " b"],
) -> list[float]:
    """Score numbers by the mean of p(y | f) over samples: the summed NLL, how many targets count, and no gaps."""
    targets = jnp.asarray(targets)
    # The temperature of a posterior does not change p(y | f), and neither do weights of targets.
    of_targets = jnp.ones(()) if likelihood.target_weights is None else likelihood.target_weights(targets)
    factor = likelihood.temperature / jnp.where(of_targets > 0, of_targets, 1)
    log_probs = factor * likelihood.log_prob(posterior.mean + posterior.deviations, targets)
    mean = jax.nn.logsumexp(log_probs, axis=0) - np.log(len(log_probs))
    known = np.broadcast_to(np.asarray(of_targets) > 0, mean.shape)
    total, count = _sums(mean, known * _over(weights, mean.shape))
    return [total, count * (targets.size // mean.size), np.nan]


def _over(weights: Float[np.ndarray, " b"], shape: tuple[int, ...]) -> Float[np.ndarray, "b ..."]:
    """Give every label of an example the weight of the example."""
    return np.broadcast_to(weights.reshape(-1, *[1] * (len(shape) - 1)), shape)


def _sums(log_probs: Float[AnyArray, "b ..."], weights: Float[np.ndarray, "b ..."]) -> tuple[float, float]:
    """The weighted sum of the NLL, and that of the weights. A term of weight zero may be infinite or NaN."""
    terms = np.where(weights > 0, np.asarray(log_probs, np.float64), 0)
    return -float((weights * terms).sum()), float(weights.sum())
