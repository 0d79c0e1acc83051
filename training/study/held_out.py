"""Choose the prior precision of a posterior by what it predicts for images that its network has not seen.

A temperature is fitted on the shares of the training images that the networks of folds have not seen. The same networks
and shares choose a prior precision here: at each precision of the grid every network gets a posterior, and the one with
the lowest NLL of all shares is that of the network of all images. Beside it stands the choice of the validation images.
"""

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from bnnlaplace import Laplace
from bnnlaplace.calibration import negative_log_likelihood
from training.config import Config
from training.data.reading import Split
from training.study.config import Measures, Posterior
from training.study.fits import FOLDS, VALIDATION, Fit, Fitting, fitting, recorded, unfitted
from training.study.networks import RegimeData, Trained

# Precisions of the grid without a lower NLL after which a walk ends.
PATIENCE = 4


class Fold(NamedTuple):
    """A network, the images that it was trained on, and those that it has not seen."""

    trained: Trained
    train: Split
    held_out: Split


class _Setting(NamedTuple):
    """The posterior that every network gets, and the grid of its precisions."""

    posterior: Posterior
    config: Config
    of: RegimeData
    measures: Measures
    grid: Float[np.ndarray, " D"]

    def begun(self, fold: Fold) -> tuple[Laplace, Fitting, list[Any]]:
        """Return the posterior before its fit, the fit, and the precisions of the grid with the ratios of its prior."""
        la = unfitted(self.posterior, fold.trained, self.config, self.of, fold.train)
        fit = fitting(self.posterior, fold.trained, self.config, fold.train, self.measures)
        factors = self.grid / float(la.prior.precision)
        return la, fit, [jax.tree.map(lambda each, by=factor: by * each, la.prior_precision) for factor in factors]


def fit_by_folds(
    posterior: Posterior,
    trained: Trained,
    folds: Sequence[Fold],
    config: Config,
    of: RegimeData,
    measures: Measures,
) -> Iterator[Fit]:
    """Yield the posterior at the precision that the folds choose, and at the one that the validation images choose.

    Cost: for the network and for each fold a Laplace fit and one pass over the images that it predicts, or both of them
    for each precision on the way of a variational posterior.

    Raises
    ------
    ValueError, MemoryError
        The posterior cannot be fitted.
    """
    grid = np.geomspace(config.evaluation.grid_high, config.evaluation.grid_low, config.evaluation.grid_size)
    setting, whole = _Setting(posterior, config, of, measures, grid), Fold(trained, of.data.train, of.data.validation)
    started = perf_counter()
    with recorded() as said:
        choose = _of_laplace if posterior.approximation == "laplace" else _of_variational
        chosen = choose(setting, whole, folds)
    seconds = {"fit": perf_counter() - started}
    for choice, (number, la) in chosen.items():
        ends = ["the precision is at an end of the grid"] if number in (0, len(grid) - 1) else []
        yield Fit(la, {choice: float(grid[number])}, seconds, said + ends)


def _of_laplace(setting: _Setting, whole: Fold, folds: Sequence[Fold]) -> dict[str, tuple[int, Laplace]]:
    """Choose from whole curves: one fit has the curvature, and one pass the derivatives, for all precisions."""

    def curve_of(fold: Fold) -> tuple[Float[np.ndarray, " D"], Laplace, list[Any]]:
        la, fit, precisions = setting.begun(fold)
        la = fit(la)
        curve = la.validation_curve(*fold.held_out, setting.grid, microbatch=setting.config.curvature.microbatch)
        nll = np.where(curve.converged, curve.negative_log_likelihood, np.inf)
        return len(fold.held_out.labels) * nll, la, precisions

    of_validation, la, precisions = curve_of(whole)
    curves = {FOLDS: sum(curve_of(fold)[0] for fold in folds), VALIDATION: of_validation}
    if not all(np.isfinite(curve).any() for curve in curves.values()):
        raise ValueError(
            "the decompositions must have converged at one precision of the grid at least; use more "
            "`curvature.max_vectors`"
        )
    numbers = {choice: int(np.nanargmin(curve)) for choice, curve in curves.items()}
    return {choice: (number, la.with_prior_precision(precisions[number])) for choice, number in numbers.items()}


def _of_variational(setting: _Setting, whole: Fold, folds: Sequence[Fold]) -> dict[str, tuple[int, Laplace]]:
    """Walk from the largest precision down, where a fit takes fewest steps, until both choices have been passed.

    The posteriors of all networks are in memory together.
    """

    def along(fold: Fold) -> Iterator[tuple[float, Laplace]]:
        la, fit, precisions = setting.begun(fold)
        images, labels = fold.held_out
        for precision in precisions:  # each fit begins at the one before, at a larger precision
            la = fit(la.with_prior_precision(precision))
            probs = la.predictive(images, microbatch=setting.config.curvature.microbatch)
            yield len(labels) * negative_log_likelihood(probs, labels), la

    lowest = {FOLDS: np.inf, VALIDATION: np.inf}
    chosen: dict[str, tuple[int, Laplace]] = {}
    for number, ((of_validation, la), *of_folds) in enumerate(zip(*map(along, [whole, *folds]), strict=True)):
        for choice, nll in ((FOLDS, sum(value for value, _ in of_folds)), (VALIDATION, of_validation)):
            if nll < lowest[choice]:
                lowest[choice], chosen[choice] = nll, (number, la)
        if chosen and number - max(best for best, _ in chosen.values()) == PATIENCE:
            break
    return chosen
