"""Laplace approximations for Bayesian neural networks in JAX, with a GGN that is never formed.

The stages, in the order data pass through them: a `Network` and a `Likelihood`; the curvature (`curvature`), its Krylov
decomposition (`krylov`) and what is fitted from it (`structure`); the evidence and the choice of the prior (`evidence`, `prior`);
predictions (`predictive`) and their calibration (`calibration`). `Laplace` assembles them.
"""

from bnnlaplace import calibration, curvature, evidence, krylov, predictive, prior, structure
from bnnlaplace.laplace import Laplace
from bnnlaplace.likelihood import Likelihood, bernoulli, categorical, gaussian
from bnnlaplace.network import Network
from bnnlaplace.types import Estimate, LinearOperator

__all__ = [
    "Estimate",
    "Laplace",
    "Likelihood",
    "LinearOperator",
    "Network",
    "bernoulli",
    "calibration",
    "categorical",
    "curvature",
    "evidence",
    "gaussian",
    "krylov",
    "predictive",
    "prior",
    "structure",
]
