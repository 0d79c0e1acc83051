"""The dense GGN: exact, for small networks, and the oracle that every matrix-free path is tested against."""

import jax
from jaxtyping import Array, Float, PyTree

from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.precise import einsum
from bnnlaplace.tree import ravel, unraveler


def jacobian(network: Network, params: PyTree, inputs: Float[Array, "N ..."]) -> Float[Array, "N ... C P"]:
    """d f(params, x_n) / d params by reverse mode, one example at a time within one vectorised call.

    Memory: P numbers for each output of each example.

    Parameters
    ----------
    network, params
        What is differentiated, and at which weights.
    inputs
        All N examples.
    """
    unravel = unraveler(params)

    def outputs(vector: Float[Array, " P"], x: Array) -> Float[Array, "... C"]:
        return network(unravel(vector), x[None])[0]

    return jax.vmap(jax.jacrev(outputs), in_axes=(None, 0))(ravel(params), inputs)


def ggn(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: Float[Array, "N ..."],
    *,
    scale: float = 1.0,
) -> Float[Array, "P P"]:
    """G = scale * sum_n J_n' Lambda_n J_n as a matrix. Cost: P (C + P) multiplications for each output of each.

    Parameters
    ----------
    network, likelihood
        Where f and Lambda come from.
    params
        The weights at which the network is linearised.
    inputs
        All N examples.
    scale
        (all training examples) / N.
    """
    jac = jacobian(network, params, inputs)
    outputs = network(params, inputs)
    curved = jax.vmap(likelihood.hessian_mv, in_axes=(None, -1), out_axes=-1)(outputs, jac)
    return scale * einsum("rp,rq->pq", *(rows.reshape(-1, rows.shape[-1]) for rows in (jac, curved)))
