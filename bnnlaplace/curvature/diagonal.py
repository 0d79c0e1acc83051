"""The exact diagonal of the GGN, without a Jacobian in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import number_type
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature import tapped
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network


def ggn_diagonal(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Float[Array, "N ..."]],
    *,
    weights: Float[Array, " N"] | None = None,
    scale: float = 1.0,
    microbatch: int = 32,
) -> Float[Array, " P"]:
    """diag(G) = scale * sum_n w_n sum_c (J_n' B_n e_c)^2, exactly.

    With a the inputs of a layer and g the derivative with respect to its outputs, an example's gradient of the layer's
    matrix is sum_t a_t g_t' over positions t. Where there is one position the squares are those of a times those of g,
    so that no gradient of that matrix is computed; elsewhere it is, for one output at a time.

    Parameters
    ----------
    network, likelihood
        Where f and Lambda come from.
    params
        The weights at which the network is differentiated.
    inputs
        All N examples.
    weights
        w, by default all ones. Zero for examples that do not count.
    scale
        (all training examples) / (examples in `inputs`).
    microbatch
        Examples in one step of the inner loop.

    Notes
    -----
    Cost: a backward pass for each example and output, without the gradients of matrices that have one position. Memory:
    the activations of `microbatch` examples and their gradients of all other weights. Call it inside `jit`.
    """
    batches = mb.split(inputs, microbatch, number_type(params), weights)
    leaves = jax.tree.leaves(params)

    def of_batch(batch: mb.Microbatches) -> list[Array]:
        passed = tapped.forward(network, params, batch.inputs)
        single = {leaf for leaf, layer in passed.weights.layers.items() if layer.positions == 1}

        def squares(column: Array) -> list[Array]:
            found = passed.gradients(likelihood.factor_mv(passed.outputs, column))
            return [
                found[leaf][:, 0] ** 2 if leaf in single else _squared(passed, leaf, found[leaf], batch.weights)
                for leaf in range(len(leaves))
            ]

        added = tapped.over_columns(squares, passed.outputs)
        for leaf in single:
            weighted = mb.over_outputs(batch.weights, added[leaf]) * added[leaf]
            matrix = einsum("mi,mo->io", passed.layer_inputs[leaf][:, 0] ** 2, weighted)
            added[leaf] = passed.weights.layers[leaf].layout.flat(matrix)
        return added

    return scale * jnp.concatenate(mb.summed(of_batch, batches))


def _squared(passed: tapped.Pass, leaf: int, found: Array, weights: Float[Array, " M"]) -> Float[Array, " p"]:
    """sum_m w_m (gradient of example m)^2, of one leaf."""
    layer = passed.weights.layers.get(leaf)
    if layer is None:
        return einsum("m,mp->p", weights, found.reshape(len(found), -1) ** 2)
    gradients = einsum("mti,mto->mio", passed.layer_inputs[leaf], found)
    return layer.layout.flat(einsum("m,mio->io", weights, gradients**2))
