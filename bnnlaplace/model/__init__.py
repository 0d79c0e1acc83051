"""Networks, likelihoods and data, and what can be told of them from the traced forward pass."""

from bnnlaplace.model.batched import outputs
from bnnlaplace.model.likelihood import Likelihood, bernoulli, categorical, gaussian, heteroscedastic, tempered
from bnnlaplace.model.network import Network
from bnnlaplace.model.subset import last_layer

__all__ = [
    "Likelihood",
    "Network",
    "bernoulli",
    "categorical",
    "gaussian",
    "heteroscedastic",
    "last_layer",
    "outputs",
    "tempered",
]
