"""Laplace approximations for Bayesian neural networks in JAX, with a GGN that is never formed.

The stages, in the order data pass through them: a `Network` and a `Likelihood`; the curvature (`curvature`), its Krylov
decomposition (`krylov`) and what is fitted from it (`structure`); the evidence and the choice of the prior (`evidence`,
`prior`, `validation`); predictions (`predictive`, `link`) and how good they are (`calibration`, `detection`,
`temperature`). `Laplace` assembles them.
"""

from bnnlaplace import (
    calibration,
    curvature,
    detection,
    evidence,
    krylov,
    link,
    predictive,
    prior,
    structure,
    temperature,
    validation,
)
from bnnlaplace.laplace import Laplace
from bnnlaplace.likelihood import Likelihood, bernoulli, categorical, gaussian
from bnnlaplace.mode import NotAModeWarning
from bnnlaplace.network import Network
from bnnlaplace.types import Estimate, LinearOperator

__all__ = [
    "Estimate",
    "Laplace",
    "Likelihood",
    "LinearOperator",
    "Network",
    "NotAModeWarning",
    "bernoulli",
    "calibration",
    "categorical",
    "curvature",
    "detection",
    "evidence",
    "gaussian",
    "krylov",
    "link",
    "predictive",
    "prior",
    "structure",
    "temperature",
    "validation",
]
