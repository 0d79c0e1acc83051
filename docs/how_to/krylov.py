"""Krylov methods alone.

`bnnlaplace.krylov` knows nothing of networks. It serves any linear operator that is given by its products, on arrays or
pytrees, and its results can be differentiated in everything that the product depends on.
"""

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace import krylov

# %% An operator
# A matrix $A$ with 1,000 rows is given by the function $v \mapsto A v$. Further arguments, here `params`, are what
# gradients can be taken in. `check_symmetric` tries the product on random vectors: Lanczos needs a symmetric one.


def matvec(v, params):
    return params["scale"] * v + 0.3 * (jnp.roll(v, 1) + jnp.roll(v, -1))


params, v = {"scale": jnp.linspace(1.0, 3.0, 1000)}, jnp.ones(1000)
krylov.check_symmetric(matvec, v, jax.random.key(0), params)
steps = krylov.lanczos(matvec, v, params, num_matvecs=20)
print(f"{len(steps.basis)} orthonormal vectors; fields {steps._fields}")

# %% A function of a matrix
# Twenty products give $A^{-1/2} v$ to many digits. Every result says how far it can be trusted. Arnoldi serves matrices
# that are not symmetric: a shift moves a vector along a ring, and leaves a constant one as it is.

root = krylov.matfun_lanczos(jax.lax.rsqrt, matvec, v, params, num_matvecs=20)
flow = krylov.matfun_arnoldi(jax.scipy.linalg.expm, lambda v: jnp.roll(v, 1) - v, v, num_matvecs=20)
print(f"estimated error of the inverse square root {root.error:.1g}, of the flow {flow.error:.1g}")

# %% A log-determinant and its gradient
# $\log\det A$ is the trace of $\log A$, estimated from 30 random probes. `sem` is the standard error over the probes;
# `truncation` is the effect of stopping the recurrence. The gradient comes from the adjoint of the recurrence, at the
# cost of a second one. Inside `jit` a call is compiled once.


def log_determinant(params):
    probes = krylov.rademacher_probes(jax.random.key(1), v, 30)
    estimate = krylov.stochastic_lanczos_quadrature(jnp.log, matvec, probes, params, num_matvecs=20)
    return estimate.mean, estimate


(value, estimate), gradient = jax.jit(jax.value_and_grad(log_determinant, has_aux=True))(params)
print(f"log det {value:.2f} +- {estimate.sem:.2f}; truncation {jnp.max(estimate.truncation):.1g}")

# %% Checked against dense algebra
# With 1,000 rows the matrix still fits in memory. The derivative of $\log\det A$ in the diagonal is the diagonal of
# $A^{-1}$.

dense = np.asarray(jax.vmap(lambda row: matvec(row, params))(jnp.eye(1000)))
exact = float(np.linalg.slogdet(dense)[1])
difference = float(np.abs(gradient["scale"] - np.diag(np.linalg.inv(dense))).mean())
eigenvalues, eigenvectors = np.linalg.eigh(dense)
inverse_root = eigenvectors / np.sqrt(eigenvalues) @ (eigenvectors.T @ np.asarray(v))
print(f"exact log det {exact:.2f}; mean error of the gradient {difference:.3f}")

# %% Options
# They choose full reorthogonalisation or none; the adjoint, a second decomposition or the loop itself for gradients;
# how much memory to spend; how many leading eigenpairs to sum exactly; and a relative error at which to stop. The
# [reference](../reference/krylov.md) has them all.

assert abs(value - exact) <= 4 * estimate.sem
assert root.error < 1e-3 and flow.error < 1e-3
np.testing.assert_allclose(root.value, inverse_root, atol=1e-4)
np.testing.assert_allclose(flow.value, np.ones(1000), atol=1e-4)
assert difference < 0.1
