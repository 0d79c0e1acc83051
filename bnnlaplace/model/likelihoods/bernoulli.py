"""Independent Bernoulli targets with logits f."""

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array

from bnnlaplace.model.likelihoods.record import Likelihood, Outputs, Targets


def bernoulli() -> Likelihood:
    """Independent Bernoulli likelihood with logits f.

    Targets are shaped like f. They are 0 or 1, or probabilities in between. With p = sigmoid(f) the curvature is
    Lambda = diag(p (1 - p)).
    """
    return Likelihood(
        "binary",
        "array",
        Partial(_bernoulli_log_prob),
        Partial(_bernoulli_factor_mv),
        Partial(jax.nn.sigmoid),
        Partial(_bernoulli_hessian_mv),
        Partial(_bernoulli_factor_mv),
    )


def _bernoulli_log_prob(f: Outputs, y: Targets) -> Array:
    return jnp.sum(y * jax.nn.log_sigmoid(f) + (1 - y) * jax.nn.log_sigmoid(-f), axis=-1)


def _bernoulli_hessian_mv(f: Outputs, v: Outputs) -> Array:
    p = jax.nn.sigmoid(f)
    return p * (1 - p) * v


def _bernoulli_factor_mv(f: Outputs, u: Outputs) -> Array:
    # This is sqrt(p (1 - p)), written so that its gradient is finite even if p rounds to 0 or 1.
    return jnp.exp(0.5 * (jax.nn.log_sigmoid(f) + jax.nn.log_sigmoid(-f))) * u
