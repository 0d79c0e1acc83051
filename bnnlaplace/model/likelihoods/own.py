"""Checks of the functions of a likelihood of the user's own: wrong ones would broadcast, or give another curvature."""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bnnlaplace.core.types import AnyArray
from bnnlaplace.model.likelihoods.record import Likelihood

PASSED = "passed"

# Two ways to compute a product agree within this part of its largest entry. Faults are of the size of the product.
_TOLERANCE = 1e-2


def check_functions(likelihood: Likelihood, outputs_shape: tuple[int, ...], targets: AnyArray) -> None:
    """Check shapes and types of what the functions return, that B is linear, and that B' and Lambda are those of B.

    `targets` are checked against the outputs already. What passes is remembered.

    Raises
    ------
    ValueError
        If a function raises an error, or does not return what `Likelihood` says.
    """
    example = (1, *outputs_shape[1:])
    remembered = _remembered(jax.tree.structure(likelihood), example, str(targets.dtype))
    if PASSED in remembered:
        return
    rng = np.random.default_rng(0)
    f, u, v = (jnp.asarray(rng.normal(size=example), float) for _ in range(3))
    _check_shapes(likelihood, f, jnp.asarray(np.asarray(targets[:1])))
    for what, expected, found in _products(likelihood, f, u, v):
        expected, found = np.asarray(expected), np.asarray(found)
        size = max(np.abs(expected).max(), np.abs(found).max())
        # Such outputs may be outside of what a likelihood is made for.
        if np.isfinite(size) and np.abs(expected - found).max() > _TOLERANCE * size:
            raise ValueError(
                f"Likelihood({what}; got products that differ by {np.abs(expected - found).max():.3g} of {size:.3g}; "
                "see the attributes of bnnlaplace.Likelihood"
            )
    remembered.add(PASSED)


@lru_cache(maxsize=64)
def _remembered(structure: Any, outputs_shape: tuple[int, ...], dtype: str) -> set[str]:
    return set()


def _check_shapes(likelihood: Likelihood, f: Float[AnyArray, "1 ... C"], y: AnyArray) -> None:
    """Check what each function returns, by abstract evaluation."""
    lead = f.shape[:-1]
    calls: dict[str, tuple[tuple[Any, ...], tuple[int, ...]]] = {
        "log_prob": ((f, y), lead),
        "factor_mv": ((f, f), f.shape),
        "factor_transpose_mv": ((f, f), f.shape),
        "hessian_mv": ((f, f), f.shape),
    }
    if likelihood.target_weights is not None:
        calls["target_weights"] = ((y,), lead)
    for name, (arguments, shape) in calls.items():
        found = _shape_of(name, getattr(likelihood, name), arguments)
        is_float = jnp.issubdtype(getattr(found, "dtype", None), jnp.floating) or name == "target_weights"
        if getattr(found, "shape", None) != shape or not is_float:
            got = f"{found.dtype} of {found.shape}" if hasattr(found, "shape") else type(found).__name__
            raise ValueError(
                f"Likelihood({name}=...) must return floating-point numbers of shape {shape} for outputs of {f.shape}; "
                f"got {got}; see the attributes of bnnlaplace.Likelihood"
            )
    _shape_of("mean", likelihood.mean, (f,))


def _shape_of(name: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return jax.eval_shape(function, *arguments)
    except Exception as error:  # whatever a user's function raises
        message = " ".join(str(error).split())
        takes = "two arrays" if len(arguments) > 1 else "an array"
        raise ValueError(
            f"Likelihood({name}=...) must be a function of {takes} that JAX can trace; it raised "
            f"{type(error).__name__}: {message:.150}; see the attributes of bnnlaplace.Likelihood"
        ) from error


def _products(likelihood: Likelihood, f: Any, u: Any, v: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield what must hold, and both sides of it."""
    factor, transposed = likelihood.factor_mv, likelihood.factor_transpose_mv
    yield "factor_mv=...) must be linear in its second argument", factor(f, u + 2 * v), factor(f, u) + 2 * factor(f, v)
    what = "factor_transpose_mv=...) must be the transpose of factor_mv"
    yield what, jnp.sum(factor(f, u) * v), jnp.sum(u * transposed(f, v))
    yield "hessian_mv=...) must be B B' v with B of factor_mv", factor(f, transposed(f, v)), likelihood.hessian_mv(f, v)
