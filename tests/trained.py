"""One trained network and its posteriors, for the tests of every stage; `conftest` makes the fixtures known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from sklearn.datasets import load_digits

import bnnlaplace


def network_outputs(params, x):
    """One hidden layer over five features of an image; 10 classes."""
    return jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b2"]


@pytest.fixture(scope="session")
def trained():
    """400 digits, a network of 730 weights at a mode of its log joint, in single precision."""
    images, labels = load_digits(return_X_y=True)
    x, y = jnp.asarray(images[:400] / 16, jnp.float32), jnp.asarray(labels[:400])
    rng = np.random.default_rng(0)
    shapes = {"w1": (64, 8), "w2": (8, 10), "b2": (10,)}
    params = {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

    def negative_log_joint(vector):
        params = unravel(vector)
        log_probs = jax.nn.log_softmax(network_outputs(params, x))
        return -jnp.sum(log_probs[jnp.arange(len(y)), y]) + 0.5 * vector @ vector

    vector, unravel = jax.flatten_util.ravel_pytree(params)
    with jax.default_matmul_precision("highest"):  # that of accelerators would leave it beside the mode
        vector = jax.jit(lambda v: descend(negative_log_joint, v))(vector)
    network = bnnlaplace.Network.from_function(network_outputs, unravel(vector))
    return network, np.asarray(x), np.asarray(y)


def descend(loss, vector, steps=2000):
    """Gradient descent with momentum."""

    def step(carry, _):
        vector, velocity = carry
        velocity = 0.9 * velocity - 2e-3 * jax.grad(loss)(vector)
        return (vector + velocity, velocity), None

    return jax.lax.scan(step, (vector, jnp.zeros_like(vector)), length=steps)[0][0]


@pytest.fixture(scope="session")
def full(trained):
    network, x, y = trained
    return bnnlaplace.Laplace(network, hessian_structure="full").fit((x, y)).optimize_prior_precision()


@pytest.fixture(scope="session")
def diagonal(trained):
    network, x, y = trained
    return bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y)).optimize_prior_precision()


@pytest.fixture(scope="session", params=usual([1], [1, 2, 3]))
def lanczos(trained, request):
    network, x, y = trained
    la = bnnlaplace.Laplace(network, hessian_structure="lanczos")
    return la.fit((x, y), key=jax.random.key(request.param), num_probes=32, microbatch=64).optimize_prior_precision()


@pytest.fixture(scope="session")
def unconverged(trained):
    """A short decomposition, for tests of everything but its numbers."""
    network, x, y = trained
    with pytest.warns(UserWarning, match="not converged"):
        return bnnlaplace.Laplace(network).fit((x, y), key=jax.random.key(9), num_probes=8, max_vectors=24)
