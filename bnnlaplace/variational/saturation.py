"""Whether a posterior fits the data whose evidence chose its prior: a check of the Gaussian at the mode.

The evidence is the product of the predictions of each example given the ones before. Knowing all examples cannot make
their predictions worse on average, so that the NLL of training data under the true posterior is at most minus the log
evidence of an example. Where training has saturated the likelihood, the curvature at the mode is almost zero, and the
Gaussian reaches where the training labels are wrong: then its NLL is larger (Kuss and Rasmussen, "Assessing approximate
inference for binary Gaussian process classification", 2005).
"""

import math
from typing import NamedTuple

import jax
import numpy as np

from bnnlaplace.core import checks
from bnnlaplace.core.types import SaturatedPosteriorWarning
from bnnlaplace.fitted import Fitted
from bnnlaplace.model.data import Data
from bnnlaplace.model.spec import output_shape
from bnnlaplace.variational.draws import draw
from bnnlaplace.variational.expectations import log_mean_probs

# Pairs of samples of the outputs of each example, and examples that are differentiated at a time.
NUM_PAIRS, MICROBATCH = 32, 64
# Standard errors over the examples by which the NLL must exceed the evidence.
CERTAINTY = 2.0


class TrainingFit(NamedTuple):
    """How well a posterior predicts training data, beside its evidence.

    Attributes
    ----------
    nll, sem
        Mean NLL of training examples under the posterior, in nats, and its standard error over them.
    evidence
        Minus the log evidence of an example, in nats.
    """

    nll: float
    sem: float
    evidence: float

    @property
    def is_saturated(self) -> bool:
        """Whether the NLL is larger than the evidence allows."""
        return self.nll - CERTAINTY * self.sem > self.evidence


def training_fit(fitted: Fitted, sample: Data) -> TrainingFit:
    """Compare the NLL of some training examples under a posterior with its evidence.

    Parameters
    ----------
    fitted
        The posterior.
    sample
        The examples, in one batch. Cost: predictions of them.
    """
    likelihood, inputs = fitted.likelihood, sample.first
    # The noise decides nothing but this comparison, so that a key of its own serves.
    (outputs,) = draw(fitted, sample, key=jax.random.key(0), num_pairs=NUM_PAIRS, microbatch=MICROBATCH)
    nll = -np.asarray(log_mean_probs(likelihood, outputs), np.float64)
    of_targets = np.asarray(likelihood.weights_of(outputs.targets, outputs.weights), np.float64)
    count = max(float(of_targets.sum()), np.finfo(float).tiny)
    mean = float(nll.sum()) / count
    sem = float(np.std(nll)) / math.sqrt(len(nll)) * len(nll) / count
    num_targets = float(fitted.log_likelihood.num_targets) * float(likelihood.temperature)
    per_target = math.prod(output_shape(fitted.network, inputs)[1:]) // math.prod(of_targets.shape[1:])
    return TrainingFit(mean, sem, -float(fitted.log_marginal_likelihood().mean) * per_target / num_targets)


def warn_if_saturated(fit: TrainingFit) -> None:
    """Warn if the NLL of training data is larger than the evidence allows, with both numbers and the remedy."""
    if not fit.is_saturated:
        return
    checks.warn(
        "the posterior does not fit the data that chose its prior: on training examples its NLL is "
        f"{fit.nll:.3g} nats, where the evidence says {fit.evidence:.3g}. Training has saturated the likelihood, so "
        "that the Gaussian at the mode is not the posterior; use fit(approximation='variational', key=...), or "
        "optimize_prior_precision('gridsearch', validation=...)",
        SaturatedPosteriorWarning,
    )
