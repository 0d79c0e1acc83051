"""The log marginal likelihood of the Laplace approximation, its gradients and its terms."""

from bnnlaplace.evidence.log_determinant import Rules
from bnnlaplace.evidence.log_joint import LogJoint
from bnnlaplace.evidence.log_likelihood import LogLikelihood
from bnnlaplace.evidence.marginal import EvidenceCurve, IsotropicEvidence, curve, isotropic, log_marginal_likelihood
from bnnlaplace.evidence.terms import EvidenceTerms, evidence_terms

__all__ = [
    "EvidenceCurve",
    "EvidenceTerms",
    "IsotropicEvidence",
    "LogJoint",
    "LogLikelihood",
    "Rules",
    "curve",
    "evidence_terms",
    "isotropic",
    "log_marginal_likelihood",
]
