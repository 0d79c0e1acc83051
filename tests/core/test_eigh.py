"""Eigenvectors of batches of matrices, and a program with many such batches that must end."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.core.linalg import eigh

MANY = """
import jax, jax.numpy as jnp, numpy as np
from bnnlaplace.core.linalg import eigh

a = np.random.default_rng(0).normal(size=(20, 16, 25, 25)).astype(np.float32)
batches = list(jnp.asarray(a + np.swapaxes(a, -1, -2)))
# `vmap` makes batches, too.
decompose = jax.jit(lambda batches: [(jax.vmap(eigh) if number % 2 else eigh)(b) for number, b in enumerate(batches)])
for _ in range(25):
    jax.block_until_ready(decompose(batches))
"""


def test_eigenvectors(x64):
    for lead in [(), (3,), (2, 3), (0,)]:
        matrices = np.random.default_rng(0).normal(size=(*lead, 4, 4))
        matrices = matrices + np.swapaxes(matrices, -1, -2)
        values, vectors = (np.asarray(result) for result in eigh(jnp.asarray(matrices)))
        np.testing.assert_allclose(values, np.linalg.eigh(matrices)[0], atol=1e-12)
        np.testing.assert_allclose(matrices @ vectors, vectors * values[..., None, :], atol=1e-12)
        identities = np.broadcast_to(np.eye(4), matrices.shape)
        np.testing.assert_allclose(np.swapaxes(vectors, -1, -2) @ vectors, identities, atol=1e-12)


def test_many_batches_in_one_program_end():
    """With `jnp.linalg.eigh` in its place the program stands still on two cores in the first rounds."""
    subprocess.run([sys.executable, "-c", MANY], check=True, timeout=120)


def test_derivatives(x64):
    """Those of `jnp.linalg.eigh`, of first and second order, also for batches and the batches of `vmap`."""
    matrices = jnp.asarray(np.random.default_rng(1).normal(size=(2, 3, 3)))

    def function(decompose, matrix):
        values, vectors = decompose(matrix)
        return jnp.sum(jnp.sin(values)) + jnp.sum(vectors[..., 0] ** 4)

    def derivatives(decompose):
        one = lambda matrix: function(decompose, matrix)  # noqa: E731
        return (
            jax.grad(one)(matrices),
            jax.vmap(jax.grad(one))(matrices),
            jax.vmap(jax.jacrev(jax.jacrev(one)))(matrices),
        )

    for ours, theirs in zip(derivatives(eigh), derivatives(jnp.linalg.eigh), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-12)
