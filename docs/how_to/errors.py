"""Read the numbers: errors and convergence.

Every estimated number says how far it can be trusted. This page goes through these errors for a network of 259 weights,
for which the exact numbers can be computed as well.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnnlaplace

# %% A posterior to look at
# The network is a plain function with three classes, at the mode for a prior precision of 1.

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
# The evidence and the posterior are defined at a mode. `mode_decrement()` is the squared distance to the mode in
# standard deviations of the posterior. Compare it with `effective_parameters`, the squared distance of a posterior
# sample in the directions that the data determine. Unlike the norm of `mode_gradient()`, it does not depend on the
# scale of the weights.

error = la.krylov_error()
print(f"mode decrement {la.mode_decrement():.2g}, effective parameters {error.effective_parameters:.0f}")

# %% The evidence: two errors
# `log_marginal_likelihood()` is an `Estimate(mean, sem)`. `sem` is the standard error over the random probes. "diag",
# "kron", "full" and an exact "lanczos" have no probes, and their `sem` is exactly zero. With $S$ probes, `sem` itself
# has a relative error of $1 / \sqrt{2 (S - 1)}$: 13 % for the default of 32. With far fewer probes it misleads.
#
# `sem` does not include the truncation error of the recurrence. Truncation lowers the evidence by at most
# `krylov_error().truncation / 2`. Nor does it include rounding: curvature below `structure.resolution()` counts as
# zero, which raises the evidence by about `krylov_error().rounding / 2` at most. A prior precision below the resolution
# gets a warning. The resolution is that of the type in which the network computes: a network in bfloat16 can have an
# evidence at much larger precisions only.

estimate = la.log_marginal_likelihood()
print(f"exact {exact.log_marginal_likelihood().mean:.2f}, estimate {estimate.mean:.2f} +- {estimate.sem:.2f} nats")
print(f"stopping the recurrence lowers it by at most {error.truncation / 2:.2g} nats")
print(f"curvature that rounding hides would lower it by {error.rounding / 2:.2g} nats at most")

# %% The best prior precision: one interval for both
# `evidence_optimum()` gives the maximiser and an interval that covers both errors. `at_bound` says that the evidence
# still rises at the end of the search range, so there is no maximum inside. This happens if all weights are zero.

best = la.evidence_optimum()
print(f"best prior precision {best.prior_precision:.3g} [{best.low:.3g}, {best.high:.3g}], at bound: {best.at_bound}")
print(f"exactly {exact.evidence_optimum().prior_precision:.3g}")

# %% Posterior samples: a bound
# `krylov_error().sample` bounds the error of a sample, relative to the effective number of parameters, in the norm that
# matters for predictions. `fit` goes on until the bound is below `tolerance`, 5 % by default, at the maximiser of the
# evidence. At smaller prior precisions the error is larger: a method that needs the samples then warns, and
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
# A Lanczos posterior has one sample for each probe. The variance of the outputs, estimated from $S$ samples, has a
# relative standard error of $\sqrt{2 / S}$: 25 % for 32. Probabilities by `link_approx="mc"` are means over the
# samples. Ask for more with `fit(num_probes=...)`. "diag", "kron", "full" and an exact "lanczos" compute the variance
# exactly.

variance = jnp.trace(la.functional_variance(x[:50]), axis1=1, axis2=2)
exact_variance = jnp.trace(exact.functional_variance(x[:50]), axis1=1, axis2=2)
ratio = np.asarray(variance / exact_variance)
print(
    f"variance of the outputs over the exact one: mean {ratio.mean():.2f}, from {ratio.min():.2f} to {ratio.max():.2f}"
)

# %% Metrics: intervals
# `calibration.evaluate` gives a bootstrap interval for each metric: the uncertainty of a finite test set. Two methods
# on one test set can be told apart better than their intervals suggest, because they share its examples. For the
# interval of the difference, pass two results of `calibration.bootstrap` with one seed to
# `calibration.paired_differences`. If both were trained with several seeds, `calibration.paired_interval` compares them
# over seeds and examples.

assert la.mode_decrement() < 0.05 * error.effective_parameters
assert abs(estimate.mean - exact.log_marginal_likelihood().mean) < 4 * estimate.sem + error.log_determinant / 2
assert best.low / 1.1 <= exact.evidence_optimum().prior_precision <= best.high * 1.1
assert "has not converged" in told[0] and "has not converged" in told_again[0]
assert abs(ratio.mean() - 1) < 0.25
