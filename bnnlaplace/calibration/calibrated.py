"""Calibrated log likelihood: the score of predictions whose temperature was fitted on other held-out examples.

A comparison by plain log likelihood is often one of temperatures, which a user can mend with a few labelled examples.
"""

import numpy as np
import scipy  # its parts are imported at their first use
from jaxtyping import Float

from bnnlaplace.calibration import predictions
from bnnlaplace.calibration.predictions import Labels, Probs
from bnnlaplace.calibration.temperature import fit_temperature
from bnnlaplace.core import checks

_MOST_SPLITS = 10_000


def calibrated_log_likelihood(probs: Probs, labels: Labels, *, seed: int, splits: int = 5) -> float:
    """Mean log likelihood after temperature scaling that was fitted on the other half of the examples.

    The examples are divided into two random halves. On each half the temperature T of p**(1/T), normalised to sum to
    one, is fitted by maximum likelihood, and the other half is scored with it. So every example is scored once in each
    division, with a temperature that has not seen it. The result is the mean over examples and over `splits` divisions.

    Source: Ashukha et al., "Pitfalls of in-domain uncertainty estimation and ensembling in deep learning", ICLR 2020
    (arXiv 2002.06470), "test-time cross-validation".

    Parameters
    ----------
    probs
        (N, C) class probabilities, already averaged over posterior samples. For a binary classifier also P(class 1),
        (N,) or (N, 1).
    labels
        (N,) integer classes.
    seed
        Seeds the divisions, which depend on nothing but this and N. Methods that share it see the same halves.
    splits
        How many divisions, at most 10,000. A few remove most of the noise of the division.

    Returns
    -------
    float
        In nats per example, at most 0; higher is better. Minus infinity if a label was given probability exactly 0,
        which is 0 at any temperature.

    Raises
    ------
    ValueError
        As `negative_log_likelihood`. Also if there are fewer than two examples, `seed` is negative, or `splits` is
        below 1.

    Notes
    -----
    T is searched from 0.1 to 10, as by `fit_temperature`. In a half without a wrong prediction it is 0.1; a wrong
    prediction in the other half then costs much. Use some hundred examples. Takes 2 `splits` fits of a temperature.

    Examples
    --------
    >>> probs, labels = np.tile([0.9, 0.1], (200, 1)), np.repeat([0, 1], [150, 50])  # 75 % right, said to be 90 %
    >>> round(calibrated_log_likelihood(probs, labels, seed=0), 2)  # -0.65 as they are, at best -0.56
    -0.57
    """
    return float(calibrated_log_likelihoods(probs, labels, seed=seed, splits=splits).mean())


def calibrated_log_likelihoods(probs: Probs, labels: Labels, *, seed: int, splits: int = 5) -> Float[np.ndarray, " N"]:
    """Return for each example its mean over the divisions of `calibrated_log_likelihood`, for `paired_interval`.

    Parameters
    ----------
    probs, labels, seed, splits
        As for `calibrated_log_likelihood`.
    """
    where = "calibrated_log_likelihood"
    probs, labels, _ = predictions.labelled(probs, labels)
    if len(labels) < 2:
        raise ValueError(f"{where}(probs=...) must hold at least two examples, for two halves; got 1; give hundreds")
    rng = np.random.default_rng(checks.count(seed, f"{where}(seed=...)", least=0))
    splits = checks.count(splits, f"{where}(splits=...)", most=_MOST_SPLITS, advice="5 is usual")
    impossible = np.take_along_axis(probs, labels[:, None], axis=1)[:, 0] == 0
    # The logarithm of a zero at another class than the label; up to T = 10 the floor adds less than 1e-30 to the sum.
    logits = np.log(np.maximum(probs, np.finfo(np.float64).tiny))
    total = np.where(impossible, -np.inf, 0.0)
    for _ in range(splits):
        first, second = np.array_split(rng.permutation(len(labels)), 2)
        for fitted, scored in ((first, second), (second, first)):
            fitted = fitted[~impossible[fitted]]  # no temperature makes these likelier
            temperature = fit_temperature(logits[fitted], labels[fitted]).temperature if len(fitted) else 1.0
            scores = scipy.special.log_softmax(logits[scored] / temperature, axis=1)
            total[scored] += np.take_along_axis(scores, labels[scored, None], axis=1)[:, 0]
    return total / splits
