"""Data as users hand them over: made arrays, and checked against the model before work is spent on them."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from bnnlaplace.likelihood import Likelihood, check_targets
from bnnlaplace.network import Network


def as_arrays(data: tuple[Array, Array] | Iterable[tuple[Array, Array]]) -> tuple[Float[Array, "N ..."], Array]:
    """One array of inputs and one of targets, from arrays or from batches.

    Raises
    ------
    ValueError
        If there are no batches or no examples, a batch is no pair, or there are not as many targets as inputs.
    """
    if not (isinstance(data, (tuple, list)) and len(data) == 2 and all(hasattr(part, "shape") for part in data)):
        batches = list(data)
        for batch in batches:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise ValueError(
                    "fit(data=...) must be two arrays (x, y), or an iterable of batches, each such a pair; got "
                    f"{type(batch).__name__} for a batch; pass (jnp.asarray(x), jnp.asarray(y))"
                )
        if not batches:
            raise ValueError("fit(data=...) must hold at least one batch; got none; an iterator may be used up already")
        data = tuple(jnp.concatenate([jnp.asarray(batch[part]) for batch in batches]) for part in (0, 1))
    x, y = (jnp.asarray(part) for part in data)
    if len(x) == 0 or len(x) != len(y):
        raise ValueError(
            f"fit(data=(x, y)) must hold as many targets as inputs, and at least one; got {len(x)} and {len(y)}"
        )
    return x, y


def check_fits_model(network: Network, likelihood: Likelihood, inputs: Float[Array, "N ..."], targets: Array) -> None:
    """Check that the network turns inputs into outputs (N, ..., C), and that the targets are such as those need.

    Raises
    ------
    ValueError
        If outputs are not (N, ..., C), or targets do not fit them; see `likelihood.check_targets`.
    """
    shape = jax.eval_shape(network, network.params, inputs).shape
    if len(shape) < 2 or shape[0] != len(inputs):
        raise ValueError(
            f"a network's outputs must have shape (B, C), or (B, ..., C) with several positions; got {shape} for "
            f"{len(inputs)} examples"
        )
    check_targets(likelihood, shape, targets)


def check_inputs(inputs: Float[Array, "B ..."]) -> None:
    """Check that inputs to predict at are finite; traced ones are taken as they are.

    Raises
    ------
    ValueError
        If a number among them is not finite.
    """
    if isinstance(inputs, jax.core.Tracer):
        return
    # Where the inputs are: images on the host need no second copy on the device.
    with jax.ensure_compile_time_eval():  # inputs that a traced function closes over
        finite = jnp.isfinite(inputs) if isinstance(inputs, jax.Array) else np.isfinite(inputs)
        all_finite = bool(finite.all())
    if not all_finite:
        rows = np.unique(np.nonzero(~np.asarray(finite))[0])
        raise ValueError(
            f"inputs to predict at must be finite; got NaN or infinite values in {len(rows)} of {len(inputs)} of them, "
            f"first in number {rows[0]}; remove or mend them"
        )
