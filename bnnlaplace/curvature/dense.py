"""The dense GGN: exact, for small networks, and the oracle that every matrix-free path is tested against."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.curvature import microbatch as mb
from bnnlaplace.likelihood import Likelihood
from bnnlaplace.network import Network
from bnnlaplace.precise import matmul
from bnnlaplace.tree import examples, ravel, size, unraveler

# Strips of the upper triangle: 5/8 of the multiplications of the whole matrix. More of them are too thin to be fast.
STRIPS = 4


def jacobian(network: Network, params: PyTree, inputs: PyTree[Float[Array, "N ..."]]) -> Float[Array, "N ... C P"]:
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

    def outputs(vector: Float[Array, " P"], x: PyTree) -> Float[Array, "... C"]:
        return network(unravel(vector), examples(x, None))[0]

    return jax.vmap(jax.jacrev(outputs), in_axes=(None, 0))(ravel(params), inputs)


def factor_rows(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Float[Array, "m ..."]],
    weights: Float[Array, " m"],
) -> Float[Array, "R P"]:
    """The rows sqrt(w_n) (J_n' B_n e_c)', one for each output of each example: R' R = sum_n w_n J_n' Lambda_n J_n.

    Cost: one forward pass, and one backward pass for each output. Memory: R P numbers.

    Parameters
    ----------
    network, likelihood
        Where f and Lambda come from.
    params
        The weights at which the network is differentiated.
    inputs
        m examples.
    weights
        w_n >= 0.
    """

    def example(x: PyTree, weight: Array) -> Float[Array, "K P"]:
        outputs, pullback = jax.vjp(lambda p: network(p, examples(x, None))[0], params)
        columns = jnp.sqrt(weight) * jnp.eye(outputs.size, dtype=outputs.dtype).reshape(-1, *outputs.shape)
        return jax.vmap(lambda column: ravel(pullback(likelihood.factor_mv(outputs, column))[0]))(columns)

    return jax.vmap(example)(inputs, weights).reshape(-1, size(params))


def ggn(
    network: Network,
    likelihood: Likelihood,
    params: PyTree,
    inputs: PyTree[Float[Array, "N ..."]],
    *,
    scale: float = 1.0,
    weights: Float[Array, " N"] | None = None,
    microbatch: int = 32,
) -> Float[Array, "P P"]:
    """G = scale * sum_n w_n J_n' Lambda_n J_n as a matrix.

    Parameters
    ----------
    network, likelihood
        Where f and Lambda come from.
    params
        The weights at which the network is differentiated.
    inputs
        All N examples.
    scale
        (all training examples) / N.
    weights
        w_n >= 0; by default ones.
    microbatch
        Examples whose rows are in memory at a time.

    Notes
    -----
    Cost: for each output of each example a backward pass and about 5/8 P^2 multiplications, since only strips of the
    upper triangle are computed. Memory: about 2 P^2 numbers, and P for each output of the examples of a microbatch,
    whatever N is. Call it inside `jit`.
    """
    dtype, count = ravel(params).dtype, size(params)
    strips = _strips(count)

    def add(totals: list[Array], batch: mb.Microbatches) -> tuple[list[Array], None]:
        rows = factor_rows(network, likelihood, params, *batch)
        parts = [matmul(rows[:, start:stop].T, rows[:, start:]) for start, stop in strips]
        return jax.tree.map(jnp.add, totals, parts), None

    zeros = [jnp.zeros((stop - start, count - start), dtype) for start, stop in strips]
    totals, _ = jax.lax.scan(add, zeros, mb.split(inputs, microbatch, dtype, weights))
    whole = [jnp.pad(part, ((0, 0), (start, 0))) for part, (start, _) in zip(totals, strips, strict=True)]
    upper = jnp.triu(jnp.concatenate(whole))
    return scale * (upper + jnp.triu(upper, 1).T)


def _strips(count: int) -> list[tuple[int, int]]:
    """First and last row, exclusive, of each strip of a matrix with `count` rows."""
    height = math.ceil(count / STRIPS)
    return [(start, min(start + height, count)) for start in range(0, count, height)]
