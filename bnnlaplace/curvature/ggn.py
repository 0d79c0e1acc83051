"""Products with the generalised Gauss-Newton matrix G = scale * sum_n J_n' Lambda_n J_n, never formed.

Three arrangements of the same product, each for its use:

- `ggn_operator`: on a `Linearisation` of one batch, for differentiable Krylov methods.
- `dual_operator`: B' J J' B on stacked outputs, the same nonzero spectrum; for more weights than outputs. A
  `Linearisation` also holds the outputs, so that a likelihood needs no forward pass of its own.
- `block_product`: S vectors at once, linearised once per microbatch and block. The forward pass is shared by S vectors
  and memory holds one microbatch only, so data of any size stream through; this is what block Lanczos calls.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import number_type, ravel, unraveler
from bnnlaplace.core.types import LinearOperator
from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.curvature.linearisation import Linearisation
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network


def ggn_operator(linearised: Linearisation, likelihood: Likelihood, *, scale: float = 1.0) -> LinearOperator:
    """The P x P operator G = scale * sum_n J_n' Lambda_n J_n.

    Parameters
    ----------
    linearised
        Where J and the outputs come from.
    likelihood
        Where Lambda comes from.
    scale
        (all training examples) / (examples in `linearised`).

    Returns
    -------
    LinearOperator
        On vectors of P numbers. One product costs about two forward and two backward passes' arithmetic.
    """

    def curved(outputs: Array, weights: Array, tangent: Array) -> Array:
        return scale * mb.over_outputs(weights, tangent) * likelihood.hessian_mv(outputs, tangent)

    return LinearOperator(partial(linearised.sandwich, curved), linearised.size)


def dual_operator(
    linearised: Linearisation,
    likelihood: Likelihood,
    *,
    scale: float = 1.0,
    prior_precision: Float[Array, ""] | Float[Array, " P"] = 1.0,
) -> LinearOperator:
    """The operator scale * B' J P0^-1 J' B on stacked outputs.

    It has the nonzero spectrum of P0^-1/2 G P0^-1/2, so log det(I + .) is the same, with vectors of all outputs instead
    of P numbers; rows of padding are zero.

    Parameters
    ----------
    linearised, likelihood, scale
        As for `ggn_operator`.
    prior_precision
        The diagonal of P0: one number, or one for each weight.
    """
    outputs, pull = linearised.outputs, dual_pullback(linearised, likelihood, scale=scale)
    root = _root_scale(linearised, scale)

    def matvec(vector: Float[Array, " V"]) -> Float[Array, " V"]:
        weighted = pull(vector) / prior_precision
        return likelihood.factor_transpose_mv(outputs, root * linearised.pushforward(weighted)).reshape(-1)

    return LinearOperator(matvec, outputs.size)


def dual_pullback(
    linearised: Linearisation, likelihood: Likelihood, *, scale: float = 1.0
) -> Callable[[Float[Array, " V"]], Float[Array, " P"]]:
    """Return v -> sqrt(scale) J' B v, from stacked outputs to weights: the first half of `dual_operator`.

    Parameters
    ----------
    linearised, likelihood, scale
        As for `ggn_operator`.
    """
    outputs, root = linearised.outputs, _root_scale(linearised, scale)
    return lambda vector: linearised.pullback(root * likelihood.factor_mv(outputs, vector.reshape(outputs.shape)))


def _root_scale(linearised: Linearisation, scale: float) -> Float[Array, "M ..."]:
    """sqrt(scale), and zero for padding, shaped so that it multiplies outputs."""
    return jnp.sqrt(scale * mb.over_outputs(linearised.weights, linearised.outputs))


def block_product(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Float[Array, "N ..."]],
    *,
    weights: Float[Array, " N"] | None = None,
    scale: float = 1.0,
    microbatch: int = 64,
    vectors_at_once: int = 8,
) -> Callable[[Float[Array, "S P"]], Float[Array, "S P"]]:
    """Return V -> V G for S row vectors at once, streamed over microbatches of the data.

    Arithmetic: one forward pass and S GGN products. Memory: residuals of one microbatch, and `vectors_at_once` times
    its activations.

    Parameters
    ----------
    network, likelihood
        Where f and Lambda come from.
    params
        The weights at which the network is linearised.
    inputs
        All N examples.
    weights
        One for each example; zero for those that do not count. By default all ones.
    scale
        (all training examples) / N.
    microbatch
        Examples linearised at a time; bounds memory.
    vectors_at_once
        Vectors pushed through a microbatch at a time; bounds memory, too.
    """
    unravel = unraveler(params)
    batches = mb.split(inputs, microbatch, number_type(params), weights)

    def product(vectors: Float[Array, "S P"]) -> Float[Array, "S P"]:
        def add(total: Array, batch: mb.Microbatches) -> tuple[Array, None]:
            outputs, pushforward = jax.linearize(lambda p: network(p, batch.inputs), params)
            pullback = jax.linear_transpose(pushforward, params)

            def one(vector: Float[Array, " P"]) -> Float[Array, " P"]:
                curved = likelihood.hessian_mv(outputs, pushforward(unravel(vector)))
                return ravel(pullback(scale * mb.over_outputs(batch.weights, curved) * curved)[0])

            return total + jax.lax.map(one, vectors, batch_size=min(vectors_at_once, len(vectors))), None

        return jax.lax.scan(add, jnp.zeros_like(vectors), batches)[0]

    return product
