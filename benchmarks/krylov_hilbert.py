"""Accuracy of derivatives on Hilbert matrices, for `krylov.py`.

At full depth the map A -> Q H Q' is the identity, so its Jacobian is known.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax import Array
from krylov_problems import decomp, factorisation

from bnnlaplace.krylov import tridiagonal_matrix
from bnnlaplace.krylov.arnoldi import Arnoldi, arnoldi_adjoint
from bnnlaplace.krylov.lanczos import Lanczos, lanczos_adjoint
from bnnlaplace.krylov.operator import Settings, default_tolerance


def hilbert_maps(method: str, size: int) -> dict[str, Callable[[Array, Array], Array]]:
    """Return the map (A, start) -> Q H Q' at full depth, once for each way to differentiate it."""

    def matvec(vector: Array, matrix: Array) -> Array:
        return matrix @ vector

    def rebuild(result: Any) -> Array:
        if isinstance(result, Lanczos):
            return result.basis.T @ tridiagonal_matrix(result.diagonal, result.off_diagonal) @ result.basis
        if isinstance(result, Arnoldi):
            return result.basis.T @ result.hessenberg @ result.basis
        return result.Q_tall.T @ result.J_small @ result.Q_tall

    adjoint = {"lanczos": lanczos_adjoint, "arnoldi": arnoldi_adjoint}[method]
    settings = Settings(size, default_tolerance(jnp.float64))
    maps = {
        "projection": lambda a, v: adjoint(matvec, settings, v, (a,)),
        "no projection": lambda a, v: adjoint(matvec, settings._replace(project=False), v, (a,)),
        "backpropagation": lambda a, v: factorisation("ours", method, matvec, size, "autodiff")(v, a),
    }
    if decomp and method == "lanczos":
        maps["matfree"] = lambda a, v: decomp.tridiag_sym(size)(matvec, v, a)
    elif decomp:
        maps["matfree"] = lambda a, v: decomp.hessenberg(size, reortho="full")(matvec, v, a)
        maps["matfree, no projection"] = lambda a, v: decomp.hessenberg(size, reortho="none")(matvec, v, a)
    return {name: lambda a, v, run=run: rebuild(run(a, v)) for name, run in maps.items()}


def jacobian_errors(method: str, size: int, seeds: int) -> dict[str, float]:
    """Mean over start vectors of log10 of the root-mean-square error of the Jacobian, for each way."""
    matrix = jnp.asarray(scipy.linalg.hilbert(size))
    expected = symmetriser = np.eye(size * size)
    if method == "lanczos":
        transposition = symmetriser.reshape(size, size, -1).transpose(1, 0, 2).reshape(size * size, -1)
        expected = symmetriser = (symmetriser + transposition) / 2
    errors = {}
    for name, run in hilbert_maps(method, size).items():
        jacobian, logarithms = jax.jit(jax.jacrev(run)), []
        for seed in range(seeds):
            start = jax.random.normal(jax.random.key(seed), (size,))
            actual = np.asarray(jacobian(matrix, start)).reshape(size * size, -1) @ symmetriser
            # An error of exactly zero is possible for small matrices.
            logarithms.append(np.log10(max(np.sqrt(np.mean((actual - expected) ** 2)), 1e-18)))
        errors[name] = float(np.mean(logarithms))
    return errors
