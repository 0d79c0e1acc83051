"""Training of weights and prior precisions by the evidence: the objective, the steps, and the loop."""

from bnnlaplace.marglik.fixed_point import PriorUpdate, prior_update
from bnnlaplace.marglik.objective import (
    EvidenceOptions,
    log_precision_of,
    negative_log_evidence,
    precision_of,
)
from bnnlaplace.marglik.steps import MarglikSettings, MarglikState, evidence_step, initial_state, map_step
from bnnlaplace.marglik.training import MarglikResult, marglik_training

__all__ = [
    "EvidenceOptions",
    "MarglikResult",
    "MarglikSettings",
    "MarglikState",
    "PriorUpdate",
    "evidence_step",
    "initial_state",
    "log_precision_of",
    "map_step",
    "marglik_training",
    "negative_log_evidence",
    "precision_of",
    "prior_update",
]
