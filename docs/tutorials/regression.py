"""Regression with noise.

This page fits a curve that was not observed everywhere. The evidence chooses the noise level and the prior precision,
and the error bars hold outside the training set.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import bnnlaplace

# %% Data and model
# The data are $y = \sin 3x + \varepsilon$ with noise of standard deviation 0.2, observed on both sides of a gap. The
# network is a plain function of weights and inputs. Targets have the shape of the outputs, (B, 1).

NOISE = 0.2
rng = np.random.default_rng(0)


def observed(inputs):
    return jnp.asarray(np.sin(3 * inputs) + NOISE * rng.normal(size=inputs.shape), jnp.float32)


x_train = np.concatenate([rng.uniform(-2, -0.5, (60, 1)), rng.uniform(0.5, 2, (60, 1))]).astype(np.float32)
x_test = np.concatenate([rng.uniform(-2, -0.5, (100, 1)), rng.uniform(0.5, 2, (100, 1))]).astype(np.float32)
y_train, y_test = observed(x_train), observed(x_test)


def outputs(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


shapes = {"w1": (1, 20), "b1": (20,), "w2": (20, 1), "b2": (1,)}
start = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}

# %% A mode for a noise level
# The mode depends on the noise, so the likelihood object is part of the loss. `bnnlaplace.gaussian(sigma).log_prob`
# includes the normalisation; without it, noise levels could not be compared.


@jax.jit
def mode(params, sigma, prior_precision):
    likelihood = bnnlaplace.gaussian(sigma)

    def negative_log_joint(params):
        fit = likelihood.log_prob(outputs(params, x_train), y_train).sum()
        return 0.5 * prior_precision * optax.tree.norm(params, squared=True) - fit

    optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, 20_000))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(negative_log_joint)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=20_000)[0][0]


# %% The noise by the evidence
# For every noise level the loop finds a mode, a posterior and the best prior precision. The network has 61 weights, so
# the dense structure is cheap, and its evidence has no standard error. If the weights stay as they are,
# `optimize_prior_precision(optimize_sigma_noise=True)` finds the best noise at once; see [Choose a
# prior](../how_to/prior.md).

options = {"likelihood": "regression", "hessian_structure": "full", "prior_precision": 0.3}
fitted = {}
for sigma in (0.1, 0.15, 0.2, 0.25, 0.3):
    network = bnnlaplace.Network.from_function(outputs, mode(start, sigma, 0.3))
    la = bnnlaplace.Laplace(network, sigma_noise=sigma, **options)
    fitted[sigma] = la.fit((x_train, y_train)).optimize_prior_precision()
    evidence = fitted[sigma].log_marginal_likelihood().mean
    print(f"noise {sigma:.2f}: prior precision {fitted[sigma].prior_precision:.3g}, log evidence {evidence:.1f} nats")
sigma = max(fitted, key=lambda sigma: fitted[sigma].log_marginal_likelihood().mean)
la = fitted[sigma]
print(f"the evidence prefers a noise of {sigma}; the data were made with {NOISE}")

# %% Error bars
# `predictive` returns mean and variance of the outputs. With `with_noise=True` the variance is that of a new
# observation, which is what a held-out target must be compared with.

mean, variance = la.predictive(x_test, with_noise=True)
covered = float(jnp.mean(jnp.abs(y_test - mean) < 1.96 * jnp.sqrt(variance)))
print(f"95 % intervals hold {100 * covered:.0f} % of {len(x_test)} held-out observations")

# %% In the gap
# Without the noise, the standard deviation of the outputs is largest where nothing was observed.

points = np.array([[-1.25], [0.0], [1.25], [4.0]], np.float32)
mean, variance = la.predictive(points)
for point, m, v in zip(points[:, 0], mean[:, 0], variance[:, 0], strict=True):
    print(f"x = {point:5.2f}: {m:6.2f} +- {jnp.sqrt(v):.2f}")

axis = np.linspace(-3, 3, 200, dtype=np.float32)[:, None]
curve, spread = la.predictive(axis)
deviation = 2 * np.sqrt(spread[:, 0])
figure = Figure(figsize=(7, 3.2), layout="constrained")
panel = figure.subplots()
panel.fill_between(axis[:, 0], curve[:, 0] - deviation, curve[:, 0] + deviation, alpha=0.3, label="two deviations")
panel.plot(axis, curve, label="network")
panel.plot(axis, np.sin(3 * axis), "k:", label="truth")
panel.scatter(x_train, y_train, s=8, color="black", label="data")
panel.set(ylim=(-3, 3), xlabel="x")
panel.legend(ncols=4, frameon=False)

assert sigma == NOISE
assert 0.91 <= covered <= 0.99
assert variance[1, 0] > 4 * max(variance[0, 0], variance[2, 0])
