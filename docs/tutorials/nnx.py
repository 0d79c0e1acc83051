"""An NNX model with dropout.

This page puts a posterior on a binary classifier of two interleaved half circles. Dropout must be off wherever a
posterior is computed. The posterior adds what a point estimate lacks: doubt far away from the data.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from matplotlib.figure import Figure
from sklearn.datasets import make_moons

import bnnlaplace
from bnnlaplace.calibration import detection

# %% Data and model
# The targets of a binary likelihood have the shape of the outputs, here (B, 1).

points, classes = make_moons(n_samples=300, noise=0.15, random_state=0)
x, y = jnp.asarray(points, jnp.float32), jnp.asarray(classes[:, None], jnp.float32)
x_train, y_train, x_test, y_test = x[:200], y[:200], x[200:], y[200:]


class Classifier(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 16, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.dropout(nnx.tanh(self.hidden(x))))


model = Classifier(nnx.Rngs(0))

# %% Training, with dropout and then without
# The loss is the negative log joint with a prior precision of 0.1. In the second phase dropout is off, so it descends
# to a mode of the network that is expanded below.


def negative_log_joint(model):
    fit = optax.sigmoid_binary_cross_entropy(model(x_train), y_train).sum()
    return fit + 0.5 * 0.1 * optax.tree.norm(nnx.state(model, nnx.Param), squared=True)


@nnx.jit
def step(model, optimizer):
    optimizer.update(model, nnx.grad(negative_log_joint)(model))


model.train()
optimizer = nnx.Optimizer(model, optax.adam(2e-2), wrt=nnx.Param)
for _ in range(200):
    step(model, optimizer)
model.eval()
optimizer = nnx.Optimizer(model, optax.adam(optax.cosine_decay_schedule(2e-2, 1200)), wrt=nnx.Param)
for _ in range(1200):
    step(model, optimizer)

# %% A model that is not deterministic is refused
# With dropout the outputs, and so the curvature, would belong to one random mask. `fit` runs the network twice,
# compares, and refuses if the outputs differ.

model.train()
noisy = bnnlaplace.Laplace(bnnlaplace.Network.from_nnx(model), likelihood="binary", hessian_structure="full")
try:
    noisy.fit((x_train, y_train))
except ValueError as error:
    refusal = str(error)
    print(f"refused: {refusal}")

# %% The posterior
# `Network.from_nnx` copies the model. Its parameters are the weights; all other state is frozen. With 65 weights the
# dense matrix, `hessian_structure="full"`, costs little and is exact. "lanczos" agrees with it here.

model.eval()
network = bnnlaplace.Network.from_nnx(model)
la = bnnlaplace.Laplace(network, likelihood="binary", hessian_structure="full", prior_precision=0.1)
la = la.fit((x_train, y_train))
print(f"squared distance to the mode: {la.mode_decrement():.2g}")
krylov = bnnlaplace.Laplace(network, likelihood="binary", prior_precision=0.1)
krylov = krylov.fit((x_train, y_train), key=jax.random.key(0))
exact, estimate = la.log_marginal_likelihood(), krylov.log_marginal_likelihood()
print(f"log evidence: full {exact.mean:.2f}, lanczos {estimate.mean:.2f} +- {estimate.sem:.2f} nats")

# %% Doubt where there were no data
# On a ring around the training points the point estimate extrapolates with confidence. Under the posterior the
# probabilities move towards one half, so confidence tells the two sets of points apart.

la = la.optimize_prior_precision()
angle = jnp.linspace(0, 2 * jnp.pi, 100, endpoint=False)
x_far = jnp.stack([0.5 + 4 * jnp.cos(angle), 0.25 + 4 * jnp.sin(angle)], axis=1)


def confidence(probability):
    return jnp.maximum(probability, 1 - probability)[:, 0]


point_estimate = [confidence(jax.nn.sigmoid(model(inputs))) for inputs in (x_test, x_far)]
posterior = [confidence(la.predictive(inputs)) for inputs in (x_test, x_far)]
for name, (near, far) in (("MAP", point_estimate), ("Laplace", posterior)):
    print(
        f"{name:8s} mean confidence near the data {near.mean():.2f}, far away {far.mean():.2f}, "
        f"AUROC {detection.auroc(near, far):.2f}"
    )
accuracy = float(jnp.mean((la.predictive(x_test) > 0.5) == (y_test > 0.5)))
print(f"accuracy {accuracy:.2f}")

axis = jnp.linspace(-4, 5, 91)
grid = jnp.stack(jnp.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
figure = Figure(figsize=(8, 3.6), layout="constrained")
for panel, (name, probability) in zip(
    figure.subplots(1, 2), {"MAP": jax.nn.sigmoid(model(grid)), "Laplace": la.predictive(grid)}.items(), strict=True
):
    colours = panel.contourf(axis, axis, probability.reshape(91, 91), levels=11, vmin=0, vmax=1, cmap="RdBu")
    panel.scatter(*x_train.T, c=y_train[:, 0], cmap="RdBu", edgecolors="black", linewidths=0.4, s=12)
    panel.set_title(f"{name}: probability of class 1")
figure.colorbar(colours)

# %% Samples go back into the model
# `sample` returns weights in the form in which NNX holds them, with a leading axis of samples.

weights = la.sample(jax.random.key(1), num_samples=4)
nnx.update(model, jax.tree.map(lambda leaf: leaf[0], weights))
print(f"outputs of one posterior sample: {model(x_test[:3])[:, 0]}")

assert "dropout" in refusal
assert abs(estimate.mean - exact.mean) < 4 * estimate.sem + 0.05
assert posterior[1].mean() < point_estimate[1].mean() - 0.05
assert accuracy > 0.9
