"""Held-out evaluation of a trained network and its posteriors, from logits to a `RunResults` record."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from scipy.special import softmax

from bnnlaplace import Laplace, Network, calibration
from bnnlaplace.calibration import fit_temperature
from bnnlaplace.core.tree import size
from bnnlaplace.fitting.fit import NUM_KEPT
from bnnlaplace.model.batched import outputs
from bnnlaplace.model.data import as_data
from bnnlaplace.predictive import FunctionalPosterior, ValidationCurve, link, searched_curves, shared_posteriors
from bnnlaplace.prior import PriorOptimum
from bnnlaplace.variational.saturation import TrainingFit, training_fit
from training.cli import interruption
from training.config import Config
from training.data.foreign import out_of_distribution
from training.data.load import ImageData
from training.data.reading import Split
from training.errors import UserError
from training.report.command import command_of
from training.report.examples import chosen_examples
from training.report.results import (
    EVIDENCE,
    TRAINING,
    KrylovResult,
    MethodResult,
    ModeDistance,
    Predictions,
    RunResults,
)
from training.train.checkpoints import TrainResult

if TYPE_CHECKING:
    from bnnlaplace.plots import PrecisionCurve

_CURVE_STREAM, _SAMPLE_STREAM, _SUBSET_STREAM = 201, 202, 203
_STOPPED = "stopped in stage evaluation; nothing of it is written"


def foreign_images(config: Config, data: ImageData) -> np.ndarray:
    """Load the out-of-distribution images. Call it before anything is computed, because they may be missing.

    There are at most as many as evaluated images; inverted ones are those of the evaluated images.
    """
    return out_of_distribution(config.evaluation.ood, evaluated_split(config, data), config.data.dir, config.seed)


def evaluated_split(config: Config, data: ImageData) -> Split:
    """Return the images that every method is evaluated on: the split, or `evaluation.examples` of it.

    The choice is stratified by class and depends on the run's seed alone. A larger one contains a smaller one.
    """
    split: Split = getattr(data, config.evaluation.split)
    return split.stratified(config.evaluation.examples, (config.seed + _SUBSET_STREAM) % 2**63)


def evaluate(
    config: Config,
    data: ImageData,
    foreign: np.ndarray,
    trained: TrainResult,
    posteriors: Mapping[str, Laplace],
    seconds: Mapping[str, float],
) -> RunResults:
    """Evaluate MAP, MAP with a temperature, and each posterior at two prior precisions and through two links.

    The first precision maximises the evidence; a variational posterior keeps the one that it was fitted at, which is
    that of training if training chose one. The second has the lowest NLL of the Monte Carlo predictive on the
    validation images, among the precisions of the grid at which the samples have converged. The temperature is chosen
    on the validation images too. `foreign` comes from `foreign_images`.

    Raises
    ------
    UserError
        The validation NLL can choose no precision of the grid.
    Interrupted
        Ctrl-C or SIGTERM came. If a computation takes longer than `interruption.SECONDS_TO_UNWIND`, the process ends.
    """
    with interruption.promptly(_STOPPED):
        return _evaluate(config, data, foreign, trained, posteriors, seconds)


def _evaluate(
    config: Config,
    data: ImageData,
    foreign: np.ndarray,
    trained: TrainResult,
    posteriors: Mapping[str, Laplace],
    seconds: Mapping[str, float],
) -> RunResults:
    network = posteriors["Lanczos"].network
    split = evaluated_split(config, data)
    validation, labels = data.validation
    held_out = _HeldOut(config, np.concatenate([split.images, foreign]), split.labels)
    curves = precision_curves(config, posteriors, validation, labels)
    methods = [
        *held_out.point_predictions(network, validation, labels),
        *held_out.posterior_predictions(posteriors, {name: _choices(curve) for name, curve in curves.items()}),
    ]
    results = RunResults(
        data=config.data.name,
        num_images={name: len(getattr(data, name).labels) for name in ("train", "validation", "test")},
        split=config.evaluation.split,
        num_evaluated=len(split.labels),
        num_foreign=len(foreign),
        ood=config.evaluation.ood,
        num_weights=size(network.params),
        seed=config.seed,
        config=dataclasses.asdict(config),
        seconds=seconds,
        methods=methods,
        class_names=data.class_names,
        examples={},
        curves=curves,
        curve_link="MC",
        krylov=krylov_result(config, posteriors["Lanczos"], curves["Lanczos"].evidence_optimum),
        history=trained.history,
        gradient_norm=trained.joint_gradient_norm,
        prior_gradient_norm=trained.joint_gradient_norm / trained.joint_gradient_to_prior,
        mode_in_training=mode_distance(posteriors["Lanczos"], trained.prior_precision),
        mode_of_evidence=mode_distance(posteriors["Lanczos"], curves["Lanczos"].evidence_optimum),
        training_fits=training_fits(data.train, posteriors, curves),
        command=command_of(config, data.train.images),
    )
    return dataclasses.replace(results, examples=chosen_examples(split, results.foremost.predictions))


def precision_curves(
    config: Config, posteriors: Mapping[str, Laplace], images: np.ndarray, labels: np.ndarray
) -> "dict[str, PrecisionCurve]":
    """Compute evidence, validation NLL and validation ECE on grids of prior precisions, and their optima.

    The evidence and, as a rule, the validation scores are computed on the whole configured grid: where the network is
    differentiated once for all precisions and posteriors, each more of them costs next to nothing. Where samples at a
    few precisions are fewer than what serves all of them, the validation scores are searched from coarse to fine, and
    are NaN in between; see `bnnlaplace.predictive.searched_curves`.

    At a precision at which the samples have not converged, NLL and ECE are not those of the posterior. `converged`
    marks such precisions, and the validation NLL does not choose them.
    """
    interruption.stop_if_requested(_STOPPED)
    settings = config.evaluation
    grid = np.geomspace(settings.grid_low, settings.grid_high, settings.grid_size)
    heldout = searched_curves(
        [la.fitted for la in posteriors.values()],
        (images, labels),
        grid,
        link_approx="mc",
        key=_key(config, _CURVE_STREAM),
        num_samples=config.curvature.num_probes,
        microbatch=config.curvature.microbatch,
    )
    return {
        name: precision_curve(name, la, grid, scores)._replace(from_training=is_from_training(config, la))
        for (name, la), scores in zip(posteriors.items(), heldout, strict=True)
    }


def precision_curve(name: str, la: Laplace, grid: np.ndarray, heldout: ValidationCurve) -> "PrecisionCurve":
    """Join the evidence of one posterior, with its optimum, and its scores on validation images."""
    from bnnlaplace.plots import PrecisionCurve  # Matplotlib takes most of a second to load.

    interruption.stop_if_requested(_STOPPED)
    evidence = la.evidence_curve(grid).log_marginal_likelihood
    optimum = evidence_choice(la)
    # The log-determinant is too high by at most the truncation, so the evidence is too low by at most half of it.
    truncation = np.array([0.5 * la.structure.truncation(delta).mean() for delta in grid])
    nll_optimum, nll_at_bound = lowest_nll(name, grid, heldout.negative_log_likelihood, heldout.converged)
    return PrecisionCurve(
        precision=grid,
        log_evidence=evidence.mean,
        log_evidence_sem=evidence.sem,
        log_evidence_truncation=truncation,
        validation_nll=heldout.negative_log_likelihood,
        validation_ece=heldout.expected_calibration_error,
        converged=heldout.converged,
        evidence_optimum=optimum.prior_precision,
        evidence_optimum_low=optimum.low,
        evidence_optimum_high=optimum.high,
        evidence_at_bound=optimum.at_bound,
        nll_optimum=nll_optimum,
        nll_at_bound=nll_at_bound,
    )


def is_from_training(config: Config, la: Laplace) -> bool:
    """Whether a posterior keeps the prior precision that training chose: a variational one, unless that was posthoc."""
    return la.fitted.bound is not None and config.prior.update != "posthoc"


def evidence_choice(la: Laplace) -> PriorOptimum:
    """Return the prior precision that the evidence prefers.

    That of a variational posterior is the one that it was fitted at: training chose it, or after posthoc training the
    fit maximised the bound over it. The curve at the sites as they are would lead elsewhere.
    """
    if la.fitted.bound is None:
        return la.evidence_optimum()
    own = float(la.prior.precision)
    return PriorOptimum(own, low=own, high=own, at_bound=False)


def lowest_nll(name: str, grid: np.ndarray, nll: np.ndarray, converged: np.ndarray) -> tuple[float, bool]:
    """Choose the precision with the lowest NLL, and say whether it is the first or last of those to choose from.

    A precision can be chosen if its samples have converged and its NLL is finite.

    Raises
    ------
    UserError
        No precision of the grid can be chosen.
    """
    eligible = np.flatnonzero(converged & np.isfinite(nll))
    if not len(eligible):
        raise UserError(
            f"the {name} posterior must have converged samples and a finite validation NLL at least at one prior "
            f"precision of the grid; got none of {len(grid)} from {grid[0]:g} to {grid[-1]:g}; raise "
            "--evaluation.grid-high of a run that --resume continues"
        )
    best = eligible[np.argmin(nll[eligible])]
    return float(grid[best]), bool(best in (eligible[0], eligible[-1]))


def krylov_result(config: Config, la: Laplace, prior_precision: float) -> KrylovResult:
    """Say what the decomposition cost, and how far it can be off at one prior precision."""
    structure = la.structure
    error = structure.error(prior_precision)
    upper = float(structure.log_determinant(prior_precision).mean())
    return KrylovResult(
        depth=len(structure.ritz.values) // structure.num_probes,
        num_vectors=len(structure.ritz.values),
        num_probes=structure.num_probes,
        converged=structure.has_converged(error),
        sample_error_bound=error.sample,
        log_det_low=upper - error.truncation,
        log_det_high=upper + error.rounding,
        effective_parameters=error.effective_parameters,
        ritz_values=np.asarray(structure.ritz.values),
        residual_norms=np.asarray(structure.ritz.couplings),
    )


def mode_distance(la: Laplace, prior_precision: float) -> ModeDistance:
    """Measure how far the weights, and a posterior sample, are from the mode at one prior precision."""
    effective = la.structure.error(prior_precision).effective_parameters
    # A number stands for the geometric mean of the precisions of layers, whose ratios stay.
    decrement = la.fitted.at(la.prior._replace(precision=prior_precision)).mode_decrement()
    return ModeDistance(prior_precision, decrement, effective)


def training_fits(
    train: Split, posteriors: Mapping[str, Laplace], curves: "Mapping[str, PrecisionCurve]"
) -> dict[str, TrainingFit]:
    """Compare the NLL of some training images under each Laplace posterior with its evidence, at its optimum."""
    sample = as_data(tuple(train)).sample(NUM_KEPT)
    fits = {}
    for name, la in posteriors.items():
        interruption.stop_if_requested(_STOPPED)
        if la.fitted.bound is None:
            at_optimum = la.fitted.at(la.prior._replace(precision=curves[name].evidence_optimum))
            fits[name] = training_fit(at_optimum, sample)
    return fits


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """Images to evaluate on. Every method sees the same images and the same resamples."""

    config: Config
    images: np.ndarray
    """The images of the split, then the out-of-distribution ones. One array, so one compiled program serves both."""
    labels: np.ndarray
    """Labels of the split."""

    def point_predictions(self, network: Network, validation: np.ndarray, labels: np.ndarray) -> Iterator[MethodResult]:
        """Evaluate MAP, and MAP with the temperature that the validation images choose."""
        logits, chosen_on = (
            np.asarray(outputs(network, x, microbatch=self.config.curvature.microbatch), np.float64)
            for x in (self.images, validation)
        )
        yield self._result(softmax(logits, axis=1), structure="MAP")
        fitted = fit_temperature(chosen_on, labels)
        yield self._result(
            softmax(logits / fitted.temperature, axis=1),
            structure="MAP",
            temperature=fitted.temperature,
            temperature_at_bound=fitted.at_bound,
        )

    def posterior_predictions(
        self, posteriors: Mapping[str, Laplace], choices: Mapping[str, Mapping[str, float]]
    ) -> Iterator[MethodResult]:
        """Evaluate each posterior at each of its chosen prior precisions, through each link.

        All posteriors share the derivatives of the network, if it is convolutional.
        """
        interruption.stop_if_requested(_STOPPED)
        settings = self.config.curvature
        predicted = shared_posteriors(
            [la.fitted for la in posteriors.values()],
            self.images,
            [list(choices[name].values()) for name in posteriors],
            keys=[_key(self.config, _SAMPLE_STREAM)] * len(posteriors),
            num_samples=settings.num_probes,
            microbatch=settings.microbatch,
            spread="marginal",
        )
        for (name, la), of_one in zip(posteriors.items(), predicted, strict=True):
            interruption.stop_if_requested(_STOPPED)
            for (choice, precision), posterior in zip(choices[name].items(), of_one, strict=True):
                yield from self._by_link(name, la, choice, precision, posterior)

    def _by_link(
        self, name: str, la: Laplace, choice: str, precision: float, posterior: FunctionalPosterior
    ) -> Iterator[MethodResult]:
        """Evaluate the predictive of one posterior through each link."""
        numbers = posterior.mean, posterior.variance, posterior.deviations
        by_link = link.by_link_in_double(la.likelihood, *numbers)
        approximation = "Laplace" if la.fitted.bound is None else "variational"
        described = {"structure": name.split(",")[0], "approximation": approximation}
        described |= {"prior_choice": choice, "prior_precision": precision}
        for link_name, probs in by_link.items():
            yield self._result(probs, **described, link=link_name)

    def _result(self, probs: np.ndarray, **description: Any) -> MethodResult:
        settings, (own, foreign) = self.config.evaluation, np.split(probs, [len(self.labels)])
        return MethodResult(
            bootstrap=calibration.bootstrap(
                own,
                self.labels,
                foreign,
                seed=self.config.seed,
                num_bins=settings.bins,
                resamples=settings.resamples,
            ),
            reliability=calibration.reliability_bins(own, self.labels, settings.bins),
            predictions=Predictions(
                classes=own.argmax(axis=1),
                confidence=own.max(axis=1),
                foreign_confidence=foreign.max(axis=1),
                rejection=calibration.rejection_curve(own, self.labels),
            ),
            **description,
        )


def _choices(curve: "PrecisionCurve") -> dict[str, float]:
    by_training_images = TRAINING if curve.from_training else EVIDENCE
    return {by_training_images: curve.evidence_optimum, "validation NLL": curve.nll_optimum}


def _key(config: Config, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), stream)
