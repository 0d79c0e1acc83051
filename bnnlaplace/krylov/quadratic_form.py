"""z' f(A) z of one probe, read off its Lanczos decomposition, and three ways to differentiate it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.krylov import adjoint, breakdown
from bnnlaplace.krylov.derivative_modes import once_where
from bnnlaplace.krylov.functions import Converted, constants_cotangent
from bnnlaplace.krylov.lanczos import Lanczos, lanczos_adjoint, lanczos_forward
from bnnlaplace.krylov.matfun import function_times_start
from bnnlaplace.krylov.operator import Settings
from bnnlaplace.krylov.tridiagonal import function_times_first, reached_eigenpairs, rounding_of_zero
from bnnlaplace.precise import matmul


def quadratic_form(
    function: Converted,
    matvec: Callable,
    settings: Settings,
    gradient: str,
    probe: Float[Array, " n"],
    arguments: tuple[Any, ...],
    constants: Any,
    *,
    semidefinite: bool,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """z' f(A) z, differentiable as `gradient` says, and how much of it came with the last fifth of the steps."""
    if gradient == "quadrature":
        return _quadrature_form(function, matvec, settings, semidefinite, probe, arguments, constants)
    decompose = lanczos_adjoint if gradient == "adjoint" else lanczos_forward
    return _read_off(function, semidefinite, constants, decompose(matvec, settings, probe, arguments))


def _read_off(function: Converted, semidefinite: bool, constants: Any, steps: Lanczos) -> tuple[Array, Array]:
    function, constants = _above_rounding(function, semidefinite, constants, steps)
    first, change = function_times_start(function, constants, steps)
    return steps.start_norm * first[0], steps.start_norm * jax.lax.stop_gradient(change[0])


def _above_rounding(
    function: Converted, semidefinite: bool, constants: Any, steps: Lanczos
) -> tuple[Converted, tuple[Any, Array] | Any]:
    """f of an operator without negative eigenvalues, at zero where an eigenvalue is rounding of zero."""
    if not semidefinite:
        return function, constants
    diagonal, off_diagonal = jax.lax.stop_gradient((steps.diagonal, steps.off_diagonal))
    reached = breakdown.reached(steps.breakdown_step, len(diagonal))
    floor = rounding_of_zero(reached_eigenpairs(diagonal, off_diagonal, reached)[0])

    def floored(x: Array, both: tuple[Any, Array]) -> Array:
        return function(jnp.where(x > both[1], x, 0), both[0])

    return floored, (constants, floor)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3))
def _quadrature_form(
    function: Converted,
    matvec: Callable,
    settings: Settings,
    semidefinite: bool,
    probe: Array,
    arguments: tuple[Any, ...],
    constants: Any,
) -> tuple[Array, Array]:
    """z' f(A) z, with (f'(A) z)' dA z + 2 (f(A) z)' dz for its derivative."""
    return _read_off(function, semidefinite, constants, lanczos_forward(matvec, settings, probe, arguments))


def _quadrature_form_forward(
    function: Converted,
    matvec: Callable,
    settings: Settings,
    semidefinite: bool,
    probe: Array,
    arguments: tuple[Any, ...],
    constants: Any,
) -> tuple[tuple[Array, Array], Any]:
    # The loop, since what is differentiated again may be so in forward mode, too.
    steps = lanczos_forward(matvec, settings, probe, arguments)
    return _read_off(function, semidefinite, constants, steps), (steps, probe, arguments, constants)


def _quadrature_form_backward(
    function: Converted,
    matvec: Callable,
    settings: Settings,
    semidefinite: bool,
    saved: Any,
    cotangents: tuple[Array, Array],
) -> tuple[Array, Any, Any]:
    (steps, probe, arguments, constants), (cotangent, _) = saved, cotangents
    tridiagonal = steps.diagonal, steps.off_diagonal, steps.breakdown_step
    floored, both = _above_rounding(function, semidefinite, constants, steps)
    slope = steps.start_norm * function_times_first(jax.grad(lambda x: floored(x, both)), *tridiagonal)
    first, _ = function_times_start(floored, both, steps)
    towards_operator = cotangent * matmul(slope, steps.basis)
    gradient = (
        2 * cotangent * matmul(first, steps.basis),
        adjoint.operator_cotangent(matvec, arguments, probe[None], towards_operator[None], 1),
        constants_cotangent(lambda c: _read_off(function, semidefinite, c, steps)[0], constants, cotangent),
    )
    return once_where(gradient, breakdown.at_the_end(steps.breakdown_step, settings.num_matvecs))


_quadrature_form.defvjp(_quadrature_form_forward, _quadrature_form_backward)
