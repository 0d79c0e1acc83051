"""Dense oracles that share no code with the package: Jacobians in closed form or forward mode, curvatures in NumPy."""

import jax
import numpy as np


def jacobian(network, params, inputs):
    """d f(params, x_n) / d params in forward mode, (N, ..., C, P), with one example in a batch at a time."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def outputs(vector, x):
        return network(unravel(vector), jax.tree.map(lambda leaf: leaf[None], x))[0]

    return np.asarray(jax.jit(jax.vmap(jax.jacfwd(outputs), in_axes=(None, 0)))(flat, inputs))


def two_layers_jacobian(params, inputs):
    """The Jacobian (N, 3, 43) of `cases.two_layers` in closed form; weights in the order b1, b2, w1, w2."""
    w1, b1, w2, b2 = (np.asarray(params[name], np.float64) for name in ("w1", "b1", "w2", "b2"))
    count, num_outputs = len(inputs), len(b2)
    hidden = np.tanh(inputs @ w1 + b1)
    to_hidden = np.einsum("nh,hc->nch", 1 - hidden**2, w2)
    identity = np.broadcast_to(np.eye(num_outputs), (count, num_outputs, num_outputs))
    of_w1 = np.einsum("ni,nch->ncih", inputs, to_hidden)
    of_w2 = np.einsum("nh,ncd->nchd", hidden, identity)
    leaves = to_hidden, identity, of_w1, of_w2
    return np.concatenate([leaf.reshape(count, num_outputs, -1) for leaf in leaves], axis=-1)


def output_curvature(likelihood, outputs):
    """Lambda_n = -d^2 log p(y_n | f_n) / df_n^2 of the three likelihoods, (N, C, C)."""
    outputs = np.asarray(outputs, np.float64)
    if likelihood.name == "classification":
        weights = np.exp(outputs - outputs.max(axis=-1, keepdims=True))
        probs = weights / weights.sum(axis=-1, keepdims=True)
        return np.eye(outputs.shape[-1]) * probs[:, None] - probs[:, :, None] * probs[:, None]
    if likelihood.name == "binary":
        probs = 1 / (1 + np.exp(-outputs))
        return np.eye(outputs.shape[-1]) * (probs * (1 - probs))[:, None]
    precisions = np.broadcast_to(np.asarray(likelihood.sigma_noise, np.float64) ** -2, outputs.shape)
    return np.eye(outputs.shape[-1]) * precisions[:, None]


def ggn(jacobians, curvatures):
    """sum_n J_n' Lambda_n J_n."""
    return np.einsum("ncp,ncd,ndq->pq", jacobians, curvatures, jacobians, optimize=True)
