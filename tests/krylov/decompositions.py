"""Lanczos and Arnoldi behind one interface, small operators that the tests share, and tables of refused calls."""

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnnlaplace.krylov import arnoldi, lanczos, tridiagonal_matrix

SIZE = 12


class Decomposition(NamedTuple):
    """A decomposition, its small matrix, and an operator with parameters that suits it."""

    decompose: Callable[..., Any]
    matrix: Callable[[Any], Array]
    dense: Callable[[dict[str, Array]], Array]

    def matvec(self, vector: Array, params: dict[str, Array]) -> Array:
        return self.dense(params) @ vector

    def run(self, start: Array, params: dict[str, Array], **options: Any) -> Any:
        return self.decompose(self.matvec, start, params, **options)


DECOMPOSITIONS = {
    "lanczos": Decomposition(
        lanczos,
        lambda result: tridiagonal_matrix(result.diagonal, result.off_diagonal),
        lambda params: params["half"] + params["half"].T + params["shift"] * jnp.eye(SIZE, dtype=params["half"].dtype),
    ),
    "arnoldi": Decomposition(
        arnoldi,
        lambda result: result.hessenberg,
        lambda params: params["half"] + params["shift"] * jnp.eye(SIZE, dtype=params["half"].dtype),
    ),
}


def random_operator(dtype: Any = np.float64, shift: float = 0.3) -> tuple[Array, dict[str, Array]]:
    """A start vector, and parameters of an operator, which is well conditioned for `shift` = 8."""
    rng = np.random.default_rng(0)
    params = {"half": jnp.asarray(rng.normal(size=(SIZE, SIZE)) / 2, dtype), "shift": jnp.asarray(shift, dtype)}
    return jnp.asarray(rng.normal(size=SIZE), dtype), params


def low_rank(rank: int) -> Callable[[Array, dict[str, Array]], Array]:
    """A symmetric operator of the given rank. With the null space, a Krylov space has rank + 1 dimensions."""

    def matvec(vector: Array, params: dict[str, Array]) -> Array:
        factor = params["half"][:, :rank]
        return factor @ (factor.T @ vector)

    return matvec


def random_cotangent(shapes: Any) -> Any:
    """Normal numbers like the floating-point leaves of `shapes`, and the zeros that JAX wants for the others."""
    rng = np.random.default_rng(1)

    def draw(leaf: Any) -> Any:
        is_floating = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.asarray(rng.normal(size=leaf.shape)) if is_floating else np.zeros(leaf.shape, jax.dtypes.float0)

    return jax.tree.map(draw, shapes)


def assert_close(ours: Any, reference: Any, relative: float) -> None:
    """Assert that every leaf is within `relative` of the reference, in units of the largest entry of the leaf."""
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=relative * float(np.abs(other).max()))


class Refusal(NamedTuple):
    """A call that must raise `error` with a message that matches `pattern`."""

    case: str
    call: Callable[[], Any]
    error: type[Exception] | tuple[type[Exception], ...]
    pattern: str


def check_refusals(refusals: Iterable[Refusal]) -> None:
    """Make every call, and report all that were not refused as they should be."""
    faults = []
    for case, call, error, pattern in refusals:
        try:
            call()
        except error as raised:
            if not re.search(pattern, str(raised)):
                faults.append(f"{case}: {raised} does not match {pattern}")
        except Exception as raised:
            faults.append(f"{case}: raised {raised!r}")
        else:
            faults.append(f"{case}: raised nothing")
    assert not faults, "\n".join(faults)
