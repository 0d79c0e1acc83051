"""The exact diagonal of the GGN, computed without a Jacobian in memory."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Real, Shaped

from bnnlaplace.core.linalg import einsum
from bnnlaplace.core.tree import number_type, summed_type
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature import tapped
from bnnlaplace.curvature.direct import examples_at_once
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.likelihoods.closed_forms import curvature_diagonal
from bnnlaplace.model.network import Network


def ggn_diagonal(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Shaped[ArrayLike, "N ..."]],
    *,
    weights: Real[ArrayLike, "N ..."] | None = None,
    points: Float[ArrayLike, "N ..."] | None = None,
    scale: Real[ArrayLike, ""] = 1.0,
    microbatch: int = 32,
) -> Float[Array, " P"]:
    """Compute the exact diagonal of G = scale * sum_n w_n J_n' Lambda_n J_n. Call it inside `jit`.

    The diagonal is scale * sum_n w_n sum_c (J_n' B_n e_c)^2. With a the inputs of a layer and g the derivative with
    respect to its outputs, an example's gradient of the layer's matrix is sum_t a_t g_t' over positions t. With one
    position, its squares are those of a times those of g, so that no gradient of the matrix is computed. With several,
    the gradient is computed for one output at a time. For a layer whose outputs are those of the network the sum of
    squares of g is the diagonal of Lambda.

    Parameters
    ----------
    network, likelihood
        The network f, and the likelihood with its curvature Lambda = B B'.
    params
        The weights at which the network is differentiated.
    inputs
        All N examples.
    weights
        How many times each example counts, by default once: w_n, or a number for each position of its outputs.
    points
        Where the curvature of the likelihood is evaluated, (N, ...): by default at the outputs. Only likelihoods that
        say so have other points, such as `sites.by_factors`.
    scale
        (all training examples) / (examples in `inputs`).
    microbatch
        How many examples are in one step of the inner loop.

    Notes
    -----
    Cost: a backward pass for each example and output, without the gradients of matrices that have one position; none
    for a last layer, and one for each of its inputs if outputs are twice as many (see `bnnlaplace.curvature.head`).
    Memory: the activations of `microbatch` examples and their gradients of all other weights.
    """
    microbatch = examples_at_once(network, inputs, microbatch)
    batches = mb.split(inputs, microbatch, number_type(params), weights, points)
    leaves = jax.tree.leaves(params)

    def batch_sums(batch: mb.Microbatches) -> list[Array]:
        passed = tapped.forward(network, params, batch.inputs)
        weights, factor_mv = mb.within_factor(batch.weights, likelihood.factor_mv, batch.points)
        single = {leaf for leaf, layer in passed.weights.layers.items() if layer.positions == 1}
        others = [leaf for leaf in range(len(leaves)) if leaf not in passed.direct]

        def squares(gradients: dict[int, Array]) -> dict[int, Array]:
            return {
                leaf: gradients[leaf][:, 0] ** 2 if leaf in single else _squared(passed, leaf, gradients[leaf], weights)
                for leaf in others
            }

        points = batch.at(passed.outputs)
        sums = tapped.over_factor(passed, likelihood, factor_mv, points, squares) if others else {}
        if passed.direct:
            of_outputs = curvature_diagonal(likelihood, points)
            for leaf in passed.direct:
                sums[leaf] = of_outputs if leaf in single else einsum("m,mc->c", weights, of_outputs)
        for leaf in single:
            # So far the squares of g, example by example; those of a are the same for all outputs.
            weighted = mb.over_outputs(weights, sums[leaf]) * sums[leaf]
            matrix = einsum("mi,mo->io", passed.layer_inputs[leaf][:, 0] ** 2, weighted)
            sums[leaf] = passed.weights.layers[leaf].layout.flat(matrix)
        return [sums[leaf].astype(summed_type(value.dtype)) for leaf, value in enumerate(leaves)]

    return scale * jnp.concatenate(mb.summed(batch_sums, batches))


def _squared(
    passed: tapped.Pass, leaf: int, gradients: Float[Array, "M ..."], weights: Float[Array, " M"]
) -> Float[Array, " p"]:
    """Sum the squared gradients of one leaf over examples, each with its weight."""
    layer = passed.weights.layers.get(leaf)
    if layer is None:
        return einsum("m,mp->p", weights, gradients.reshape(len(gradients), -1) ** 2)
    matrices = einsum("mti,mto->mio", passed.layer_inputs[leaf], gradients)
    return layer.layout.flat(einsum("m,mio->io", weights, matrices**2))
