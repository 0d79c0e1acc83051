"""Temperature scaling: one number, fitted on held-out logits, that corrects over- or underconfidence."""

from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported at their first use, which takes half a second
from jaxtyping import Array, Float

from bnnlaplace.core import checks
from bnnlaplace.core.checks import Labels


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
    logits: Float[np.ndarray, "N C"] | Float[Array, "N C"],
    labels: Labels,
    bounds: tuple[float, float] = (0.1, 10.0),
) -> Temperature:
    """Find the temperature T that minimises the NLL of softmax(logits / T) on held-out logits.

    The NLL is convex in 1/T, so its slope in 1/T changes sign at most once. Brent's method finds the place to 1e-12 in
    log T. Logits that classify every example correctly have their optimum at T = 0, and logits worse than chance at
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
        If shapes are wrong, logits are not finite, labels lie outside the classes, or not 0 < low < high.
    """
    logits = np.asarray(logits, np.float64)
    if logits.ndim != 2 or 0 in logits.shape or not np.isfinite(logits).all():
        raise ValueError(
            "fit_temperature(logits=...) must be a non-empty (N, C) array of finite numbers; got "
            f"{checks.shape_and_faults(logits)}; pass the outputs before the softmax"
        )
    labels = checks.classes(labels, *logits.shape)
    low, high = bounds
    if not 0 < low < high < np.inf:
        raise ValueError(
            f"fit_temperature(bounds=...) must satisfy 0 < low < high < inf; got {bounds}; try (0.1, 10.0)"
        )
    # Relative to the label's own logit the NLL is mean log sum exp(margins / T), without cancellation.
    margins = logits - np.take_along_axis(logits, labels[:, None], axis=1)

    def slope(log_temperature: float) -> float:
        """Derivative of the NLL with respect to 1/T."""
        scaled = margins / np.exp(log_temperature)
        weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return float(((weights * margins).sum(axis=1) / weights.sum(axis=1)).mean())

    if slope(np.log(low)) <= 0:
        temperature, at_bound = float(low), True
    elif slope(np.log(high)) >= 0:
        temperature, at_bound = float(high), True
    else:
        log_temperature = scipy.optimize.brentq(slope, np.log(low), np.log(high), xtol=1e-12)
        temperature, at_bound = float(np.exp(log_temperature)), False
    nll = float(np.logaddexp.reduce(margins / temperature, axis=1).mean())
    return Temperature(temperature, nll, at_bound)
