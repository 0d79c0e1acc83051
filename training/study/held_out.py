"""Choose the prior precision of a posterior by what it predicts for images that its network has not seen.

A temperature is fitted on the shares of the training images that the networks of folds have not seen. The same networks
and shares choose a prior precision here: at each precision of the grid every network gets a posterior, and the one with
the lowest NLL of all shares is that of the network of all images. Beside it stands the choice of the validation images.
"""

from collections.abc import Iterator, Sequence
from time import perf_counter
from typing import NamedTuple

import jax
import numpy as np

from bnnlaplace import Laplace
from bnnlaplace.calibration import negative_log_likelihood
from training.config import Config
from training.data.reading import Split
from training.study.config import Measures, Posterior
from training.study.fits import FOLDS, VALIDATION, Fit, fitting, recorded, unfitted
from training.study.networks import RegimeData, Trained

# Precisions of the grid without a lower NLL after which the walk ends.
PATIENCE = 4


class Fold(NamedTuple):
    """A network, the images that it was trained on, and those that it has not seen."""

    trained: Trained
    train: Split
    held_out: Split


class _Lowest(NamedTuple):
    """The lowest NLL so far, where on the grid it was, and the posterior there."""

    nll: float
    number: int
    la: Laplace


def fit_by_folds(
    posterior: Posterior,
    trained: Trained,
    folds: Sequence[Fold],
    config: Config,
    of: RegimeData,
    measures: Measures,
) -> Iterator[Fit]:
    """Yield the posterior at the precision that the folds choose, and at the one that the validation images choose.

    The grid is walked from its largest precision down, where a fit takes fewest steps, until both choices have long
    been passed.

    Cost: for the network and for each fold a fit and the derivatives of the images that it predicts, or both of them
    for each precision on the way of a variational posterior.

    Raises
    ------
    ValueError, MemoryError
        The posterior cannot be fitted.
    """
    grid = np.geomspace(config.evaluation.grid_high, config.evaluation.grid_low, config.evaluation.grid_size)

    def walk(trained: Trained, train: Split, scored: Split) -> Iterator[tuple[Laplace, float]]:
        """Yield the posterior at each precision of the grid, with the NLL of some images."""
        la, microbatch = unfitted(posterior, trained, config, of, train), config.curvature.microbatch
        fit_again = fitting(posterior, trained, config, train, measures)
        factors = grid / float(la.prior.precision)  # the ratios of the precisions stay
        precisions = [jax.tree.map(lambda each, factor=factor: factor * each, la.prior_precision) for factor in factors]
        if posterior.approximation == "laplace":  # its curvature is that of any precision, and so are the derivatives
            la = fit_again(la)
            curve = la.validation_curve(*scored, grid, microbatch=microbatch).negative_log_likelihood
            for precision, nll in zip(precisions, curve, strict=True):
                yield la.with_prior_precision(precision), len(scored.labels) * float(nll)
            return
        for precision in precisions:  # each fit begins at the one before, at a larger precision
            la = fit_again(la.with_prior_precision(precision))
            probs = la.predictive(scored.images, microbatch=microbatch)
            yield la, len(scored.labels) * negative_log_likelihood(probs, scored.labels)

    started, lowest = perf_counter(), {}
    with recorded() as said:
        walks = [walk(trained, of.data.train, of.data.validation), *(walk(*fold) for fold in folds)]
        for number, ((la, of_validation), *of_folds) in enumerate(zip(*walks, strict=True)):
            nll = {VALIDATION: of_validation}
            if folds:
                nll[FOLDS] = sum(value for _, value in of_folds)
            for choice, value in nll.items():
                if choice not in lowest or value < lowest[choice].nll:
                    lowest[choice] = _Lowest(value, number, la)
            if number - max(each.number for each in lowest.values()) == PATIENCE:
                break
    seconds = {"fit": perf_counter() - started}
    for choice, (_, number, la) in lowest.items():
        ends = ["the precision is at an end of the grid"] if number in (0, len(grid) - 1) else []
        yield Fit(la, {choice: float(grid[number])}, seconds, said + ends)

