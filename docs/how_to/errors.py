"""Read the numbers: errors and convergence.

Every number that is estimated says how far it can be trusted. This page goes through what each of them says, on a
network of 259 weights for which the exact numbers can be had as well.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnnlaplace

# %% A posterior to look at
# Three classes, a plain function, at the mode for a prior precision of 1.

rng = np.random.default_rng(0)
x = rng.normal(size=(200, 4)).astype(np.float32)
y = jnp.asarray((x[:, 0] * x[:, 1] > 0.3).astype(int) + (x[:, 2] > 0.5))


def logits(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def negative_log_joint(params):
    fit = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).sum()
    return fit + 0.5 * optax.tree.norm(params, squared=True)


optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 3000))


def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(negative_log_joint)(params), state)
    return (optax.apply_updates(params, updates), state), None


shapes = {"w1": (4, 32), "b1": (32,), "w2": (32, 3), "b2": (3,)}
params = {name: jnp.asarray(0.5 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
(params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3000))((params, optimizer.init(params)))
network = bnnlaplace.Network.from_function(logits, params)
exact = bnnlaplace.Laplace(network, hessian_structure="full").fit((x, y))
la = bnnlaplace.Laplace(network, hessian_structure="lanczos").fit((x, y), key=jax.random.key(0))

# %% Are the weights at a mode?
# The evidence and the posterior are those of a mode. `mode_decrement()` is the squared distance to it in standard
# deviations of the posterior: to be held against `effective_parameters`, the squared distance at which posterior
# samples lie in the directions that the data determine. It does not depend on how weights are scaled, as the norm of
# `mode_gradient()` does.

error = la.krylov_error()
print(f"mode decrement {la.mode_decrement():.2g}, effective parameters {error.effective_parameters:.0f}")

# %% The evidence: two errors
# `log_marginal_likelihood()` is an `Estimate(mean, sem)`. `sem` is the standard error over the random probes, and
# exactly zero for "diag", "kron", "full" and where "lanczos" is exact, which have none. With S probes it is itself
# known to a fraction of 1 / sqrt(2 (S - 1)), 13 % at the default of 32; with far fewer it misleads.
#
# Stopping the recurrence is another error, of one sign, that `sem` knows nothing of: it lowers the evidence by at
# most half of `krylov_error().log_determinant`.

estimate = la.log_marginal_likelihood()
print(f"exact {exact.log_marginal_likelihood().mean:.2f}, estimate {estimate.mean:.2f} +- {estimate.sem:.2f} nats")
print(f"stopping the recurrence lowers it by at most {error.log_determinant / 2:.2g} nats")

# %% The best prior precision: one interval for both
# `evidence_optimum()` gives the maximiser with an interval that reaches over both errors. `at_bound` says that the
# evidence still rises at the end of the search range, so that there is no maximum inside: weights that are zero do
# that.

best = la.evidence_optimum()
print(f"best prior precision {best.prior_precision:.3g} [{best.low:.3g}, {best.high:.3g}], at bound: {best.at_bound}")
print(f"exactly {exact.evidence_optimum().prior_precision:.3g}")

# %% Posterior samples: a bound
# `krylov_error().sample` bounds the error of a sample, relative to the effective number of parameters, in the norm in
# which predictions see it. `fit` goes on until it is below `tolerance`, 5 % by default, at the maximiser of the
# evidence. At smaller prior precisions it is larger. There a method that needs the samples warns, and
# `validation_curve` marks the point as not converged.


def warnings_of(function):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = function()
    return result, [str(warning.message) for warning in caught]


short, told = warnings_of(
    lambda: bnnlaplace.Laplace(network, hessian_structure="lanczos").fit(
        (x, y), key=jax.random.key(0), num_probes=16, max_vectors=32
    )
)
print(f"with 32 basis vectors: {told[0]}")
_, told_again = warnings_of(lambda: short.predictive(x[:5]))
print(f"predictive says: {told_again[0]}")

# %% Predictions: the number of samples
# A Lanczos posterior has one sample for each probe. The variance of outputs that is estimated from S of them has a
# relative standard error of sqrt(2 / S), 25 % at 32; probabilities through `link_approx="mc"` are means over S
# samples. More: `fit(num_probes=...)`. "diag", "kron", "full" and an exact "lanczos" have the variance exactly.

variance = jnp.trace(la.functional_variance(x[:50]), axis1=1, axis2=2)
exact_variance = jnp.trace(exact.functional_variance(x[:50]), axis1=1, axis2=2)
ratio = np.asarray(variance / exact_variance)
print(
    f"variance of the outputs over the exact one: mean {ratio.mean():.2f}, from {ratio.min():.2f} to {ratio.max():.2f}"
)

# %% Metrics: intervals
# `calibration.evaluate` has a bootstrap interval for each metric: the uncertainty of a finite test set. Two methods
# on the same test set differ by less than their intervals suggest, as they share its examples:
# `resampling.paired_differences` of two `calibration.bootstrap` results with one seed says by how much.

assert la.mode_decrement() < 0.05 * error.effective_parameters
assert abs(estimate.mean - exact.log_marginal_likelihood().mean) < 4 * estimate.sem + error.log_determinant / 2
assert best.low / 1.1 <= exact.evidence_optimum().prior_precision <= best.high * 1.1
assert "has not converged" in told[0] and "has not converged" in told_again[0]
assert abs(ratio.mean() - 1) < 0.25
