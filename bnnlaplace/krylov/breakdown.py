"""Breakdown: the Krylov space is invariant, and what remains of the next vector is rounding.

A recurrence must stop there. Normalised, the rounding would bring back directions that were found before, as copies of
Ritz values.

In exact arithmetic the residual of an invariant space is zero. In floating point it is eps |A| times the factor by
which the recurrence magnified the rounding of its earlier steps, and that factor can be small or huge. Measured on
operators of 3,000 rows with m distinct, equally spaced eigenvalues between 1 and 10, it is 1 (m = 4), 8 (m = 8), 100
(m = 12) and 20,000 (m = 20). A threshold on the residual finds the first of these cases. No threshold finds all.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from bnnlaplace.krylov.gram_schmidt import safe_norm

# The default threshold in units of eps |A|: a product of a vector with A is not more accurate than that.
ROUNDING = 10


def first_vector(start: Float[Array, " n"]) -> tuple[Float[Array, " n"], Float[Array, ""]]:
    """Return v / |v| and |v|; both are zero for a zero v."""
    start_norm = safe_norm(start)
    return start / jnp.where(start_norm > 0, start_norm, 1), start_norm


def normalise(
    residual: Float[Array, " n"], length: Float[Array, ""], scale: Float[Array, ""], tolerance: float
) -> tuple[Float[Array, " n"], Float[Array, ""], Float[Array, " n"]]:
    """Return the next basis vector r / |r|, its coupling |r|, and r.

    All three are zero at a breakdown, which is where |r| <= `tolerance` * `scale`, `scale` being the size of A.
    """
    # A comparison with NaN is false. So a recurrence that met NaN or infinity goes on, and the user sees it.
    alive = ~(length <= tolerance * scale) | ~jnp.isfinite(scale)
    residual = jnp.where(alive, residual, 0)
    coupling = jnp.where(alive, length, 0)
    return residual / jnp.where(alive, length, 1), coupling, residual


def step(start_norm: Float[Array, ""], couplings: Float[Array, " K"]) -> Int[Array, ""]:
    """Return the number of basis vectors found before the breakdown, or -1 if there was none."""
    # A zero start vector is a breakdown at step 0, hence the entry in front of the couplings.
    ended = jnp.append(start_norm == 0, couplings == 0)
    return jnp.where(jnp.any(ended), jnp.argmax(ended), -1)


def reached(breakdown_step: Int[Array, ""], num_matvecs: int) -> Bool[Array, " K"]:
    """Mark the basis vectors that were found before the breakdown; without a breakdown all are marked."""
    return (jnp.arange(num_matvecs) < breakdown_step) | (breakdown_step < 0)


def at_the_end(breakdown_step: Int[Array, ""], num_matvecs: int) -> Bool[Array, ""]:
    """Whether all `num_matvecs` vectors were found: there was no breakdown, or it came with the last step."""
    return (breakdown_step < 0) | (breakdown_step == num_matvecs)
