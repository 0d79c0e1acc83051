"""Products with the generalised Gauss-Newton matrix G = scale * sum_n J_n' Lambda_n J_n, which is never formed.

There are three arrangements of the same product:

- `ggn_operator` works on a `Linearisation` of one batch, for differentiable Krylov methods.
- `dual_operator` is B' J J' B on stacked outputs, which has the same nonzero spectrum. It is for networks with more
  weights than outputs.
- `block_product` takes S vectors at once and linearises each microbatch once for all of them. It holds one microbatch
  in memory, so that data of any size stream through. Block Lanczos calls it.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float, PyTree, Real, Shaped

from bnnlaplace.core.tree import number_type, ravel, unraveler
from bnnlaplace.core.types import LinearOperator
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature.linearisation import Linearisation
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network


def ggn_operator(
    linearised: Linearisation, likelihood: Likelihood, *, scale: Real[ArrayLike, ""] = 1.0
) -> LinearOperator:
    """Return the P x P operator G = scale * sum_n J_n' Lambda_n J_n.

    Parameters
    ----------
    linearised
        The linearised network: J and the outputs.
    likelihood
        The likelihood with its curvature Lambda.
    scale
        (all training examples) / (examples in `linearised`).

    Returns
    -------
    LinearOperator
        An operator on vectors of P numbers. One product costs as much as about two forward and two backward passes.
    """

    def curved(outputs: Array, weights: Array, tangent: Array) -> Array:
        return scale * mb.over_outputs(weights, tangent) * likelihood.hessian_mv(outputs, tangent)

    return LinearOperator(partial(linearised.sandwich, curved), linearised.size)


def dual_operator(
    linearised: Linearisation,
    likelihood: Likelihood,
    *,
    scale: Real[ArrayLike, ""] = 1.0,
    prior_precision: Real[ArrayLike, ""] | Real[ArrayLike, " P"] = 1.0,
) -> LinearOperator:
    """Return the operator scale * B' J P0^-1 J' B on the stacked outputs of all examples.

    It has the nonzero spectrum of P0^-1/2 G P0^-1/2, so log det(I + .) is the same. Its vectors hold all outputs
    instead of P weights. Rows of padding are zero.

    Parameters
    ----------
    linearised, likelihood, scale
        As for `ggn_operator`.
    prior_precision
        The diagonal of P0: one number, or one for each weight.
    """
    outputs, pull = linearised.outputs, dual_pullback(linearised, likelihood, scale=scale)
    # Square roots of the weights stand on both sides, so that the operator is symmetric, also if weights differ.
    root = _root_scale(linearised, scale)

    def matvec(vector: Float[ArrayLike, " V"]) -> Float[Array, " V"]:
        weighted = pull(vector) / prior_precision
        return likelihood.factor_transpose_mv(outputs, root * linearised.pushforward(weighted)).reshape(-1)

    return LinearOperator(matvec, outputs.size)


def dual_pullback(
    linearised: Linearisation, likelihood: Likelihood, *, scale: Real[ArrayLike, ""] = 1.0
) -> Callable[[Float[Array, " V"]], Float[Array, " P"]]:
    """Return the function v -> sqrt(scale) J' B v from stacked outputs to weights: the first half of `dual_operator`.

    Parameters
    ----------
    linearised, likelihood, scale
        As for `ggn_operator`.
    """
    outputs, root = linearised.outputs, _root_scale(linearised, scale)
    return lambda vector: linearised.pullback(root * likelihood.factor_mv(outputs, vector.reshape(outputs.shape)))


def _root_scale(linearised: Linearisation, scale: Real[ArrayLike, ""]) -> Float[Array, "M ..."]:
    """Return sqrt(scale) for examples and zero for padding, shaped so that it multiplies outputs."""
    return jnp.sqrt(scale * mb.over_outputs(linearised.weights, linearised.outputs))


def block_product(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Shaped[ArrayLike, "N ..."]],
    *,
    weights: Real[ArrayLike, "N ..."] | None = None,
    points: Float[ArrayLike, "N ..."] | None = None,
    scale: Real[ArrayLike, ""] = 1.0,
    microbatch: int = 64,
    vectors_at_once: int = 8,
) -> Callable[[Float[Array, "S P"]], Float[Array, "S P"]]:
    """Return the function V -> V G of S row vectors at once, which streams over microbatches of the data.

    Cost of a call: one forward pass and S products with G. Memory: the residuals of one microbatch, and
    `vectors_at_once` times its activations.

    Parameters
    ----------
    network, likelihood
        The network f, and the likelihood with its curvature Lambda.
    params
        The weights at which the network is linearised.
    inputs
        All N examples.
    weights
        How many times each example counts, or each position of its outputs; by default once.
    points
        Where the curvature of the likelihood is evaluated, (N, ...): by default at the outputs. Only likelihoods that
        say so have other points, such as `sites.by_factors`.
    scale
        (all training examples) / N.
    microbatch, vectors_at_once
        How many examples are linearised at a time, and how many vectors go through a microbatch at a time. They bound
        the memory.
    """
    unravel = unraveler(params)
    batches = mb.split(inputs, microbatch, number_type(params), weights, points)

    def product(vectors: Float[ArrayLike, "S P"]) -> Float[Array, "S P"]:
        def product_of(batch: mb.Microbatches) -> Float[Array, "S P"]:
            # The transpose shares the residuals of this forward pass. `jax.vjp` would run and keep a second one.
            outputs, pushforward = jax.linearize(lambda p: network(p, batch.inputs), params)
            pullback = jax.linear_transpose(pushforward, params)

            def product_with(vector: Float[Array, " P"]) -> Float[Array, " P"]:
                curved = likelihood.hessian_mv(batch.at(outputs), pushforward(unravel(vector)))
                return ravel(pullback(scale * mb.over_outputs(batch.weights, curved) * curved)[0])

            return jax.lax.map(product_with, vectors, batch_size=min(vectors_at_once, len(vectors)))

        return mb.summed(product_of, batches)

    return product
