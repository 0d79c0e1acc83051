"""Draw functions from the posterior.

Predictions at single inputs need their variances alone. A question about several inputs needs their covariance: where a
curve has its maximum, how much two outputs differ, which input to measure next. This page draws whole functions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import bnnlaplace

# %% A fitted posterior
# The data lie on both sides of a gap. The network is at the mode for a noise of 0.2 and a prior precision of 0.3.

NOISE, PRIOR_PRECISION = 0.2, 0.3
rng = np.random.default_rng(0)
x = np.concatenate([rng.uniform(-2, -0.5, (40, 1)), rng.uniform(0.5, 2, (40, 1))]).astype(np.float32)
y = jnp.asarray(np.sin(3 * x) + NOISE * rng.normal(size=x.shape), jnp.float32)


def outputs(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def negative_log_joint(params):
    misfit = jnp.sum((outputs(params, x) - y) ** 2) / NOISE**2
    return 0.5 * (misfit + PRIOR_PRECISION * optax.tree.norm(params, squared=True))


optimizer = optax.adam(optax.cosine_decay_schedule(3e-2, 10_000))


def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(negative_log_joint)(params), state)
    return (optax.apply_updates(params, updates), state), None


shapes = {"w1": (1, 20), "b1": (20,), "w2": (20, 1), "b2": (1,)}
params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
(params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=10_000))((params, optimizer.init(params)))
network = bnnlaplace.Network.from_function(outputs, params)
options = {"hessian_structure": "full", "sigma_noise": NOISE, "prior_precision": PRIOR_PRECISION}
la = bnnlaplace.Laplace(network, "regression", **options).fit((x, y))

# %% All inputs together
# `functional_posterior` returns the Gaussian of the linearised outputs at all inputs together: a mean (B, C), and a
# covariance (B, C, B, C). Each draw from it is one function. With `joint=False` the covariance is that within each
# input, (B, C, C), and draws at different inputs have nothing to do with each other.

axis = np.linspace(-2, 2, 161, dtype=np.float32)[:, None]
together = la.functional_posterior(axis)
functions = together.sample(jax.random.key(0), 2000)
apart = la.functional_posterior(axis, joint=False).sample(jax.random.key(0), 2000)

figure = Figure(figsize=(7, 3), layout="constrained")
for panel, draws, title in zip(
    figure.subplots(1, 2, sharey=True), (functions, apart), ("joint=True", "joint=False"), strict=True
):
    panel.plot(axis, draws[:5, :, 0].T, lw=1)
    panel.scatter(x, y, s=6, color="black")
    panel.set(title=title, xlabel="x", ylim=(-4, 4))

# %% A question about several inputs
# Two inputs in the gap are close to each other, so their outputs are nearly the same. The variance of the difference is
# small, and variances of single inputs do not tell.

left, right = 78, 82
covariance = together.covariance[:, 0, :, 0]
difference = covariance[left, left] + covariance[right, right] - 2 * covariance[left, right]
by_draws = float(jnp.var(functions[:, left, 0] - functions[:, right, 0]))
wrong = float(jnp.var(apart[:, left, 0] - apart[:, right, 0]))
print(f"variance of f({axis[left, 0]:.2f}) - f({axis[right, 0]:.2f}): {difference:.4f}, by draws {by_draws:.4f}")
print(f"by draws at single inputs {wrong:.4f}, which is wrong")

# The maximum of a function is another such question: each function has its own.
peaks = axis[jnp.argmax(functions[..., 0], axis=1), 0]
print(f"the maximum lies in the gap for {100 * np.mean(np.abs(peaks) < 0.5):.0f} % of the functions")

# %% Which method for what
# | question | method |
# |---|---|
# | class probabilities, or mean and variance, at single inputs | `la(x)`, which is `la.predictive(x)` |
# | a covariance between inputs, any number of draws | `la.functional_posterior(x)` |
# | functions at more inputs than their covariance has memory for | `la.functional_posteriors(..., joint=True)` |
# | functions of the network itself, not linearised | `la.sample(key, S)`, and the network at these weights |
#
# `predictive` draws at each input from its marginal, which is all that an average at this input depends on. A joint
# covariance has (B C)^2 numbers, and its derivatives B C P. If they do not fit, a `MemoryError` says how many bytes are
# needed. Samples alone take S B C numbers. They are the same functions in every call with the same key, so inputs may
# come in parts:

precision = [la.prior.precision]
how = {"key": jax.random.key(1), "num_samples": 3, "joint": True}
(first,), (second,) = (la.functional_posteriors(part, precision, **how) for part in (axis[:80], axis[80:]))
in_parts = jnp.concatenate([first.deviations, second.deviations], axis=1)
(whole,) = la.functional_posteriors(axis, precision, **how)
print(f"largest difference between parts and whole: {jnp.abs(in_parts - whole.deviations).max():.1g}")

# %% What is exact
# The covariance is exact for the curvature that a structure has. So that of "full" is exact, and that of "lanczos" if
# the data have no more outputs than `max_vectors`. "diag" and "kron" lack what they leave out between weights.
#
# With more data "lanczos" knows the curvature inside its basis. Outside it takes the variance of the prior times a
# factor for each input, which the samples of the posterior choose. On a network of 602 weights for digits, at the best
# prior precision, this joint covariance is off by 15 % in the Frobenius norm. That of the 32 samples alone is off by
# 120 %, and one with the whole variance of the prior outside the basis by 40 %. The variances of single inputs differ
# a little from those of `functional_variance`, which come from the samples alone.

assert abs(by_draws / difference - 1) < 0.2
assert wrong > 5 * difference
assert jnp.abs(in_parts - whole.deviations).max() < 1e-3
