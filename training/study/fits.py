"""Fit one posterior to a trained network, choose its prior precision, and predict all held-out images with it."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np

from bnnlaplace import Laplace, Network, Variational
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.predictive import link
from bnnlaplace.prior import by_layer
from training.cli import program
from training.config import Config
from training.data.reading import Split
from training.posteriors import curvature_images, make_network
from training.study.config import Measures, Posterior
from training.study.fold import fold_batch_normalisation
from training.study.inputs import HeldOut
from training.study.networks import RegimeData, Trained, make_module
from training.study.scores import Method, measured

LEAST_SHARE = 1e-3
"""The g-prior gives no weight less than this share of the mean precision: weights that no output depends on, such as
the biases before a normalisation, would have no prior."""

_FIT_STREAM, _CURVE_STREAM, _SAMPLE_STREAM = 301, 302, 303

Fitting = Callable[[Laplace], Laplace]

EVIDENCE, VALIDATION, FOLDS = "evidence", "validation NLL", "folds"


class Fit(NamedTuple):
    """A fitted posterior."""

    la: Laplace
    """At the precision that the evidence, or the bound, chose."""
    choices: dict[str, float]
    """The precisions to predict at, by what chose them. They are factors of the ratios of `la`."""
    seconds: dict[str, float]
    said: list[str]
    """What the library warned of."""


def fit_posterior(posterior: Posterior, trained: Trained, config: Config, of: RegimeData, measures: Measures) -> Fit:
    """Fit a posterior and choose its prior, by the evidence or bound, and beside it by the NLL of validation images.

    Where the validation NLL chooses for a variational posterior, its sites and mean stay those of the bound.

    Raises
    ------
    ValueError, MemoryError
        The posterior cannot be fitted.
    """
    seconds, started = {}, perf_counter()
    with recorded() as said:
        la = unfitted(posterior, trained, config, of, of.data.train)
        fit_again = fitting(posterior, trained, config, of.data.train, measures)
        la = fit_again(la)
        seconds["fit"], started = perf_counter() - started, perf_counter()
        if _chosen_along(posterior, trained) is None:
            la = _with_best_prior(posterior, la, fit_again, measures)
        seconds["prior"], started = perf_counter() - started, perf_counter()
        choices = {EVIDENCE: float(la.prior.precision)} | _by_validation(la, config, of, measures, said)
        seconds["validation"] = perf_counter() - started
    return Fit(la, choices, seconds, said)


def methods_of(
    fit: Fit, posterior: Posterior, training: str, held_out: HeldOut, config: Config, measures: Measures
) -> Iterator[Method]:
    """Measure a posterior at each choice of its precision, through both links. One pass of derivatives serves all."""
    la, started = fit.la, perf_counter()
    num_samples = _num_samples(posterior, config, measures)
    predictions = la.functional_posteriors(
        held_out.images,
        list(fit.choices.values()),
        key=_key(config, _SAMPLE_STREAM),
        num_samples=num_samples,
        microbatch=config.curvature.microbatch,
        spread="marginal",
    )
    for (choice, precision), prediction in zip(fit.choices.items(), predictions, strict=True):
        numbers = prediction.mean, prediction.variance, prediction.deviations
        by_link = link.by_link_in_double(la.likelihood, *numbers)
        evidence = la.evidence_curve([precision]).log_marginal_likelihood
        description = {
            "training": training,
            "method": posterior.name,
            "prior": choice,
            "prior_precision": precision,
            # The bound at the choice of the validation NLL is that of the sites and mean at the best bound.
            "log_evidence": float(np.ravel(evidence.mean)[0]),
            "log_evidence_sem": float(np.ravel(evidence.sem)[0]),
            "reservation": _reservation(la, precision),
            "warnings": fit.said,
            "seconds": fit.seconds | {"predictions": perf_counter() - started},
        }
        for name, probs in by_link.items():
            bins = config.evaluation.bins
            yield measured(probs, held_out, bins, measures.splits, **description, link=name)


def _network(posterior: Posterior, trained: Trained, config: Config, of: RegimeData) -> tuple[Network, Any]:
    """Return the network, folded if it should be, and which of its weights have a posterior."""
    module = make_module(config, of.data)
    if posterior.folded:
        folded = fold_batch_normalisation(trained.params, trained.batch_stats)
        return make_network(module, folded.params, folded.batch_stats), lambda path: path not in folded.constant
    network = make_network(module, trained.params, trained.batch_stats)
    if posterior.weights == "without_normalisation":
        return network, _is_of_no_normalisation
    return network, posterior.weights


def _is_of_no_normalisation(path: str) -> bool:
    """Say whether a weight is neither scale nor bias of a normalisation layer."""
    return not any(part.startswith("norm") for part in path.split("/")[:-1])


def _first_precision(
    posterior: Posterior, trained: Trained, network: Network, subset: Any, train: Split, config: Config
) -> Any:
    """Return the precision that the search begins with. For all priors but "layerwise", its ratios stay."""
    layers = trained.prior if isinstance(trained.prior, dict) else None
    common = float(np.exp(np.mean(np.log(list(layers.values()))))) if layers else float(trained.prior)
    if posterior.prior == "g":
        diagonal = Laplace(network, subset_of_weights=subset, hessian_structure="diag", prior_precision=common)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the weights are not at a mode; only the curvature is used
            images = curvature_images(config, train)
            diagonal = diagonal.fit(tuple(images), num_data=len(train.labels), microbatch=config.curvature.microbatch)
        share = np.asarray(diagonal.structure.diagonal, np.float64)
        share = np.maximum(share / share.mean(), LEAST_SHARE)
        return common * share / np.exp(np.log(share).mean())  # a geometric mean of `common`
    if layers is None or posterior.prior == "scalar":
        return common
    if posterior.weights == "last_layer":
        return layers["head"]
    paths = [path for path in leaf_names(network.params) if subset == "all" or subset(path)]
    return {name: layers[name] for name in dict.fromkeys(map(by_layer, paths))}


def unfitted(posterior: Posterior, trained: Trained, config: Config, of: RegimeData, train: Split) -> Laplace:
    """Return the posterior before its fit, at the precision that a search begins with."""
    network, subset = _network(posterior, trained, config, of)
    return Laplace(
        network,
        subset_of_weights=subset,
        hessian_structure=posterior.structure,
        prior_precision=_first_precision(posterior, trained, network, subset, train, config),
    )


def fitting(posterior: Posterior, trained: Trained, config: Config, train: Split, measures: Measures) -> Fitting:
    """Return the function that fits the posterior to some images, from the beginning or from an earlier fit."""
    curvature, is_variational = config.curvature, posterior.approximation == "variational"
    images = curvature_images(config, train)
    options = Variational(
        prior_structure=_chosen_along(posterior, trained),
        max_iterations=measures.max_iterations,
        fixed_mean=posterior.fixed_mean,
    )
    return lambda la: la.fit(
        tuple(images),
        num_data=len(train.labels),
        approximation=options if is_variational else "laplace",
        key=_key(config, _FIT_STREAM),
        num_probes=curvature.num_probes,
        max_vectors=curvature.max_vectors,
        tolerance=curvature.tolerance,
        microbatch=curvature.microbatch,
    )


def _chosen_along(posterior: Posterior, trained: Trained) -> str | None:
    """Return which precisions a variational fit chooses by itself. A common factor of unequal ones it does not."""
    if posterior.approximation == "laplace" or posterior.prior == "g" or posterior.chosen_by == "folds":
        return None
    if posterior.prior == "layerwise":
        return "layerwise"
    is_common = not isinstance(trained.prior, dict) or posterior.weights == "last_layer"
    return "scalar" if is_common or posterior.prior == "scalar" else None


def _with_best_prior(posterior: Posterior, la: Laplace, fit_again: Fitting, measures: Measures) -> Laplace:
    """Maximise the evidence, or the bound with a new fit for each step."""
    options: dict[str, Any] = {"prior_structure": "layerwise"} if posterior.prior == "layerwise" else {}
    if posterior.approximation == "variational" or options:
        options |= {"refit": fit_again, "max_refits": measures.max_refits}
    return la.optimize_prior_precision(**options)


def _by_validation(
    la: Laplace, config: Config, of: RegimeData, measures: Measures, said: list[str]
) -> dict[str, float]:
    """Choose the precision with the lowest NLL of the Monte Carlo predictive; none if there is none to choose."""
    evaluation = config.evaluation
    grid = np.geomspace(evaluation.grid_low, evaluation.grid_high, evaluation.grid_size)
    curve = la.validation_curve(
        *of.data.validation,
        grid,
        link_approx="mc",
        key=_key(config, _CURVE_STREAM),
        num_samples=config.curvature.num_probes,
        microbatch=config.curvature.microbatch,
    )
    try:
        return {VALIDATION: curve.choose()}  # with a warning if it is at an end of the grid
    except ValueError as error:
        said.append(f"no prior precision chosen on validation images: {error}")
        return {}


def _num_samples(posterior: Posterior, config: Config, measures: Measures) -> int:
    return config.curvature.num_probes if posterior.structure == "lanczos" else measures.samples


def _reservation(la: Laplace, precision: float) -> str | None:
    """Say why the samples of a decomposition have not converged at a precision; None if they have."""
    reservation = getattr(la.structure, "reservation", None)
    said = reservation(precision) if reservation else None
    return None if said is None else str(said)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Collect the texts of the library's warnings, each once, in a list that has them at the end of the block."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.filterwarnings("ignore", program.CACHE_WARNING)
        yield said
    said += list(dict.fromkeys(str(warning.message) for warning in caught))


def _key(config: Config, stream: int) -> jax.Array:
    return jax.random.fold_in(jax.random.key(config.seed), stream)
