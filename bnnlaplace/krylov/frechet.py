"""The derivative of f(A) v itself, from two Krylov spaces: that of v and that of its cotangent w.

In the direction dA of the operator, f(A) v changes by the Frechet derivative L(A, dA) v. For a symmetric A with
eigenpairs (lambda_i, x_i) it is (Daleckii and Krein; Higham 2008, theorem 3.11)

    w' L(A, dA) v = sum_ij f[lambda_i, lambda_j] (w' x_i) (x_i' dA x_j) (x_j' v),

with divided differences f[., .]. Only eigenvectors count along which v or w has a component. So with A Q = Q T + ..
from v, and A S = S R + .. from w,

    w' L(A, dA) v = sum_kl M_kl s_l' dA q_k,    M = |v| |w| U ((u w') o f[theta_j, omega_l]) W',                    (M)

where theta, U and omega, W are the eigenpairs of T and R, and u, w are the first rows of U and W. The gradient in v is
f(A) w = |w| S f(R) e_1. For a general A the second space is that of A', and M' is the upper right block of (Higham
2008, section 3.2)

    f([[R, e_1 e_1'], [0, T']]) |v| |w|.                                                                          (M')

The only error is one of truncation, as for the value (Kandolf, Koskela, Relton and Schweitzer 2021).

The adjoint of a decomposition, in contrast, is the derivative of the value that is returned, |v| Q f(T) e_1. The two
agree up to truncation, except where the space of v is invariant. There the value is exact, but dA moves f(A) v out of
the space, and the derivative of a decomposition that ended cannot follow. So there "adjoint", too, takes the derivative
of this file.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from bnnlaplace.core.linalg import matmul
from bnnlaplace.core.tree import floating
from bnnlaplace.krylov import adjoint
from bnnlaplace.krylov.derivative_modes import once, once_where
from bnnlaplace.krylov.functions import Converted, constants_cotangent
from bnnlaplace.krylov.gram_schmidt import anywhere
from bnnlaplace.krylov.operator import Settings


class Method(NamedTuple):
    """What f(A) v needs of Lanczos or Arnoldi.

    Attributes
    ----------
    forward, differentiable
        (matvec, settings, start, arguments) -> the decomposition, as a loop and with its adjoint.
    transpose
        matvec -> the product with A', with the same arguments.
    coordinates
        (function, constants, steps) -> the coordinates of f(A) v in the basis, and their change over the last fifth of
        the steps.
    pairing
        (function, constants, steps from v, steps from w) -> M of (M) or (M').
    """

    forward: Callable[..., Any]
    differentiable: Callable[..., Any]
    transpose: Callable[[Callable], Callable]
    coordinates: Callable[..., tuple[Float[Array, " K"], Float[Array, " K"]]]
    pairing: Callable[..., Float[Array, "K K"]]


def times_vector(
    method: Method,
    function: Converted,
    matvec: Callable,
    settings: Settings,
    gradient: str,
    start: Float[Array, " n"],
    arguments: tuple[Any, ...],
    constants: Any,
) -> tuple[Float[Array, " n"], Float[Array, " K"]]:
    """Return f(A) v, differentiable as `gradient` says, and the change of its coordinates over the last steps."""
    decompose = method.differentiable if gradient == "adjoint" else method.forward
    inputs = start, arguments
    if gradient == "frechet":
        # All derivatives come from `_response`, so none may pass through the decomposition.
        inputs = jax.lax.stop_gradient(inputs)
    # Inside of jit v may be zero. A start vector of ones then finds part of the spectrum, where f is defined, and the
    # result is multiplied by zero.
    is_zero = ~jnp.any(start != 0)
    steps = decompose(matvec, settings, jnp.where(is_zero, 1, inputs[0]), inputs[1])
    steps = steps._replace(start_norm=jnp.where(is_zero, 0, steps.start_norm))
    coordinates, change = method.coordinates(function, constants, steps)
    value = matmul(coordinates, steps.basis)
    if gradient == "autodiff":
        return value, change
    if gradient == "frechet":
        value = jax.lax.stop_gradient(value)
    response = _response(method, function, matvec, settings, gradient, value, start, arguments, constants, steps)
    if gradient == "frechet":
        return response, change
    # The two have one value and different derivatives: `where` chooses the derivative.
    return jnp.where(_can_leave(start, steps), response, value), change


def _can_leave(start: Array, steps: Any) -> Array:
    """Whether the space of v is invariant, but not the whole space, so that a change of A leads out of it."""
    return (steps.breakdown_step >= 0) & (steps.breakdown_step < start.size) | (steps.start_norm == 0)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 3, 4))
def _response(
    method: Method,
    function: Converted,
    matvec: Callable,
    settings: Settings,
    gradient: str,
    value: Array,
    start: Array,
    arguments: tuple[Any, ...],
    constants: Any,
    steps: Any,
) -> Array:
    """Return `value`, with the derivatives of f(A) v."""
    del method, function, matvec, settings, gradient, start, arguments, constants, steps
    return value


def _response_forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    value, *inputs = arguments[5:]
    return value, tuple(inputs)


def _response_backward(
    method: Method,
    function: Converted,
    matvec: Callable,
    settings: Settings,
    gradient: str,
    inputs: tuple[Any, ...],
    cotangent: Array,
) -> tuple[Any, ...]:
    start, arguments, constants, steps = inputs
    used = jnp.any(cotangent != 0)
    no_gradient = jax.tree.map(jnp.zeros_like, floating((arguments, constants)).leaves)

    def respond() -> tuple[Array, list[Array]]:
        # A zero cotangent comes here only as one of a batch. Any start vector will do for it: its result is dropped.
        other_start = jnp.where(used, cotangent, 1)
        # By the loop, not the adjoint, so that forward mode can differentiate this once more.
        other = method.forward(method.transpose(matvec), settings, other_start, arguments)
        towards_start, _ = method.coordinates(function, constants, other)
        multipliers = matmul(method.pairing(function, constants, steps, other), other.basis)
        # sum_k l_k' dA q_k with the multipliers l_k = sum_l M_kl s_l.
        batch_size = settings.vjp_batch_size
        d_arguments = adjoint.operator_cotangent(matvec, arguments, steps.basis, multipliers, batch_size)
        in_space = lambda constants: method.coordinates(function, constants, steps)[0]  # noqa: E731
        d_constants = constants_cotangent(in_space, constants, matmul(steps.basis, other_start))
        cotangents = matmul(towards_start, other.basis), jax.tree.leaves((d_arguments, d_constants))
        return jax.tree.map(lambda x: jnp.where(used, x, 0), cotangents)

    # For "adjoint", `times_vector` uses the response only if the space of v is invariant. Otherwise its cotangent is
    # zero, and the second decomposition is not run.
    d_start, leaves = jax.lax.cond(anywhere(used), respond, lambda: (jnp.zeros_like(start), no_gradient))
    cotangents = d_start, *floating((arguments, constants)).cotangent(leaves)
    if gradient == "frechet":
        message = "gradient='frechet' has first derivatives only; use gradient='adjoint' for second ones"
        cotangents = once(cotangents, message)
    # Second derivatives in an invariant space would need directions that neither recurrence has seen.
    return None, *once_where(cotangents, ~_can_leave(start, steps)), None


_response.defvjp(_response_forward, _response_backward)
