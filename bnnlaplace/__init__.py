"""Laplace approximations for Bayesian neural networks in JAX, with a GGN that need not be formed.

The stages, in the order data pass through them: a `Network` and a `Likelihood`; the curvature (`curvature`), its Krylov
decomposition (`krylov`) and what is fitted from it (`structure`); the evidence and the choice of the prior (`evidence`,
`prior`, `validation`); predictions (`predictive`, `link`) and how good they are (`calibration`, `detection`,
`temperature`); the Gaussian that maximises the evidence lower bound (`Variational`). `Laplace` assembles them.
"""

from bnnlaplace import calibration, curvature, evidence, krylov, marglik, predictive, prior, structure
from bnnlaplace.calibration import detection, temperature
from bnnlaplace.core.compiler import warn_of_wrong_sums
from bnnlaplace.core.types import Estimate, LinearOperator, LowerBound, NotAModeWarning, SaturatedPosteriorWarning
from bnnlaplace.laplace import Laplace
from bnnlaplace.marglik import marglik_training
from bnnlaplace.model.likelihood import Likelihood, bernoulli, categorical, gaussian, heteroscedastic, tempered
from bnnlaplace.model.network import Network
from bnnlaplace.predictive import link, validation
from bnnlaplace.variational import Variational

warn_of_wrong_sums()

__all__ = [
    "Estimate",
    "Laplace",
    "Likelihood",
    "LinearOperator",
    "LowerBound",
    "Network",
    "NotAModeWarning",
    "SaturatedPosteriorWarning",
    "Variational",
    "bernoulli",
    "calibration",
    "categorical",
    "curvature",
    "detection",
    "evidence",
    "gaussian",
    "heteroscedastic",
    "krylov",
    "marglik",
    "marglik_training",
    "link",
    "predictive",
    "prior",
    "structure",
    "temperature",
    "tempered",
    "validation",
]
