"""A plain error, or NaN, for a derivative that a function does not have.

A custom adjoint has no forward-mode derivative. JAX's own error for one does not name the function, and inside of `jit`
it is about a missing lowering rule. JAX cannot notice a second derivative that exists but is wrong. So values pass
through identities that notice how they are differentiated:

- `reverse_only`: forward mode raises.
- `once_in_reverse`: reverse mode twice raises.
- `once`: every second derivative raises.
- `once_where`: second derivatives are NaN where a condition, known only at run time, is false.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array, Bool

from bnnlaplace.core.tree import floating


def reverse_only(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `function` with forward-mode derivatives that raise a TypeError, which starts with `name`."""

    def call(*args: Any) -> Any:
        try:
            return function(*_mark(args, name))
        except TypeError as error:
            # JAX's own check comes first if the tangent is batched while `jit` traces.
            if "forward-mode" in str(error) and "reverse mode only" not in str(error):
                raise TypeError(
                    f"{_no_forward_mode(name)}; or a function of yours that {name.split('(')[0]} calls has a "
                    "jax.custom_vjp, which allows no forward mode either, as jax.hessian asks for: there use "
                    "jax.jacrev(jax.grad(...))"
                ) from error
            raise

    return call


def once_in_reverse(tree: Any, name: str) -> Any:
    """Return a gradient whose own derivatives in reverse mode raise a TypeError, which starts with `name`."""
    return jax.tree.map(lambda leaf: _identity(leaf, lambda t: _once_in_reverse_p.bind(t, name=name)), tree)


def once(tree: Any, message: str) -> Any:
    """Return a gradient whose own derivatives raise a TypeError with `message`."""

    def refuse(_: Any) -> None:
        raise TypeError(message)

    return jax.tree.map(lambda leaf: _identity(leaf, refuse), tree)


def once_where(tree: Any, allowed: Bool[Array, ""]) -> Any:
    """Return a gradient whose own derivatives are NaN where `allowed` is false."""

    @jax.custom_jvp
    def identity(value: Any, allowed: Any) -> Any:
        return value

    @identity.defjvp
    def tangent(primals: tuple, tangents: tuple) -> tuple:
        (value, allowed), (d_value, _) = primals, tangents
        return value, _once_where_p.bind(d_value, jnp.broadcast_to(allowed, d_value.shape), is_transposed=False)

    return jax.tree.map(lambda leaf: identity(leaf, allowed), tree)


def _identity(value: Any, tangent: Callable[[Any], Any]) -> Any:
    """Return `value`; its tangents pass through `tangent`."""
    if not jnp.issubdtype(jnp.result_type(value), jnp.inexact):
        return value

    @jax.custom_jvp
    def identity(value: Any) -> Any:
        return value

    identity.defjvp(lambda primals, tangents: (primals[0], tangent(tangents[0])))
    return identity(value)


def _mark(tree: Any, name: str) -> Any:
    """Return `tree`; its tangents raise in forward mode.

    All leaves share one rule. It leaves the symbolic zeros alone, so that an outer derivative in an argument which the
    inner one leaves out is not mistaken for forward mode.
    """
    active = floating(tree)

    @jax.custom_jvp
    def identity(leaves: list[Any]) -> list[Any]:
        return leaves

    def tangent(primals: tuple, tangents: tuple) -> tuple:
        marked = [t if isinstance(t, SymbolicZero) else _reverse_only_p.bind(t, name=name) for t in tangents[0]]
        return primals[0], marked

    identity.defjvp(tangent, symbolic_zeros=True)
    return active.fill(identity(active.leaves))


def _no_forward_mode(name: str) -> str:
    return (
        f"{name} has derivatives in reverse mode only; got a forward-mode one (jax.jvp, jax.jacfwd or jax.linearize); "
        "use jax.grad, jax.vjp or jax.jacrev, or gradient='autodiff'"
    )


def _refuse_forward(*_: Any, name: str) -> None:
    raise TypeError(_no_forward_mode(name))


def _refuse_reverse(*_: Any, name: str) -> None:
    raise TypeError(
        f"{name} has second derivatives in forward mode over reverse mode only; got reverse mode twice; use "
        "jax.hessian or jax.jacfwd(jax.grad(...)), or leave relative_sem out"
    )


def _linear_identity(name: str) -> Primitive:
    """A primitive that is the identity under abstract evaluation and `vmap`; all other rules are left to the caller."""
    primitive = Primitive(name)
    primitive.def_abstract_eval(lambda tangent, **_: tangent)
    batching.primitive_batchers[primitive] = lambda args, dims, **kwargs: (primitive.bind(*args, **kwargs), dims[0])
    return primitive


# The identity on tangents, which raises when it is evaluated. Reverse mode transposes it and never evaluates it.
_reverse_only_p = _linear_identity("reverse_only")
_reverse_only_p.def_impl(_refuse_forward)
mlir.register_lowering(_reverse_only_p, lambda *_, name: _refuse_forward(name=name))
ad.deflinear(_reverse_only_p, lambda cotangent, **_: [cotangent])

# The identity on tangents, which raises when it is transposed. Forward mode evaluates it and never transposes it.
_once_in_reverse_p = _linear_identity("once_in_reverse")
_once_in_reverse_p.def_impl(lambda tangent, **_: tangent)
mlir.register_lowering(_once_in_reverse_p, lambda _, tangent, **__: [tangent])
ad.deflinear(_once_in_reverse_p, lambda _, name: _refuse_reverse(name=name))


def _identity_or_nan(tangent: Array, allowed: Bool[Array, "..."], *, is_transposed: bool) -> Array:
    """Return a tangent or cotangent where it is allowed, and NaN elsewhere."""
    # A cotangent of zero says that this derivative is not asked for, so it stays zero. A tangent of zero may be wrong.
    unchanged = allowed | (tangent == 0) if is_transposed else allowed
    return jnp.where(unchanged, tangent, jnp.nan)


def _once_where_transpose(cotangent: Array, _: Any, allowed: Array, *, is_transposed: bool) -> tuple[Array, None]:
    return _once_where_p.bind(ad.instantiate_zeros(cotangent), allowed, is_transposed=not is_transposed), None


def _once_where_jvp(primals: tuple, tangents: tuple, **options: Any) -> tuple[Array, Array]:
    tangent = _once_where_p.bind(ad.instantiate_zeros(tangents[0]), primals[1], **options)
    return _once_where_p.bind(*primals, **options), tangent


# The identity on tangents, or NaN: differentiation takes it for linear in the tangent.
_once_where_p = Primitive("once_where")
_once_where_p.def_abstract_eval(lambda tangent, _, **__: tangent)
_once_where_p.def_impl(_identity_or_nan)
mlir.register_lowering(_once_where_p, mlir.lower_fun(_identity_or_nan, multiple_results=False))
batching.defbroadcasting(_once_where_p)
ad.primitive_jvps[_once_where_p] = _once_where_jvp
ad.primitive_transposes[_once_where_p] = _once_where_transpose
