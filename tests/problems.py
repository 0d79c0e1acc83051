"""A small network with random data, and its GGN by routes that share no code with the package."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import bnnlaplace


class Problem(NamedTuple):
    """A two-layer network of 43 weights, its data, and its GGN as a matrix."""

    network: bnnlaplace.Network
    likelihood: bnnlaplace.Likelihood
    inputs: np.ndarray
    targets: np.ndarray
    ggn: np.ndarray


def two_layers(params, x):
    """tanh network; outputs (B, 3)."""
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def random_problem(likelihood: bnnlaplace.Likelihood, targets: np.ndarray, seed: int = 0) -> Problem:
    """The network at random weights, and sum_n J_n' Lambda_n J_n from forward-mode Jacobians and autodiff Hessians.

    It shares no code with the package: Jacobians forward, Lambda by `jax.hessian` of -log p.
    """
    rng = np.random.default_rng(seed)
    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}
    params = {name: jnp.asarray(rng.normal(size=shape)) for name, shape in shapes.items()}
    inputs = rng.normal(size=(len(targets), 4))
    network = bnnlaplace.Network.from_function(two_layers, params)
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    jacobians = jax.jacfwd(lambda vector: two_layers(unravel(vector), inputs))(flat)
    outputs = two_layers(params, inputs)
    ggn = 0.0
    for jacobian, output, target in zip(jacobians, outputs, jnp.asarray(targets), strict=True):
        hessian = jax.hessian(lambda f, target=target: -likelihood.log_prob(f, target))(output)
        ggn = ggn + jacobian.T @ hessian @ jacobian
    return Problem(network, likelihood, inputs, targets, np.asarray(ggn))
