"""Checks of what the functions of the evidence are given."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Num

from bnnlaplace.core.tree import described, num_examples
from bnnlaplace.core.types import AnyArray, Inputs
from bnnlaplace.model.data import check_inputs
from bnnlaplace.model.likelihood import Likelihood, check_targets
from bnnlaplace.model.network import Network
from bnnlaplace.model.pairs import example_weights
from bnnlaplace.model.spec import output_shape


def checked_batch(caller: str, network: Network, batch: Any) -> tuple[Inputs, AnyArray, Num[AnyArray, " N"] | None]:
    """Check the inputs and the weights of a batch; return inputs, targets and weights, or None where there are none."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        raise ValueError(
            f"{caller}(batch=...) must be (inputs, targets), or (inputs, targets, weights); got {described(batch)}; "
            "pass (x, y)"
        )
    inputs, targets, *rest = batch
    inputs = check_inputs(network, inputs, f"{caller}(batch=(x, y)): x")
    weights = rest[0] if rest else None
    if weights is not None and not isinstance(weights, jax.core.Tracer):
        weights = example_weights(weights, num_examples(inputs), f"{caller}(batch=(x, y, w)): w")
    return inputs, targets, weights


def curvature_weights(
    network: Network, likelihood: Likelihood, batch: tuple[Any, Any, Any]
) -> Num[AnyArray, "N ..."] | None:
    """How many times the curvature of each example or position counts; None if each counts once."""
    inputs, targets, weights = batch
    if likelihood.target_weights is None:
        return weights
    check_targets(likelihood, output_shape(network, inputs), targets, "log_marginal_likelihood(batch=(x, y))")
    targets = jnp.asarray(targets)
    return likelihood.weights_of(targets, jnp.ones(num_examples(inputs)) if weights is None else jnp.asarray(weights))
