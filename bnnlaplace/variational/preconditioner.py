"""A few leading directions of the curvature, for the conjugate gradients of the mean.

A diagonal or Kronecker-factored structure is a poor inverse of the whole GGN: with it a Newton step of a small
convolutional network takes 70 products. Where rows of the Jacobian are kept, a block of products takes little longer
than one. So a short block Krylov decomposition at the present sites costs as much as a few of those steps, and with it
a step takes about ten products.
"""

import jax
from jaxtyping import Array

from bnnlaplace import krylov
from bnnlaplace.core.tree import number_type, size
from bnnlaplace.fitting.prepare import Model, rounding_of
from bnnlaplace.prior import Prior
from bnnlaplace.structure import KrylovStructure, SampleStructure, Structure

PROBES, VECTORS = 48, 240


def preconditioner(
    structure: Structure, at_sites: Model, prior: Prior, key: Array, *, scale: float, microbatch: int
) -> Structure:
    """Return a structure whose inverse preconditions conjugate gradients: the one at hand, or a decomposition.

    Parameters
    ----------
    structure
        The structure of the posterior.
    at_sites
        The model with the curvature of the present sites.
    prior
        The prior, in whose coordinates the structures are.
    key
        Seeds the probes.
    scale, microbatch
        (all training examples) / (examples in the data), and how many examples are linearised at a time.
    """
    dimension = size(at_sites.head.params)
    if at_sites.rows is None or isinstance(structure, SampleStructure) or dimension <= VECTORS:
        return structure
    probes = jax.random.normal(key, (PROBES, dimension), number_type(at_sites.head.params))
    product = at_sites.whitened(prior).ggn_product(scale, microbatch=microbatch)
    for decomposition in krylov.block_lanczos(product, probes, max_vectors=VECTORS):  # noqa: B007
        pass
    return KrylovStructure.from_decomposition(decomposition, rounding=rounding_of(at_sites))
