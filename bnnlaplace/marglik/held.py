"""What loops that train by the evidence keep from step to step: a held gradient, and the first step that failed."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree


def averaged(held: PyTree, estimate: PyTree, before: Int[Array, ""], memory: int) -> PyTree:
    """Return the held gradient with one more estimate: the mean of the first `memory`, then a moving average.

    Parameters
    ----------
    held, estimate
        Pytrees of the same arrays.
    before
        How many estimates `held` comes from. With 0 its values do not count.
    memory
        How many estimates it remembers.
    """
    newest = 1 / jnp.minimum(before + 1, memory)
    return jax.tree.map(lambda old, new: (old + newest * (new - old)).astype(old.dtype), held, estimate)


def forgotten(held: PyTree) -> tuple[PyTree, Int[Array, ""]]:
    """Return a held gradient of zero, and the number of estimates that it comes from."""
    return jax.tree.map(jnp.zeros_like, held), jnp.int32(0)


def first_bad_step(bad_step: Int[Array, ""], step: Int[Array, ""], is_finite: Bool[Array, ""]) -> Int[Array, ""]:
    """Return the first step with something that is not finite, or -1.

    Parameters
    ----------
    bad_step
        What this function returned in the step before; -1 before the first.
    step
        The number of this step.
    is_finite
        Whether all that this step computed is finite.
    """
    return jnp.where(is_finite | (bad_step >= 0), bad_step, step)


def all_finite(*numbers: PyTree) -> Bool[Array, ""]:
    """Return whether every number of these pytrees is finite."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(numbers)]))
