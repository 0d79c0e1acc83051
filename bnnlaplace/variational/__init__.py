"""The variational posterior of the linearised network: the Gaussian that maximises the evidence lower bound."""

from bnnlaplace.variational.choose_prior import choose_prior
from bnnlaplace.variational.fit import fit_posterior, fit_variational
from bnnlaplace.variational.options import Progress, Variational

__all__ = ["Progress", "Variational", "choose_prior", "fit_posterior", "fit_variational"]
