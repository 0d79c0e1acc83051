"""The prior precision by validation data: the Monte Carlo predictive as a function of it."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bnnlaplace import calibration, link, predictive, prior
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.structure import SampleStructure, Structure


class ValidationCurve(NamedTuple):
    """Monte Carlo predictive on validation data as a function of the prior precision; arrays of shape (D,).

    Attributes
    ----------
    prior_precision
        The grid.
    negative_log_likelihood
        In nats per label.
    expected_calibration_error
        With equal-width bins.
    converged
        Whether the structure has converged there; NLL and ECE elsewhere are not those of the posterior.
    """

    prior_precision: Float[np.ndarray, " D"]
    negative_log_likelihood: Float[np.ndarray, " D"]
    expected_calibration_error: Float[np.ndarray, " D"]
    converged: Bool[np.ndarray, " D"]

    @property
    def best_precision(self) -> float:
        """The prior precision of the lowest NLL among those where the structure has converged.

        Raises
        ------
        ValueError
            If it has converged at none of them, or the NLL there is not a number.
        """
        if not self.converged.any():
            raise ValueError(
                "the decomposition must have converged at one prior precision of the grid at least; it has at none "
                f"from {self.prior_precision.min():g} to {self.prior_precision.max():g}; try larger ones, or fit with "
                "more max_vectors"
            )
        eligible = np.where(self.converged, self.negative_log_likelihood, np.nan)
        return float(self.prior_precision[prior.lowest(eligible, "the validation NLL")])


def validation_curve(
    network: Network,
    likelihood: Likelihood,
    structure: Structure,
    inputs: Float[Array, "N ..."],
    labels: Int[Array, "N ..."],
    precisions: Iterable[float],
    *,
    key: Array,
    num_samples: int,
    microbatch: int = 64,
) -> ValidationCurve:
    """NLL and ECE of the Monte Carlo predictive at many prior precisions.

    Parameters
    ----------
    network, likelihood, structure
        The posterior; of a likelihood of class labels.
    inputs, labels
        Validation data: a label for each output position.
    precisions
        The grid.
    key, num_samples
        Of the samples, as for `predictive.functional_posteriors`. The same at every prior precision, so that the curve
        is smooth.
    microbatch
        Inputs differentiated at a time; bounds memory.

    Raises
    ------
    ValueError
        If the likelihood is not one of class labels, the grid not positive, inputs or predictions not finite, or labels
        not among the classes.

    Notes
    -----
    The network is differentiated once for the whole grid: see `predictive.functional_posteriors`.
    """
    if likelihood.target_kind != "label":
        raise ValueError(
            "a validation curve must be of a likelihood of class labels, as 'classification' is; got "
            f"{likelihood.name!r}; choose its prior precision by the evidence, method='marglik'"
        )
    grid = prior.checked_grid(list(precisions), "validation_curve(precisions=...)")
    posteriors = predictive.functional_posteriors(
        network, structure, inputs, grid, key=key, num_samples=num_samples, microbatch=microbatch
    )
    labels = np.reshape(labels, -1)
    nll, ece = [], []
    for found in posteriors:
        probs = np.asarray(link.monte_carlo(likelihood, found.mean, found.deviations), np.float64)
        probs = probs.reshape(-1, probs.shape[-1])
        nll.append(calibration.negative_log_likelihood(probs, labels))
        ece.append(calibration.expected_calibration_error(probs, labels))
    converged = np.ones(len(grid), bool)
    if isinstance(structure, SampleStructure):
        converged = np.array([structure.reservation(precision) is None for precision in grid])
    return ValidationCurve(grid, np.asarray(nll), np.asarray(ece), converged)
