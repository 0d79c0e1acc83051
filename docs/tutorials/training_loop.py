"""The evidence in a training loop of your own.

`bnnlaplace.evidence.log_marginal_likelihood` is a pure function of arrays. It can be jitted, and differentiated in the
weights, in the prior precision and in the parameters of the likelihood. This page trains all three on it with optax.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import bnnlaplace
from bnnlaplace import evidence, krylov

# %% Data and model
# The data are noisy observations of a sine, the network has 31 weights. Neither the noise nor the prior precision is
# given.

NOISE = 0.3
rng = np.random.default_rng(0)
x = rng.uniform(-2, 2, (100, 1)).astype(np.float32)
y = jnp.asarray(np.sin(2 * x) + NOISE * rng.normal(size=x.shape), jnp.float32)


def outputs(weights, x):
    return jnp.tanh(x @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]


shapes = {"w1": (1, 10), "b1": (10,), "w2": (10, 1), "b2": (1,)}
weights = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
network = bnnlaplace.Network.from_function(outputs, weights)

# %% The objective
# Positive numbers are trained by their logarithms. Four probes, new ones at every step, estimate the log-determinant:
# the value is noisy, but its gradient is unbiased in the probes. `num_matvecs` is the depth of the Krylov space.
# `gradient="adjoint"` differentiates the estimate exactly, in everything that the GGN depends on, also in the weights.
#
# The batch is linearised once, and the linearisation keeps memory for all of its examples. For a large network add
# `microbatch=10, remat=True`: it keeps memory for ten examples and takes somewhat more time.


def estimated_evidence(trained, key, num_probes):
    probes = krylov.rademacher_probes(key, jnp.zeros(31), num_probes)
    return evidence.log_marginal_likelihood(
        trained["weights"],
        jnp.exp(trained["log_prior_precision"]),
        (x, y),
        probes,
        network=network,
        likelihood=bnnlaplace.gaussian(jnp.exp(trained["log_noise"])),
        num_matvecs=12,
        gradient="adjoint",
        probe_batch_size=4,
    )


# %% The loop
# This is an ordinary training loop.

STEPS = 800
optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, STEPS))
trained = {"weights": weights, "log_prior_precision": jnp.zeros(()), "log_noise": jnp.zeros(())}


@jax.jit
def step(trained, state, key):
    value, gradient = jax.value_and_grad(lambda trained: -estimated_evidence(trained, key, 4).mean)(trained)
    updates, state = optimizer.update(gradient, state)
    return optax.apply_updates(trained, updates), state, value


state = optimizer.init(trained)
values = []
for key in jax.random.split(jax.random.key(0), STEPS):
    trained, state, value = step(trained, state, key)
    values.append(value)
values = np.asarray(jnp.stack(values))
for first in range(0, STEPS, 200):
    print(f"steps {first:4d} to {first + 199:4d}: log evidence {-values[first : first + 200].mean():8.1f} nats")
figure = Figure(figsize=(6, 2.6), layout="constrained")
panel = figure.subplots()
panel.plot(-values, lw=0.7)
panel.set(xlabel="step", ylabel="log evidence, estimated", ylim=(-200, 0))

# %% What it found

prior_precision, noise = (float(jnp.exp(trained[name])) for name in ("log_prior_precision", "log_noise"))
print(f"prior precision {prior_precision:.3g}; noise {noise:.3f}, the data were made with {NOISE}")

# %% Checked against the exact evidence
# At the trained weights the exact evidence, by a dense structure, has its maximum at the same prior precision. The
# weights maximise the evidence with its determinant, so they lie beside the mode of the log joint; `fit` warns of that.

la = bnnlaplace.Laplace(
    network.with_params(trained["weights"]),
    likelihood="regression",
    hessian_structure="full",
    sigma_noise=noise,
    prior_precision=prior_precision,
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", bnnlaplace.NotAModeWarning)
    la = la.fit((x, y))
exact, best = la.log_marginal_likelihood().mean, la.evidence_optimum()
estimate = jax.jit(lambda trained: estimated_evidence(trained, jax.random.key(1), 64))(trained)
print(f"log evidence {exact:.2f} exactly, {estimate.mean:.2f} +- {estimate.sem:.2f} by 64 probes")
print(f"best prior precision at these weights {best.prior_precision:.3g}")

assert values[:50].mean() > values[-50:].mean() + 50
assert abs(noise / NOISE - 1) < 0.2
assert abs(np.log(prior_precision / best.prior_precision)) < 0.1
assert abs(estimate.mean - exact) < 4 * estimate.sem
