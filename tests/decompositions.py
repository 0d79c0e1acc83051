"""Lanczos and Arnoldi behind one interface, and the small operators that their tests share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from bnnlaplace.krylov import arnoldi, lanczos, tridiagonal_matrix

SIZE = 12


class Decomposition(NamedTuple):
    """A decomposition, its small matrix, and an operator with parameters that it is made for."""

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
    """A start vector, and parameters of an operator, well conditioned for `shift` = 8."""
    rng = np.random.default_rng(0)
    params = {"half": jnp.asarray(rng.normal(size=(SIZE, SIZE)) / 2, dtype), "shift": jnp.asarray(shift, dtype)}
    return jnp.asarray(rng.normal(size=SIZE), dtype), params


def low_rank(rank: int) -> Callable[[Array, dict[str, Array]], Array]:
    """Symmetric, of the given rank: with the null space, a Krylov space has rank + 1 dimensions."""

    def matvec(vector: Array, params: dict[str, Array]) -> Array:
        factor = params["half"][:, :rank]
        return factor @ (factor.T @ vector)

    return matvec


def random_cotangent(result: Any) -> Any:
    """Normal numbers like the floating-point leaves of `result`."""
    leaves, structure = jax.tree.flatten(result)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    drawn = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        if jnp.issubdtype(leaf.dtype, jnp.floating)
        else np.zeros(leaf.shape, jax.dtypes.float0)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, drawn)


def assert_close(ours: Any, reference: Any, relative: float) -> None:
    """Every leaf within `relative` of the reference, in units of the largest entry of the leaf."""
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(reference), strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=relative * float(jnp.abs(other).max()))
