"""A plain error where somebody asks for forward mode of a function that has only an adjoint.

JAX's own error for this does not say which function, and under `jit` it is one about a missing lowering rule. So the
arguments pass through an identity that differentiation in reverse mode does not notice, and whose forward-mode tangent
cannot be evaluated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir


def reverse_only(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return `function`, whose forward-mode derivatives raise a TypeError that starts with `name`."""

    def call(*args: Any) -> Any:
        try:
            return function(*jax.tree.map(lambda leaf: _mark(leaf, name), args))
        except TypeError as error:
            # JAX's own check can come first, where the tangent is batched while `jit` traces.
            if "forward-mode" in str(error) and name not in str(error):
                _refuse(name=name)
            raise

    return call


def _mark(leaf: Any, name: str) -> Any:
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        return leaf

    @jax.custom_jvp
    def identity(value: Any) -> Any:
        return value

    identity.defjvp(lambda primals, tangents: (primals[0], _tangent_p.bind(tangents[0], name=name)))
    return identity(leaf)


def _refuse(*_: Any, name: str) -> None:
    raise TypeError(
        f"{name} has derivatives in reverse mode only; got a forward-mode one (jax.jvp, jax.jacfwd or jax.linearize); "
        "use jax.grad, jax.vjp or jax.jacrev, or gradient='autodiff'"
    )


# The identity on tangents, linear and defined for everything but its evaluation.
_tangent_p = Primitive("reverse_only_tangent")
_tangent_p.def_abstract_eval(lambda tangent, **_: tangent)
_tangent_p.def_impl(_refuse)
mlir.register_lowering(_tangent_p, lambda *_, name: _refuse(name=name))
ad.deflinear(_tangent_p, lambda cotangent, **_: [cotangent])
batching.primitive_batchers[_tangent_p] = lambda args, dims, **kwargs: (_tangent_p.bind(*args, **kwargs), dims[0])
