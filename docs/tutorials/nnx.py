"""An NNX model with dropout.

A binary classifier on two interleaved half circles. Dropout has to be off wherever a posterior is concerned; what the
posterior adds is doubt far away from the data.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from sklearn.datasets import make_moons

import bnnlaplace
from bnnlaplace.calibration import detection

# %% Data and model
# Targets of a binary likelihood are shaped like the outputs, here (B, 1).

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
# The loss is the negative log joint with a prior precision of 0.1. In the second phase dropout is off: its mode is
# that of the network which is going to be expanded.


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
# Its outputs would be those of one random mask, and so would the curvature. `fit` runs the network twice and
# compares.

model.train()
noisy = bnnlaplace.Laplace(bnnlaplace.Network.from_nnx(model), likelihood="binary", hessian_structure="full")
try:
    noisy.fit((x_train, y_train))
except ValueError as error:
    refusal = str(error)
    print(f"refused: {refusal}")

# %% The posterior
# `Network.from_nnx` copies the model: its parameters are the weights, all other state is frozen. 65 weights are few
# enough for the dense matrix, `hessian_structure="full"`, which is exact; "lanczos" agrees with it here.

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
# On a ring around the training points a point estimate extrapolates with confidence. The linearised network knows
# that it could be otherwise: probabilities move towards one half, and confidence tells the two sets apart.

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

# %% Samples go back into the model
# `sample` returns weights as NNX holds them, with a leading axis of samples.

weights = la.sample(jax.random.key(1), num_samples=4)
nnx.update(model, jax.tree.map(lambda leaf: leaf[0], weights))
print(f"outputs of one posterior sample: {model(x_test[:3])[:, 0]}")

assert "dropout" in refusal
assert abs(estimate.mean - exact.mean) < 4 * estimate.sem + 0.05
assert posterior[1].mean() < point_estimate[1].mean() - 0.05
assert accuracy > 0.9
