"""Search the validation scores over prior precisions from coarse to fine, where the whole grid would cost more."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.curvature import rows
from bnnlaplace.fitted import Fitted
from bnnlaplace.predictive.link import LinkApproximation
from bnnlaplace.predictive.validation import ValidationCurve, validation_curves
from bnnlaplace.structure import SampleStructure

# How many precisions the search tries first, then on both sides of the lowest score, and at last beside it.
COARSE, FINER, FINEST = 6, 4, 2


def searched_curves(
    posteriors: Sequence[Fitted],
    data: tuple[Inputs, AnyArray],
    precisions: Sequence[float] | Float[ArrayLike, " D"],
    *,
    link_approx: LinkApproximation | None = None,
    key: Array | None = None,
    num_samples: int,
    microbatch: int = 64,
) -> list[ValidationCurve]:
    """Compute `validation_curves`, of some posteriors at those precisions alone that lead to the lowest NLL.

    Cost decides. A posterior whose derivatives serve all precisions gets the whole grid: one with exact covariances,
    and one that is read from rows of the Jacobian. A `SampleStructure` that goes forward needs a derivative for each
    vector of its basis to serve the whole grid, or one for each sample and precision. If samples at twelve precisions
    are fewer, six precisions from end to end are tried first, then four on both sides of the lowest NLL, then its two
    neighbours in the grid. That finds the minimum of the grid if the NLL has no other. Scores in between are NaN.

    Parameters
    ----------
    posteriors
        Posteriors of one network and likelihood.
    data
        Arrays (x, y), which a search reads several times.
    precisions
        The grid, increasing.
    link_approx, key, num_samples, microbatch
        As for `validation_curve`.
    """
    grid = np.asarray(precisions, np.float64)
    options = {"link_approx": link_approx, "key": key, "num_samples": num_samples, "microbatch": microbatch}
    is_searched = [_search_pays(fitted, data[0], len(grid), num_samples, microbatch) for fitted in posteriors]
    whole = [fitted for fitted, searched in zip(posteriors, is_searched, strict=True) if not searched]
    curves = iter(validation_curves(whole, data, grid, **options) if whole else [])

    def searched(fitted: Fitted) -> ValidationCurve:
        curve = coarse_to_fine(lambda some: validation_curves([fitted], data, some, **options)[0], grid)
        return curve._replace(converged=np.array([fitted.structure.reservation(delta) is None for delta in grid]))

    return [searched(one) if search else next(curves) for one, search in zip(posteriors, is_searched, strict=True)]


def coarse_to_fine(
    curve_at: Callable[[Float[np.ndarray, " d"]], ValidationCurve], grid: Float[np.ndarray, " D"]
) -> ValidationCurve:
    """Evaluate a curve at some precisions of a grid, ever closer to its lowest NLL.

    At the others scores are NaN, and `converged` is False.

    If none of the first precisions can be chosen, because samples have not converged or scores are not finite, the
    whole grid is evaluated.
    """
    scores = np.full((2, len(grid)), np.nan)
    converged, tried = np.zeros(len(grid), bool), np.zeros(len(grid), bool)

    def evaluate(chosen: Int[np.ndarray, " d"]) -> None:
        curve = curve_at(grid[chosen])
        scores[:, chosen] = curve.negative_log_likelihood, curve.expected_calibration_error
        converged[chosen], tried[chosen] = curve.converged, True

    def eligible() -> Int[np.ndarray, " e"]:
        return np.flatnonzero(converged & np.isfinite(scores[0]))

    evaluate(_spread(0, len(grid) - 1, COARSE))
    for count in (FINER, FINEST):
        if not len(eligible()):
            evaluate(np.flatnonzero(~tried))
            break
        best = int(eligible()[np.argmin(scores[0, eligible()])])
        done = np.flatnonzero(tried)
        low, high = int(done[done < best].max(initial=0)), int(done[done > best].min(initial=len(grid) - 1))
        if count == FINEST:
            low, high = max(low, best - 2), min(high, best + 2)
        # As many points on either side of the best; those that were tried before are not tried again.
        chosen = np.concatenate([_spread(low, best, count // 2 + 2), _spread(best, high, count // 2 + 2)])
        chosen = np.unique(chosen[~tried[chosen]])
        if len(chosen):
            evaluate(chosen)
    return ValidationCurve(grid, *scores, converged)


def _spread(low: int, high: int, count: int) -> Int[np.ndarray, " c"]:
    """At most `count` different integers from `low` to `high`, both included, as evenly as they can be."""
    return np.unique(np.round(np.linspace(low, high, count)).astype(int))


def _search_pays(fitted: Fitted, inputs: Inputs, num_precisions: int, num_samples: int, microbatch: int) -> bool:
    """Whether samples at the precisions of a search need fewer forward derivatives than the whole grid."""
    if not isinstance(fitted.structure, SampleStructure):
        return False
    fitted, features = fitted.at_features(inputs[:1], microbatch=microbatch)
    for_grid = min(fitted.structure.num_vectors, num_precisions * num_samples)
    sizes = rows.row_sizes(fitted.network.unlinearised(), features, microbatch)
    is_read = sizes is not None and rows.directions_pay(sizes, for_grid)
    return not is_read and (COARSE + FINER + FINEST) * num_samples < for_grid
