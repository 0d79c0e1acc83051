"""The variational posterior of the linearised network: the Gaussian that maximises the evidence lower bound."""

from bnnlaplace.variational.options import Progress, Variational

__all__ = ["Progress", "Variational"]
