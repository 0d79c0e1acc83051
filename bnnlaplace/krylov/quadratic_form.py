"""The quadratic form z' f(A) z of one probe, read off its Lanczos decomposition, and three ways to differentiate it.

The value is |z|^2 e_1' f(T) e_1. "adjoint" differentiates this value through the adjoint of Lanczos, and "autodiff"
through its loop. "quadrature" takes the derivative of z' f(A) z averaged over probes instead, for which a trace lets
one replace the Frechet derivative: E[z' L(A, dA) z] = tr(f'(A) dA) = E[(f'(A) z)' dA z], with f'(A) z = |z| Q f'(T) e_1
from the decomposition at hand.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import matmul
from bnnlaplace.krylov import adjoint, breakdown
from bnnlaplace.krylov.derivative_modes import once_where
from bnnlaplace.krylov.finite import cause_of_function
from bnnlaplace.krylov.functions import Converted, constants_cotangent
from bnnlaplace.krylov.lanczos import Lanczos, lanczos_adjoint, lanczos_forward
from bnnlaplace.krylov.matfun import function_times_start
from bnnlaplace.krylov.operator import Settings
from bnnlaplace.krylov.tridiagonal import function_times_first, reached_eigenpairs, rounding_of_zero


class Form(NamedTuple):
    """The static part of a quadratic form.

    Attributes
    ----------
    function
        f, converted by `functions.py`.
    matvec
        v, *arguments -> A v.
    settings
        The options of the decomposition.
    semidefinite
        Whether A has no negative eigenvalues, so that Ritz values which are rounding of zero count as zero.
    """

    function: Converted
    matvec: Callable
    settings: Settings
    semidefinite: bool


def quadratic_form(
    form: Form, gradient: str, probe: Float[Array, " n"], arguments: tuple[Any, ...], constants: Any
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return z' f(A) z, differentiable as `gradient` says, and its change over the last fifth of the steps."""
    if gradient == "quadrature":
        return _quadrature_form(form, probe, arguments, constants)
    decompose = lanczos_adjoint if gradient == "adjoint" else lanczos_forward
    return _read_off(form, constants, decompose(form.matvec, form.settings, probe, arguments))


def cause_of_forms(
    form: Form, values: Float[Array, " S"], rows: Float[Array, "S n"], arguments: tuple[Any, ...], constants: Any
) -> str:
    """Say why the mean of forms is not finite, by one more decomposition from the first probe whose form is not."""
    bad = jnp.flatnonzero(~jnp.isfinite(values))
    if not len(bad):
        return "function is not finite at a value of the deflation; find the pairs with the same matvec"
    steps = lanczos_forward(form.matvec, form.settings, rows[bad[0]], arguments)
    return cause_of_function(*_above_rounding(form, constants, steps), steps)


def _read_off(form: Form, constants: Any, steps: Lanczos) -> tuple[Array, Array]:
    """Return |z|^2 e_1' f(T) e_1 and its change over the last fifth of the steps."""
    first, change = function_times_start(*_above_rounding(form, constants, steps), steps)
    return steps.start_norm * first[0], steps.start_norm * jax.lax.stop_gradient(change[0])


def _above_rounding(form: Form, constants: Any, steps: Lanczos) -> tuple[Converted, Any]:
    """Return f and its constants. If semidefinite, f is f(0) for eigenvalues that are zero up to rounding."""
    if not form.semidefinite:
        return form.function, constants
    diagonal, off_diagonal = jax.lax.stop_gradient((steps.diagonal, steps.off_diagonal))
    reached = breakdown.reached(steps.breakdown_step, len(diagonal))
    floor = rounding_of_zero(reached_eigenpairs(diagonal, off_diagonal, reached)[0])

    def floored(x: Array, both: tuple[Any, Array]) -> Array:
        return form.function(jnp.where(x > both[1], x, 0), both[0])

    return floored, (constants, floor)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _quadrature_form(form: Form, probe: Array, arguments: tuple[Any, ...], constants: Any) -> tuple[Array, Array]:
    """Return z' f(A) z and its change, with the derivative (f'(A) z)' dA z + 2 (f(A) z)' dz."""
    return _quadrature_form_forward(form, probe, arguments, constants)[0]


def _quadrature_form_forward(
    form: Form, probe: Array, arguments: tuple[Any, ...], constants: Any
) -> tuple[tuple[Array, Array], Any]:
    # By the loop, not the adjoint, so that forward mode can differentiate this once more.
    steps = lanczos_forward(form.matvec, form.settings, probe, arguments)
    return _read_off(form, constants, steps), (steps, probe, arguments, constants)


def _quadrature_form_backward(form: Form, saved: Any, cotangents: tuple[Array, Array]) -> tuple[Array, Any, Any]:
    (steps, probe, arguments, constants), (cotangent, _) = saved, cotangents
    tridiagonal = steps.diagonal, steps.off_diagonal, steps.breakdown_step
    function, given = _above_rounding(form, constants, steps)
    slope = steps.start_norm * function_times_first(jax.grad(lambda x: function(x, given)), *tridiagonal)
    first, _ = function_times_start(function, given, steps)
    # f'(A) z, in the basis that is at hand.
    towards_operator = cotangent * matmul(slope, steps.basis)
    gradient = (
        2 * cotangent * matmul(first, steps.basis),
        adjoint.operator_cotangent(form.matvec, arguments, probe[None], towards_operator[None], 1),
        constants_cotangent(lambda c: _read_off(form, c, steps)[0], constants, cotangent),
    )
    return once_where(gradient, breakdown.at_the_end(steps.breakdown_step, form.settings.num_matvecs))


_quadrature_form.defvjp(_quadrature_form_forward, _quadrature_form_backward)
