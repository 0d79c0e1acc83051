"""The derivative of f(A) v itself, from the Krylov space of v and that of its cotangent w.

In the direction dA of the operator, f(A) v moves by the Frechet derivative L(A, dA) v. Where A is symmetric with
eigenpairs (lambda_i, x_i) it is (Daleckii and Krein; Higham 2008, theorem 3.11)

    w' L(A, dA) v = sum_ij f[lambda_i, lambda_j] (w' x_i) (x_i' dA x_j) (x_j' v),

with divided differences f[., .]. It takes the eigenvectors that v has components along, those that w has, and nothing
else. So with A Q = Q T + .. from v, and A S = S R + .. from w,

    w' L(A, dA) v = sum_kl M_kl s_l' dA q_k,    M = |v| |w| U ((u w') o f[theta_j, omega_l]) W',                    (M)

where theta, U and omega, W are the eigenpairs of T and R, and u, w the first rows of U and W. The gradient in v is
f(A) w = |w| S f(R) e_1. For a general A the second space is that of A', and M' the upper right block of (Higham 2008,
section 3.2)

    f([[R, e_1 e_1'], [0, T']]) |v| |w|.                                                                          (M')

The error is one of truncation, as that of the value (Kandolf, Koskela, Relton and Schweitzer 2021).

The adjoint of a decomposition is the derivative of |v| Q f(T) e_1 instead, the value that is returned. The two agree to
truncation, but where the space of v is invariant they part: the value is exact there, dA moves it out of the space, and
the derivative of a decomposition that ended cannot follow.
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
    """What Lanczos and Arnoldi each bring to f(A) v.

    Attributes
    ----------
    forward, differentiable
        (matvec, settings, start, arguments) -> a decomposition, as a loop and with its adjoint.
    transpose
        matvec -> that of A', with the same arguments.
    coordinates
        (function, constants, steps) -> f(A) v in the basis, and what of it came with the last fifth of the steps.
    pairing
        (function, constants, steps from v, steps from w) -> M.
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
    """f(A) v, differentiable as `gradient` says, and the coordinates of what came with the last fifth of the steps."""
    decompose = method.differentiable if gradient == "adjoint" else method.forward
    inputs = start, arguments
    if gradient == "frechet":  # all of its derivatives come from the response
        inputs = jax.lax.stop_gradient(inputs)
    # For a zero v, which can come inside of jit, f is evaluated on the spectrum all the same, and multiplied by zero.
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
    return jnp.where(_ended(start, steps), response, value), change


def _ended(start: Array, steps: Any) -> Array:
    """Whether a change of A leads out of the space of v; out of one that is everything nothing leads."""
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
    """`value`, with the derivatives of f(A) v."""
    del method, function, matvec, settings, gradient, start, arguments, constants, steps
    return value


def _response_forward(*arguments: Any) -> tuple[Array, tuple[Any, ...]]:
    value, *inputs = arguments[5:]
    return value, inputs


def _response_backward(
    method: Method,
    function: Converted,
    matvec: Callable,
    settings: Settings,
    gradient: str,
    inputs: list[Any],
    cotangent: Array,
) -> tuple[Any, ...]:
    start, arguments, constants, steps = inputs
    used = jnp.any(cotangent != 0)
    no_gradient = jax.tree.map(jnp.zeros_like, floating((arguments, constants)).leaves)

    def respond() -> tuple[Array, list[Array]]:
        # A cotangent of zero comes here only beside others in a batch.
        other_start = jnp.where(used, cotangent, 1)
        # The loop, since what is differentiated again may be so in forward mode, too.
        other = method.forward(method.transpose(matvec), settings, other_start, arguments)
        towards_start, _ = method.coordinates(function, constants, other)
        multipliers = matmul(method.pairing(function, constants, steps, other), other.basis)
        size = settings.vjp_batch_size
        d_arguments = adjoint.operator_cotangent(matvec, arguments, steps.basis, multipliers, size)
        in_space = lambda constants: method.coordinates(function, constants, steps)[0]  # noqa: E731
        d_constants = constants_cotangent(in_space, constants, matmul(steps.basis, other_start))
        found = matmul(towards_start, other.basis), jax.tree.leaves((d_arguments, d_constants))
        return jax.tree.map(lambda x: jnp.where(used, x, 0), found)

    d_start, leaves = jax.lax.cond(anywhere(used), respond, lambda: (jnp.zeros_like(start), no_gradient))
    found = d_start, *floating((arguments, constants)).cotangent(leaves)
    if gradient == "frechet":
        found = once(found, "gradient='frechet' has first derivatives only; use gradient='adjoint' for second ones")
    # Those of "adjoint" in an invariant space would need directions that neither recurrence has seen.
    return None, *once_where(found, ~_ended(start, steps)), None


_response.defvjp(_response_forward, _response_backward)
