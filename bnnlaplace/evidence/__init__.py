"""The log marginal likelihood of the Laplace approximation, its gradients and its terms."""

from bnnlaplace.evidence.log_determinant import Rules
from bnnlaplace.evidence.log_joint import BestNoise, FixedNoise, LogJoint
from bnnlaplace.evidence.log_likelihood import DataTerms
from bnnlaplace.evidence.marginal import EvidenceCurve, IsotropicEvidence, curve, isotropic, log_marginal_likelihood

__all__ = [
    "BestNoise",
    "DataTerms",
    "EvidenceCurve",
    "FixedNoise",
    "IsotropicEvidence",
    "LogJoint",
    "Rules",
    "curve",
    "isotropic",
    "log_marginal_likelihood",
]
