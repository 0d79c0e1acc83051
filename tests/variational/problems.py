"""Small models whose labels come from the model itself, so that the posterior has no reason to be saturated."""

from typing import NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax

import bnnlaplace

SHAPES = {"w1": (4, 5), "b1": (5,), "w2": (5, 3), "b2": (3,)}


class Drawn(NamedTuple):
    """A network at the weights that made its labels, inputs (N, 4) and labels of three classes (N,)."""

    network: bnnlaplace.Network
    inputs: np.ndarray
    labels: np.ndarray

    @property
    def data(self):
        return self.inputs, self.labels


def drawn_labels(count=30, seed=0, dtype=float):
    """`cases.two_layers` at weights drawn from the prior of precision 1, and labels drawn from its probabilities."""
    rng = np.random.default_rng(seed)
    weights = {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}
    inputs = rng.normal(size=(count, 4)).astype(dtype)
    probs = softmax(np.asarray(cases.two_layers(weights, inputs), np.float64), axis=-1)
    labels = (probs.cumsum(axis=-1) < rng.random((count, 1))).sum(axis=-1)
    return Drawn(bnnlaplace.Network.from_function(cases.two_layers, weights), inputs, labels)


def flat(tree):
    return np.asarray(jax.flatten_util.ravel_pytree(tree)[0], np.float64)
