"""Temperature scaling: one number, fitted on held-out logits, that corrects over- or underconfidence."""

from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported at their first use, which takes half a second
from jaxtyping import Float

from bnnlaplace.calibration import predictions
from bnnlaplace.calibration.predictions import Labels, Probs, Weights
from bnnlaplace.core import checks

# Rows of non-negative numbers whose sums are this close to one are probabilities.
_LIKE_PROBABILITIES = 1e-2


class Temperature(NamedTuple):
    """A fitted temperature.

    Attributes
    ----------
    temperature
        The fitted T.
    nll
        The negative log likelihood at T, in nats per example.
    at_bound
        Whether the search stopped at one of its bounds.
    """

    temperature: float
    nll: float
    at_bound: bool


def fit_temperature(
    logits: Probs,
    labels: Labels,
    bounds: tuple[float, float] = (0.1, 10.0),
    *,
    weights: Weights | None = None,
) -> Temperature:
    """Find the temperature T that minimises the NLL of softmax(logits / T) on held-out logits.

    The NLL is convex in 1/T, so its slope in 1/T changes sign at most once. Brent's method finds the place to 1e-12 in
    log T. Logits that classify every example correctly have their optimum at T = 0, and logits worse than chance at
    T = infinity; the result is then the bound, with `at_bound` true.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2.

    Parameters
    ----------
    logits, labels
        (N, C) outputs before the softmax and (N,) integer classes, both held out. Or the outputs (N,) or (N, 1) before
        the sigmoid of a binary classifier, with labels 0 and 1.
    bounds
        The smallest and the largest T.
    weights
        How many times each example counts, at least 0, (N,); by default once.

    Raises
    ------
    ValueError
        If shapes are wrong, logits are not finite or are the probabilities, labels lie outside the classes, weights are
        negative, not finite or all zero, or not 0 < low < high.

    Notes
    -----
    Warns if all outputs of a binary classifier lie between 0 and 1, as probabilities do.
    """
    where = "fit_temperature(logits=...)"
    logits, labels = predictions.numbers(logits, where), predictions.numbers(labels, "labels")
    logits, labels, weights = predictions.present(logits, labels, weights)
    rows = predictions.logit_rows(logits, where)
    is_binary = np.size(logits) == len(rows)
    _check_not_probabilities(rows, is_binary)
    labels = predictions.classes(labels, *rows.shape, is_binary=is_binary)
    low, high = _checked_bounds(bounds)
    # Relative to the label's own logit the NLL is mean log sum exp(margins / T), without cancellation.
    margins = rows - np.take_along_axis(rows, labels[:, None], axis=1)

    def slope(log_temperature: float) -> float:
        """Derivative of the NLL with respect to 1/T."""
        scaled = margins / np.exp(log_temperature)
        terms = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return float(np.average((terms * margins).sum(axis=1) / terms.sum(axis=1), weights=weights))

    if slope(np.log(low)) <= 0:
        temperature, at_bound = float(low), True
    elif slope(np.log(high)) >= 0:
        temperature, at_bound = float(high), True
    else:
        log_temperature = scipy.optimize.brentq(slope, np.log(low), np.log(high), xtol=1e-12)
        temperature, at_bound = float(np.exp(log_temperature)), False
    nll = float(np.average(np.logaddexp.reduce(margins / temperature, axis=1), weights=weights))
    return Temperature(temperature, nll, at_bound)


def _checked_bounds(bounds: tuple[float, float]) -> tuple[float, float]:
    """Return the two bounds as floats, or raise ValueError."""
    ends = np.asarray(bounds if isinstance(bounds, (tuple, list, np.ndarray)) else None)
    if ends.shape == (2,) and np.issubdtype(ends.dtype, np.number) and not np.iscomplexobj(ends):
        low, high = map(float, ends)
        if 0 < low < high < np.inf:
            return low, high
    raise ValueError(
        f"fit_temperature(bounds=...) must satisfy 0 < low < high < inf; got {bounds!r:.80}; try (0.1, 10.0)"
    )


def _check_not_probabilities(rows: Float[np.ndarray, "N C"], is_binary: bool) -> None:
    """Raise ValueError if rows are those that a softmax returns; warn if a column looks like that of a sigmoid."""
    if is_binary:
        if ((rows >= 0) & (rows <= 1)).all() and np.ptp(rows[:, 1]) > 0:
            checks.warn(
                "all logits of fit_temperature lie between 0 and 1: if they are the probabilities p of a binary "
                "classifier, pass the outputs before the sigmoid, or log(p / (1 - p))"
            )
    elif (rows >= 0).all() and np.abs(rows.sum(axis=1) - 1).max() <= _LIKE_PROBABILITIES:
        raise ValueError(
            "fit_temperature(logits=...) must be the outputs before the softmax; got rows of probabilities, which are "
            "not negative and sum to 1; pass the outputs before the softmax, or np.log of the probabilities"
        )
