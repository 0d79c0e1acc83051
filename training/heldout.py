"""Held-out evaluation of a trained network and its posteriors: from logits to a `RunResults` record."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from scipy.special import softmax

from bnnlaplace import Laplace, Network, calibration, predictive
from bnnlaplace.plots import PrecisionCurve
from bnnlaplace.structure import KrylovStructure
from bnnlaplace.tree import size
from training.config import Config
from training.data import ImageData, Split, normalise, out_of_distribution
from training.loop import TrainResult
from training.results import KrylovResult, MethodResult, RunResults

_CURVE_STREAM, _SAMPLE_STREAM = 201, 202


def evaluate(
    config: Config,
    data: ImageData,
    trained: TrainResult,
    posteriors: Mapping[str, Laplace],
    seconds: Mapping[str, float],
) -> RunResults:
    """Evaluate MAP, MAP with a temperature, and each posterior at two prior precisions and through two links.

    The temperature and the second precision (the lowest NLL of the Monte Carlo predictive on a grid) are chosen on the
    validation images; the first precision is the maximiser of the evidence.
    """
    network = next(iter(posteriors.values())).network
    split: Split = getattr(data, config.evaluation.split)
    foreign = out_of_distribution(config.evaluation.ood, split, config.data.dir, config.seed)
    validation = normalise(data.validation.images, data.mean, data.std)
    held_out = _HeldOut(config, normalise(np.concatenate([split.images, foreign]), data.mean, data.std), split.labels)
    curves = {name: precision_curve(config, la, validation, data.validation.labels) for name, la in posteriors.items()}
    methods = [
        *held_out.point_predictions(network, validation, data.validation.labels),
        *(
            method
            for name, la in posteriors.items()
            for method in held_out.posterior_predictions(name, la, _choices(curves[name]))
        ),
    ]
    return RunResults(
        data=config.data.name,
        num_images={name: len(getattr(data, name).labels) for name in ("train", "validation", "test")},
        split=config.evaluation.split,
        ood=config.evaluation.ood,
        num_weights=size(network.params),
        seed=config.seed,
        config=dataclasses.asdict(config),
        seconds=seconds,
        methods=methods,
        curves=curves,
        curve_link="MC",
        krylov=krylov_result(config, posteriors["Lanczos"], curves["Lanczos"].evidence_optimum),
        history=trained.history,
        gradient_norm=trained.joint_gradient_norm,
        prior_gradient_norm=trained.joint_gradient_norm / trained.joint_gradient_to_prior,
        mode_decrement=posteriors["Lanczos"].mode_decrement(trained.prior_precision),
    )


def precision_curve(config: Config, la: Laplace, images: np.ndarray, labels: np.ndarray) -> PrecisionCurve:
    """Evidence, validation NLL and validation ECE on the configured grid of prior precisions, and their optima."""
    settings = config.evaluation
    grid = np.geomspace(settings.grid_low, settings.grid_high, settings.grid_size)
    evidence = la.evidence_curve(grid).log_marginal_likelihood
    is_krylov = isinstance(la.structure, KrylovStructure)
    optimum = la.evidence_optimum()
    heldout = la.validation_curve(
        images,
        labels,
        grid,
        key=_key(config, _CURVE_STREAM),
        num_samples=config.curvature.num_probes,
        microbatch=config.curvature.microbatch,
    )
    return PrecisionCurve(
        precision=grid,
        log_evidence=evidence.mean,
        log_evidence_sem=evidence.sem,
        # The log-determinant is at most this much too high, so the evidence at most half as much too low.
        log_evidence_truncation=np.array(
            [0.5 * la.structure.truncation(delta).mean() if is_krylov else 0.0 for delta in grid]
        ),
        validation_nll=heldout.negative_log_likelihood,
        validation_ece=heldout.expected_calibration_error,
        evidence_optimum=optimum.prior_precision,
        evidence_optimum_low=optimum.low,
        evidence_optimum_high=optimum.high,
        nll_optimum=float(grid[np.argmin(heldout.negative_log_likelihood)]),
    )


def krylov_result(config: Config, la: Laplace, prior_precision: float) -> KrylovResult:
    """What the decomposition cost and how far it can be off, at one prior precision."""
    structure = la.structure
    error = structure.error(prior_precision)
    upper = float(structure.log_determinant(prior_precision).mean())
    return KrylovResult(
        depth=len(structure.ritz.values) // structure.num_probes,
        num_vectors=len(structure.ritz.values),
        num_probes=structure.num_probes,
        converged=structure.has_converged(error, config.curvature.tolerance),
        sample_error_bound=error.sample,
        log_det_low=upper - error.log_determinant,
        log_det_high=upper,
        effective_parameters=error.effective_parameters,
        ritz_values=np.asarray(structure.ritz.values),
    )


@dataclasses.dataclass(frozen=True)
class _HeldOut:
    """Images to evaluate on; every method sees the same ones and the same resamples."""

    config: Config
    images: np.ndarray
    """Those of the split, then the out-of-distribution ones: one array, so that one program serves both."""
    labels: np.ndarray
    """Of the split."""

    def point_predictions(self, network: Network, validation: np.ndarray, labels: np.ndarray) -> Iterator[MethodResult]:
        """MAP, and MAP with the temperature that validation chooses."""
        logits, chosen_on = (
            np.asarray(predictive.outputs(network, x, microbatch=self.config.curvature.microbatch), np.float64)
            for x in (self.images, validation)
        )
        yield self._result(softmax(logits, axis=1), structure="MAP")
        fitted = calibration.fit_temperature(chosen_on, labels).temperature
        yield self._result(softmax(logits / fitted, axis=1), structure="MAP", temperature=fitted)

    def posterior_predictions(self, name: str, la: Laplace, choices: Mapping[str, float]) -> Iterator[MethodResult]:
        """One posterior at each chosen prior precision, through each link."""
        settings = self.config.curvature
        posteriors = la.functional_posteriors(
            self.images,
            list(choices.values()),
            key=_key(self.config, _SAMPLE_STREAM),
            num_samples=settings.num_probes,
            microbatch=settings.microbatch,
        )
        for (choice, precision), found in zip(choices.items(), posteriors, strict=True):
            variance = np.diagonal(found.variance, axis1=1, axis2=2)
            links = {
                "MC": predictive.monte_carlo(la.likelihood, found.mean, found.deviations),
                "probit": predictive.probit(la.likelihood, found.mean, variance),
            }
            for link, probs in links.items():
                probs = np.asarray(probs, np.float64)
                probs /= probs.sum(axis=1, keepdims=True)  # rows that sum to one in double precision too
                yield self._result(probs, structure=name, prior_choice=choice, prior_precision=precision, link=link)

    def _result(self, probs: np.ndarray, **description: Any) -> MethodResult:
        settings, count = self.config.evaluation, len(self.labels)
        return MethodResult(
            bootstrap=calibration.bootstrap(
                probs[:count],
                self.labels,
                probs[count:],
                seed=self.config.seed,
                num_bins=settings.bins,
                resamples=settings.resamples,
            ),
            reliability=calibration.reliability_bins(probs[:count], self.labels, settings.bins),
            **description,
        )


def _choices(curve: PrecisionCurve) -> dict[str, float]:
    return {"evidence": curve.evidence_optimum, "validation NLL": curve.nll_optimum}


def _key(config: Config, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), stream)
