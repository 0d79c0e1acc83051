"""Products with the generalised Gauss-Newton matrix G = scale * sum_n J_n' Lambda_n J_n, never formed.

Three arrangements of the same product, each for its use:

- `ggn_operator`: linearised once over all data, residuals kept; for differentiable Krylov methods on data that fit.
- `dual_operator`: B' J J' B on stacked outputs, the same nonzero spectrum; for more weights than outputs.
- `block_product`: S vectors at once, linearised once per microbatch and block. The forward pass is shared by S vectors
  and memory holds one microbatch only, so data of any size stream through; this is what block Lanczos calls.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.tree import ravel, size, unraveler
from bnnlaplace.types import LinearOperator


def ggn_operator(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: Float[Array, "N ..."],
    *,
    scale: float = 1.0,
    microbatch: int = 128,
) -> LinearOperator:
    """The P x P operator G = scale * sum_n J_n' Lambda_n J_n, linearised once at `params`.

    Parameters
    ----------
    network, likelihood
        Where J and Lambda come from.
    params
        The point of linearisation; differentiable.
    inputs
        All examples that G sums over.
    scale
        (all training examples) / (examples in `inputs`).
    microbatch
        Examples in one step of the inner loop.

    Returns
    -------
    LinearOperator
        On vectors of P numbers. One product costs about two forward and two backward passes' arithmetic. Memory: the
        residuals of linearising at all N examples, kept as long as the operator. Call it inside `jit`.
    """
    outputs, pushforward, pullback, weights = _linearise(network, params, inputs, microbatch)
    unravel = unraveler(params)

    def matvec(vector: Float[Array, " P"]) -> Float[Array, " P"]:
        tangent = pushforward(unravel(vector))
        cotangent = scale * weights[..., None] * likelihood.hessian_mv(outputs, tangent)
        return ravel(pullback(cotangent)[0])

    return LinearOperator(matvec, size(params))


def dual_operator(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: Float[Array, "N ..."],
    *,
    scale: float = 1.0,
    prior_precision: Float[Array, ""] | Float[Array, " P"] = 1.0,
    microbatch: int = 128,
) -> LinearOperator:
    """The operator scale * B' J P0^-1 J' B on stacked outputs.

    It has the nonzero spectrum of P0^-1/2 G P0^-1/2, so log det(I + .) is the same, with vectors of N C instead of
    P numbers. N counts the padding of the last microbatch too; padded rows are zero.
    """
    outputs, pushforward, pullback, weights = _linearise(network, params, inputs, microbatch)
    unravel = unraveler(params)
    root = jnp.sqrt(scale * weights)[..., None]

    def matvec(vector: Float[Array, " NC"]) -> Float[Array, " NC"]:
        cotangent = root * likelihood.factor_mv(outputs, vector.reshape(outputs.shape))
        weighted = ravel(pullback(cotangent)[0]) / prior_precision
        return (likelihood.factor_transpose_mv(outputs, root * pushforward(unravel(weighted)))).reshape(-1)

    return LinearOperator(matvec, outputs.size)


def block_product(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: Float[Array, "N ..."],
    *,
    scale: float = 1.0,
    microbatch: int = 64,
    vectors_at_once: int = 8,
) -> Callable[[Float[Array, "S P"]], Float[Array, "S P"]]:
    """Return V -> V G for S row vectors at once, streamed over microbatches of the data.

    Arithmetic: one forward pass and S GGN products. Memory: residuals of one microbatch, and `vectors_at_once` times
    its activations.
    """
    unravel = unraveler(params)
    batches = mb.split(inputs, microbatch, ravel(params).dtype)

    def product(vectors: Float[Array, "S P"]) -> Float[Array, "S P"]:
        def add(total: Array, batch: mb.Microbatches) -> tuple[Array, None]:
            outputs, pushforward = jax.linearize(lambda p: network(p, batch.inputs), params)
            pullback = jax.linear_transpose(pushforward, params)

            def one(vector: Float[Array, " P"]) -> Float[Array, " P"]:
                tangent = pushforward(unravel(vector))
                cotangent = scale * batch.weights[:, None] * likelihood.hessian_mv(outputs, tangent)
                return ravel(pullback(cotangent)[0])

            return total + jax.lax.map(one, vectors, batch_size=min(vectors_at_once, len(vectors))), None

        return jax.lax.scan(add, jnp.zeros_like(vectors), batches)[0]

    return product


def _linearise(network: Network, params: PyTree, inputs: Array, microbatch: int):
    batches = mb.split(inputs, microbatch, ravel(params).dtype)
    outputs, pushforward = jax.linearize(lambda p: jax.lax.map(lambda x: network(p, x), batches.inputs), params)
    return outputs, pushforward, jax.linear_transpose(pushforward, params), batches.weights
