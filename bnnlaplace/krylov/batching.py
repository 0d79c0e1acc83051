"""Choices that stay choices under `vmap`, which would otherwise evaluate both branches of a `cond`."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool


@jax.custom_batching.custom_vmap
def anywhere(condition: Bool[Array, ""]) -> Bool[Array, ""]:
    """`condition`; under `vmap`, whether it holds anywhere in the batch, the same for all of it."""
    return condition


@anywhere.def_vmap
def _(size: int, batched: list[bool], condition: Bool[Array, " B"]) -> tuple[Bool[Array, ""], bool]:
    del size, batched
    return anywhere(jnp.any(condition)), False
