"""Where a recurrence ends: the space is invariant, and what is left of the next vector is rounding.

Normalised, rounding would bring back directions that were found before: copies of Ritz values. In exact arithmetic an
invariant space shows as a residual of zero. In floating point the residual is eps |A| times what the recurrence made of
the rounding of earlier steps, which can be little or everything: for operators of 3,000 rows with m distinct
eigenvalues between 1 and 10 at equal distances, 1 (m = 4), 8 (m = 8), 100 (m = 12) and 20,000 eps |A| (m = 20). A
threshold finds the first of these, and none finds all.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bnnlaplace.krylov.gram_schmidt import safe_norm

# In units of eps |A|: no product of a vector with A is more accurate than that.
ROUNDING = 10


def normalise(
    residual: Float[Array, " n"], length: Float[Array, ""], scale: Float[Array, ""], tolerance: float
) -> tuple[Float[Array, " n"], Float[Array, ""], Float[Array, " n"]]:
    """The next basis vector, its coupling |r| and r, all zero where |r| <= `tolerance` * `scale`, the size of A."""
    # Comparisons with NaN are false: what is not finite goes on and stays visible.
    alive = ~(length <= tolerance * scale) | ~jnp.isfinite(scale)
    residual = jnp.where(alive, residual, 0)
    coupling = jnp.where(alive, length, 0)
    return residual / jnp.where(alive, length, 1), coupling, residual


def first_vector(start: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """v / |v| and |v|; zeros for a zero v."""
    start_norm = safe_norm(start)
    return start / jnp.where(start_norm > 0, start_norm, 1), start_norm


def step(start_norm: Float[Array, ""], couplings: Float[Array, " K"]) -> Int[Array, ""]:
    """How many vectors were found where the recurrence ended, and -1 where it did not."""
    ended = jnp.append(start_norm == 0, couplings == 0)
    return jnp.where(jnp.any(ended), jnp.argmax(ended), -1)


def reached(breakdown_step: Int[Array, ""], num_matvecs: int) -> Bool[Array, " K"]:
    """Which vectors came before a breakdown: all, if there was none."""
    return (jnp.arange(num_matvecs) < breakdown_step) | (breakdown_step < 0)


def at_the_end(breakdown_step: Int[Array, ""], num_matvecs: int) -> Bool[Array, ""]:
    """Whether nothing comes after a breakdown: there was none, or the last step ended in it."""
    return (breakdown_step < 0) | (breakdown_step == num_matvecs)
