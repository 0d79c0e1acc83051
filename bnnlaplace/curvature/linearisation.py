"""A network linearised at its weights on a batch: J v and J' u, whose residuals are kept or computed again.

Kept, they make every product cheap and take memory for all examples. Computed again, a microbatch at a time, they take
memory for one microbatch, and a forward pass more in each product, which is less than it seems, as they need not be
read from memory.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import examples, number_type, ravel, size, unraveler
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.model.network import Network

Middle = Callable[[Float[Array, "m ... C"], Float[Array, " m"], Float[Array, "m ... C"]], Float[Array, "m ... C"]]


class Linearisation(NamedTuple):
    """A network linearised at its weights on all inputs; M = N and the padding of the last microbatch.

    Attributes
    ----------
    outputs
        f(params, x_n), the padding last; differentiable in what `linearise` was given.
    weights
        One for an example, zero for padding.
    pushforward
        v -> J v, (P,) -> (M, ..., C).
    pullback
        u -> J' u, (M, ..., C) -> (P,).
    sandwich
        (middle, v) -> J' middle(outputs, weights, J v), (P,) -> (P,), for a function of each example alone.
    size
        P.
    """

    outputs: Float[Array, "M ... C"]
    weights: Float[Array, " M"]
    pushforward: Callable[[Float[Array, " P"]], Float[Array, "M ... C"]]
    pullback: Callable[[Float[Array, "M ... C"]], Float[Array, " P"]]
    sandwich: Callable[[Middle, Float[Array, " P"]], Float[Array, " P"]]
    size: int


def linearise(
    network: Network, params: PyTree, inputs: Float[Array, "N ..."], *, microbatch: int = 128, remat: bool = False
) -> Linearisation:
    """Linearise a network at `params` on all inputs, `microbatch` of them in one step of the inner loop.

    Cost: a forward pass and what its derivative saves; memory: those residuals at all N examples, kept as long as the
    result. With `remat`: those of one microbatch, and a forward pass more in each call of `pushforward`, `pullback` and
    `sandwich`. Call it inside `jit`.

    Parameters
    ----------
    network, params
        What is linearised, and at which weights.
    inputs
        All N examples.
    microbatch
        Examples in one step of the inner loop.
    remat
        Compute the residuals again where they are needed, in derivatives of the products, too.
    """
    batches = mb.split(inputs, microbatch, number_type(params))
    return (_rematerialised if remat else _kept)(network, params, batches)


def _kept(network: Network, params: PyTree, batches: mb.Microbatches) -> Linearisation:
    num_batches, unravel = len(batches.weights), unraveler(params)

    def every_output(params: PyTree) -> Float[Array, "num size ... C"]:
        if num_batches > 1:
            return jax.lax.map(lambda x: network(params, x), batches.inputs)
        # A loop over one microbatch would copy what it saves for the derivative.
        return network(params, examples(batches.inputs, 0))[None]

    outputs, jvp = jax.linearize(every_output, params)
    transposed = jax.linear_transpose(jvp, params)
    shape = outputs.shape
    rows = (shape[0] * shape[1], *shape[2:])
    stacked, weights = outputs.reshape(rows), batches.weights.reshape(-1)

    def pushforward(vector: Float[Array, " P"]) -> Float[Array, "M ... C"]:
        return jvp(unravel(vector)).reshape(rows)

    def pullback(cotangent: Float[Array, "M ... C"]) -> Float[Array, " P"]:
        return ravel(transposed(cotangent.reshape(shape))[0])

    def sandwich(middle: Middle, vector: Float[Array, " P"]) -> Float[Array, " P"]:
        return pullback(middle(stacked, weights, pushforward(vector)))

    return Linearisation(stacked, weights, pushforward, pullback, sandwich, size(params))


def _rematerialised(network: Network, params: PyTree, batches: mb.Microbatches) -> Linearisation:
    """Each step of a loop is checkpointed: a derivative of the loop would keep the residuals of all of them."""
    unravel = unraveler(params)

    @jax.checkpoint
    def outputs_of(inputs: PyTree, params: PyTree) -> Float[Array, "size ... C"]:
        return network(params, inputs)

    @jax.checkpoint
    def pushed(inputs: PyTree, params: PyTree, vector: Float[Array, " P"]) -> Float[Array, "size ... C"]:
        return jax.jvp(lambda p: network(p, inputs), (params,), (unravel(vector),))[1]

    @jax.checkpoint
    def pulled(inputs: PyTree, params: PyTree, cotangent: Float[Array, "size ... C"]) -> Float[Array, " P"]:
        return ravel(jax.vjp(lambda p: network(p, inputs), params)[1](cotangent)[0])

    outputs = jax.lax.map(lambda x: outputs_of(x, params), batches.inputs)
    shape = outputs.shape
    rows = (shape[0] * shape[1], *shape[2:])

    def pushforward(vector: Float[Array, " P"]) -> Float[Array, "M ... C"]:
        return jax.lax.map(lambda x: pushed(x, params, vector), batches.inputs).reshape(rows)

    def pullback(cotangent: Float[Array, "M ... C"]) -> Float[Array, " P"]:
        parts = batches.inputs, cotangent.reshape(shape)
        return mb.summed(lambda part: pulled(part[0], params, part[1]), parts)

    def sandwich(middle: Middle, vector: Float[Array, " P"]) -> Float[Array, " P"]:
        @jax.checkpoint
        def of_batch(batch: mb.Microbatches, params: PyTree, vector: Float[Array, " P"]) -> Float[Array, " P"]:
            outputs, jvp = jax.linearize(lambda p: network(p, batch.inputs), params)
            cotangent = middle(outputs, batch.weights, jvp(unravel(vector)))
            return ravel(jax.linear_transpose(jvp, params)(cotangent)[0])

        return mb.summed(lambda batch: of_batch(batch, params, vector), batches)

    stacked, weights = outputs.reshape(rows), batches.weights.reshape(-1)
    return Linearisation(stacked, weights, pushforward, pullback, sandwich, size(params))
