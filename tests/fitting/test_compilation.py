"""One compilation per shape: the same steps with other weights, data and prior precisions compile nothing."""

from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual

import bnnlaplace

COMPILED = "/jax/core/compile/backend_compile_duration"


@contextmanager
def compilations():
    """A list that grows by an entry for each program that is compiled."""
    found = []

    def listen(event, duration, **_):
        if event == COMPILED:
            found.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield found
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def network_outputs(params, x):
    hidden = jnp.tanh(x @ params["w1"])
    return hidden @ params["w2"] + params["b2"]


def steps(structure, subset, seed):
    """Everything from fitting to predicting, with weights and data from a seed."""
    rng = np.random.default_rng(seed)
    shapes = {"w1": (5, 4), "w2": (4, 3), "b2": (3,)}
    params = {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    x, y = rng.normal(size=(23, 5)).astype(np.float32), rng.integers(0, 3, size=23)
    network = bnnlaplace.Network.from_function(network_outputs, params)
    la = bnnlaplace.Laplace(network, subset_of_weights=subset, hessian_structure=structure)
    la = la.fit((x, y), key=jax.random.key(seed), num_probes=4, max_vectors=40, tolerance=0.5, microbatch=8)
    la = la.optimize_prior_precision()
    if structure != "lanczos":
        la = la.optimize_prior_precision(prior_structure="layerwise")
    la.log_marginal_likelihood()
    la.evidence_curve([0.1, 1.0])
    key = jax.random.key(seed)
    la.predictive(x[:7])
    la.predictive(x[:7], link_approx="mc", key=key, num_samples=4)
    la.predictive(x[:7], pred_type="nn", key=key, num_samples=2)
    la.functional_variance(x[:7])
    la.sample(key, 2)


@pytest.mark.parametrize(
    ("structure", "subset"),
    usual(
        [("kron", "all"), ("lanczos", "last_layer")],
        ("diag", "kron", "full", "lanczos"),
        ("all", "last_layer"),
    ),
)
def test_nothing_is_compiled_twice(structure, subset):
    with compilations() as first:
        steps(structure, subset, seed=0)
    with compilations() as second:
        steps(structure, subset, seed=1)
    assert len(first) > 0
    assert len(second) == 0
