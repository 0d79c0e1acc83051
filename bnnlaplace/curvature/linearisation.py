"""A network linearised at its weights on a batch: products J v and J' u, with residuals that are kept or recomputed.

Kept residuals make every product cheap, and take memory for all examples. Recomputed ones take memory for one
microbatch, and each product takes another forward pass. That costs less than it seems, because recomputed residuals
need not be read from memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, ArrayLike, Float, PyTree, Real, Shaped

from bnnlaplace.core.tree import examples, number_type, ravel, size, unraveler
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.model.network import Network

Middle = Callable[[Float[Array, "m ... C"], Float[Array, "m ..."], Float[Array, "m ... C"]], Float[Array, "m ... C"]]


class Linearisation(NamedTuple):
    """A network linearised at its weights on M inputs: all N examples, and the padding of the last microbatch.

    Attributes
    ----------
    outputs
        f(params, x_n), with the padding last. They are differentiable in the arguments of `linearise`.
    weights
        How many times each example counts, or each position of its outputs; zero for padding.
    pushforward
        v -> J v, (P,) -> (M, ..., C).
    pullback
        u -> J' u, (M, ..., C) -> (P,).
    sandwich
        (middle, v) -> J' middle(outputs, weights, J v), (P,) -> (P,). The function `middle` must treat each example on
        its own.
    size
        P.
    """

    outputs: Float[Array, "M ... C"]
    weights: Float[Array, "M ..."]
    pushforward: Callable[[Float[Array, " P"]], Float[Array, "M ... C"]]
    pullback: Callable[[Float[Array, "M ... C"]], Float[Array, " P"]]
    sandwich: Callable[[Middle, Float[Array, " P"]], Float[Array, " P"]]
    size: int


def linearise(
    network: Network,
    params: PyTree,
    inputs: PyTree[Shaped[ArrayLike, "N ..."]],
    *,
    weights: Real[ArrayLike, "N ..."] | None = None,
    microbatch: int = 128,
    remat: bool = False,
) -> Linearisation:
    """Linearise a network at `params` on all inputs. Call it inside `jit`.

    Cost: a forward pass, and what its derivative saves. Memory: these residuals for all N examples, as long as the
    result is in use. With `remat`: the residuals of one microbatch, and another forward pass in each call of
    `pushforward`, `pullback` and `sandwich`.

    Parameters
    ----------
    network, params
        The network, and the weights at which it is linearised.
    inputs
        All N examples.
    weights
        How many times each example counts, or each position of its outputs; by default once.
    microbatch
        How many examples are in one step of the inner loop.
    remat
        Whether the residuals are computed again where they are needed, also in derivatives of the products.
    """
    batches = mb.split(inputs, microbatch, number_type(params), weights)
    products = (_rematerialised if remat else _kept)(network, params, batches)
    shape = products.outputs.shape
    rows = (shape[0] * shape[1], *shape[2:])
    outputs, weights = products.outputs.reshape(rows), batches.weights.reshape(-1, *batches.weights.shape[2:])

    def pushforward(vector: Float[ArrayLike, " P"]) -> Float[Array, "M ... C"]:
        return products.push(vector).reshape(rows)

    def pullback(cotangent: Float[ArrayLike, "M ... C"]) -> Float[Array, " P"]:
        return products.pull(cotangent.reshape(shape))

    def sandwich(middle: Middle, vector: Float[ArrayLike, " P"]) -> Float[Array, " P"]:
        return pullback(middle(outputs, weights, pushforward(vector)))

    return Linearisation(outputs, weights, pushforward, pullback, products.sandwich or sandwich, size(params))


class _Products(NamedTuple):
    """The outputs of `num` microbatches and both products, with an axis of microbatches.

    `sandwich` is None if it is to be made of the other two.
    """

    outputs: Float[Array, "num size ... C"]
    push: Callable[[Float[Array, " P"]], Float[Array, "num size ... C"]]
    pull: Callable[[Float[Array, "num size ... C"]], Float[Array, " P"]]
    sandwich: Callable[[Middle, Float[Array, " P"]], Float[Array, " P"]] | None = None


def _kept(network: Network, params: PyTree, batches: mb.Microbatches) -> _Products:
    unravel = unraveler(params)

    def all_outputs(params: PyTree) -> Float[Array, "num size ... C"]:
        if len(batches.weights) > 1:
            return jax.lax.map(lambda x: network(params, x), batches.inputs)
        # A loop over one microbatch would copy what it saves for the derivative.
        return network(params, examples(batches.inputs, 0))[None]

    outputs, jvp = jax.linearize(all_outputs, params)
    transposed = jax.linear_transpose(jvp, params)
    return _Products(outputs, lambda vector: jvp(unravel(vector)), lambda cotangent: ravel(transposed(cotangent)[0]))


def _rematerialised(network: Network, params: PyTree, batches: mb.Microbatches) -> _Products:
    # Each step of a loop is checkpointed, because a derivative of the loop would keep the residuals of all its steps.
    unravel = unraveler(params)

    @jax.checkpoint
    def outputs_of(inputs: PyTree, params: PyTree) -> Float[Array, "size ... C"]:
        return network(params, inputs)

    @jax.checkpoint
    def pushed(inputs: PyTree, params: PyTree, vector: Float[ArrayLike, " P"]) -> Float[Array, "size ... C"]:
        return jax.jvp(lambda p: network(p, inputs), (params,), (unravel(vector),))[1]

    @jax.checkpoint
    def pulled(inputs: PyTree, params: PyTree, cotangent: Float[ArrayLike, "size ... C"]) -> Float[Array, " P"]:
        return ravel(jax.vjp(lambda p: network(p, inputs), params)[1](cotangent)[0])

    def push(vector: Float[ArrayLike, " P"]) -> Float[Array, "num size ... C"]:
        return jax.lax.map(lambda x: pushed(x, params, vector), batches.inputs)

    def pull(cotangents: Float[ArrayLike, "num size ... C"]) -> Float[Array, " P"]:
        return mb.summed(lambda part: pulled(part[0], params, part[1]), (batches.inputs, cotangents))

    def sandwich(middle: Middle, vector: Float[ArrayLike, " P"]) -> Float[Array, " P"]:
        @jax.checkpoint
        def sandwiched(batch: mb.Microbatches, params: PyTree, vector: Float[ArrayLike, " P"]) -> Float[Array, " P"]:
            outputs, jvp = jax.linearize(lambda p: network(p, batch.inputs), params)
            cotangent = middle(outputs, batch.weights, jvp(unravel(vector)))
            return ravel(jax.linear_transpose(jvp, params)(cotangent)[0])

        # One loop in place of two, so that each microbatch is linearised once.
        return mb.summed(lambda batch: sandwiched(batch, params, vector), batches)

    outputs = jax.lax.map(lambda x: outputs_of(x, params), batches.inputs)
    return _Products(outputs, push, pull, sandwich)
