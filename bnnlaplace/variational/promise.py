"""How much the bound promises to gain by other sites: the decrement of a Newton step in the covariance.

With the covariance Sigma = (P0 + sum_n J_n' W_n J_n)^-1 the bound changes to first order, for a change of the sites by
D = sum_n J_n' dW_n J_n, by

    1/2 tr(Sigma R Sigma D),    R = sum_n J_n' (E Lambda(f_n) - W_n) J_n,

as its gradient in Sigma is -R / 2. Of a step to the maximum of a quadratic function half of that is gained. For two
independent samples a and b of the posterior, E (a' R b) (a' D b) is the trace, so the pairs of a few samples estimate
it. Structures that do not hold the whole covariance are adapted to a part of R alone: there it is too large.
"""

import numpy as np
from jaxtyping import Array

from bnnlaplace.core.tree import number_type
from bnnlaplace.fitting.prepare import Model
from bnnlaplace.prior import Prior
from bnnlaplace.structure import SampleStructure, Structure
from bnnlaplace.variational.sites import Sites, at_sites

# Samples of the weights, of which all pairs are taken.
NUM_SAMPLES = 16


@np.errstate(over="ignore", invalid="ignore")  # a gain that is not finite promises more than any tolerance
def promised_gain(
    model: Model,
    prior: Prior,
    structure: Structure,
    sites: tuple[Sites, Sites, Sites],
    key: Array,
    *,
    scale: float,
    microbatch: int,
) -> float:
    """Estimate what a step of the sites gains, in nats; NaN if the curvature of the proposed ones overflows.

    Cost: as many products with the GGN as there are samples, at each of three sites.

    Parameters
    ----------
    model, prior, structure
        The posterior; the structure is in the coordinates of the prior.
    sites
        Those the structure was fitted to, those that its outputs have on average, and those after the step.
    key
        Seeds the samples.
    scale, microbatch
        (all training examples) / (examples in the data), and how many examples are linearised at a time.
    """
    count = min(NUM_SAMPLES, structure.num_probes) if isinstance(structure, SampleStructure) else NUM_SAMPLES
    whitened = model.whitened(prior)
    samples = structure.samples(key, count, float(prior.precision)).astype(number_type(whitened.head.params))

    def overlaps(at: Sites) -> np.ndarray:
        product = at_sites(whitened, at).ggn_product(scale, microbatch=microbatch)
        return np.asarray(samples, np.float64) @ np.asarray(product(samples), np.float64).T

    here, proposed, after = map(overlaps, sites)
    is_pair = ~np.eye(count, dtype=bool)
    return float(0.25 * ((proposed - here) * (after - here))[is_pair].mean())
