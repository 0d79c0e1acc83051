"""The evidence as the experiment of Krämer et al. 2024 (arXiv 2405.17277) on a VAN formulates it, for `evidence.py`.

Its curvature is linearised anew in each product, one example at a time under `vmap`, and Lambda is a C x C matrix of
each example, by `jax.hessian` of the loss in output space. The determinant is that of G + delta I itself, by stochastic
Lanczos quadrature of the logarithm with matfree's adjoint of Lanczos, one Rademacher probe at a time. Each prior
precision has a decomposition of its own. The numbers are those of log p(D), where the experiment left out the log
likelihood and factors of a half, which take no part in the cost.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from bnnlaplace import Network
from bnnlaplace.core.tree import ravel, size, unraveler

try:
    from matfree import decomp, funm
except ImportError:
    decomp = funm = None


def cross_entropy(outputs: Array, target: Array) -> Array:
    """-log p(y | f) of one example; labels are one-hot, since matfree's adjoint takes no integers."""
    return -jnp.sum(target * jax.nn.log_softmax(outputs))


def curvature_product(network: Network, *, whole_batch: bool = False) -> Callable[..., Array]:
    """The map from (v, delta, weights, images, targets) to (G + delta I) v, which computes everything anew.

    `whole_batch` linearises all images together in place of one at a time. The experiment does not do this; it shows
    how much of the difference comes from that.
    """
    unravel = unraveler(network.params)

    def add_up(vector: Array, params: Array, images: Array, targets: Array) -> Array:
        outputs, push = jax.linearize(lambda p: network(p, images), unravel(params))
        pull = jax.linear_transpose(push, unravel(params))
        curvature = jax.vmap(jax.hessian(cross_entropy))(outputs, targets)
        curved = jnp.einsum("nij,nj->ni", curvature, push(unravel(vector)))
        return ravel(pull(curved)[0])

    def product(vector: Array, precision: Array, params: Array, images: Array, targets: Array) -> Array:
        if whole_batch:
            image = add_up(vector, params, images, targets)
        else:
            one = jax.vmap(lambda x, y: add_up(vector, params, x[None], y[None]))
            image = jnp.sum(one(images, targets), axis=0)
        return image + precision * vector

    return product


def log_evidence(
    network: Network, num_matvecs: int, *, whole_batch: bool = False
) -> Callable[[Array, Array, Array, Array, Array], Array]:
    """The map from (log delta, weights, probes, images, labels) to the evidence, with reverse mode by matfree."""
    matvec = curvature_product(network, whole_batch=whole_batch)
    form = funm.monte_carlo_funm_sym_logdet(decomp.tridiag_sym(num_matvecs))

    def value(log_precision: Array, params: Array, probes: Array, images: Array, targets: Array) -> Array:
        precision = jnp.exp(log_precision)
        forms = jax.lax.map(lambda z: form(matvec, z, precision, params, images, targets), probes)
        log_prior = 0.5 * (size(network.params) * log_precision - precision * params @ params)
        outputs = network(unraveler(network.params)(params), images)
        return -jnp.sum(jax.vmap(cross_entropy)(outputs, targets)) + log_prior - 0.5 * jnp.mean(forms)

    return value
