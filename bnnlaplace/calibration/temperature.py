"""Temperature scaling: one number, fitted on held-out logits, that mends over- or underconfidence."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Float
from scipy.optimize import brentq

from bnnlaplace.core.checks import Labels, checked_labels, described


class Temperature(NamedTuple):
    """A fitted temperature.

    Attributes
    ----------
    temperature
        T.
    nll
        The NLL at T, in nats per example.
    at_bound
        Whether the search stopped at one of its bounds.
    """

    temperature: float
    nll: float
    at_bound: bool


def fit_temperature(
    logits: Float[np.ndarray, "N C"] | Float[Array, "N C"], labels: Labels, bounds: tuple[float, float] = (0.1, 10.0)
) -> Temperature:
    """The temperature T that minimises the NLL of softmax(logits / T), for held-out logits.

    The NLL is convex in 1/T, so its slope there has at most one sign change, found by Brent's method to 1e-12 in
    log T. Logits that classify every example correctly have their optimum at T = 0, logits worse than chance at
    T = infinity; the result is then the bound, with `at_bound` true.

    Source: Guo et al., "On calibration of modern neural networks", ICML 2017, section 4.2.

    Parameters
    ----------
    logits, labels
        (N, C) outputs before the softmax and (N,) integer classes, both held out.
    bounds
        The smallest and the largest T.

    Raises
    ------
    ValueError
        Wrong shapes, non-finite logits, labels outside the classes, bounds that are not 0 < low < high.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or 0 in logits.shape or not np.isfinite(logits).all():
        raise ValueError(
            "fit_temperature(logits=...) must be a non-empty (N, C) array of finite numbers; got "
            f"{described(logits)}; pass the outputs before the softmax"
        )
    labels = checked_labels(labels, *logits.shape)
    low, high = bounds
    if not 0 < low < high < np.inf:
        raise ValueError(
            f"fit_temperature(bounds=...) must satisfy 0 < low < high < inf; got {bounds}; try (0.1, 10.0)"
        )
    # Relative to the label's own logit the NLL is mean log sum exp(margins / T), with no cancellation.
    margins = logits - np.take_along_axis(logits, labels[:, None], axis=1)

    def slope(log_temperature: float) -> float:
        """Derivative of the NLL with respect to 1/T."""
        scaled = margins / np.exp(log_temperature)
        weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return float(((weights * margins).sum(axis=1) / weights.sum(axis=1)).mean())

    at_bound = True
    if slope(np.log(low)) <= 0:
        temperature = low
    elif slope(np.log(high)) >= 0:
        temperature = high
    else:
        temperature = float(np.exp(brentq(slope, np.log(low), np.log(high), xtol=1e-12)))
        at_bound = False
    return Temperature(temperature, float(np.logaddexp.reduce(margins / temperature, axis=1).mean()), at_bound)
