"""Weights that a user hands over: in other containers they are taken, others are named in a sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze

from bnnlaplace import Laplace, Network, categorical, evidence
from bnnlaplace.model.weights import like_weights

WEIGHTS = {"layer": {"kernel": np.ones((2, 3), np.float32)}, "scale": np.ones((), np.float32)}
NETWORK = Network.from_function(lambda p, x: p["scale"] * (x @ p["layer"]["kernel"]), WEIGHTS)
BATCH = np.ones((5, 2), np.float32), np.arange(5) % 3


def test_only_paths_count():
    boxed = {"layer": {"kernel": nnx.Param(WEIGHTS["layer"]["kernel"])}, "scale": 1.0}
    for params in (freeze(WEIGHTS), boxed, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), WEIGHTS)):
        moved = NETWORK.with_params(params)
        assert jax.tree.structure(moved) == jax.tree.structure(NETWORK)
        np.testing.assert_array_equal(moved(moved.params, BATCH[0]), NETWORK(NETWORK.params, BATCH[0]))


def test_traced_weights_pass_and_their_shapes_are_checked():
    options = {"network": NETWORK, "likelihood": categorical(), "num_matvecs": 2, "num_probes": 2}
    value = lambda p: evidence.log_marginal_likelihood(p, 1.0, BATCH, jax.random.key(0), **options).mean  # noqa: E731
    slope = jax.jit(jax.grad(value))({**WEIGHTS, "scale": np.float32(np.nan)})
    assert np.isnan(slope["scale"])
    with pytest.raises(
        ValueError, match=r"\(params=...\) must be weights .*; got 'scale' of shape \(1,\) for \(\); pass"
    ):
        jax.jit(value)({**WEIGHTS, "scale": np.ones(1)})


def test_what_is_wrong_is_named_on_one_line():
    wrong = {
        "got no 'layer/kernel' and 'kernel', which the network has not": {"kernel": np.ones(2), "scale": 1.0},
        "got 'layer/kernel' of type int64": {**WEIGHTS, "layer": {"kernel": np.ones((2, 3), np.int64)}},
        "got 'scale' with NaN or infinite numbers in float32": {**WEIGHTS, "scale": np.float64(1e39)},
        "got NoneType None": None,
    }
    for words, params in wrong.items():
        with pytest.raises(ValueError) as error:
            like_weights(params, NETWORK.params, "params", finite=True)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_a_prior_mean_is_real():
    """Imaginary parts were dropped, and the message went over several lines."""
    for words, mean in {
        "real numbers; got complex": jax.tree.map(lambda leaf: leaf + 1j, WEIGHTS),
        "one number, 7 numbers, or a pytree like the weights; got dict": {"layer": np.ones((20, 3))},
        "finite; got NaN or infinite values in float32": 1e39,
    }.items():
        with pytest.raises(ValueError, match=r"Laplace\(prior_mean=...\) must be " + words) as error:
            Laplace(NETWORK, prior_mean=mean)
        assert "\n" not in str(error.value)
