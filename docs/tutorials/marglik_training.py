"""Train a network by the evidence.

`bnnlaplace.marglik_training` trains a Flax model with an optax optimiser, and chooses the prior precision of each layer
on the way, from the training data alone. This page trains a small classifier on few examples, some with wrong labels.
"""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

import bnnlaplace

# %% Data and model
# Two interleaved half circles. A fifth of the labels is wrong.

rng = np.random.default_rng(0)


def half_circles(count, wrong):
    labels = rng.integers(0, 2, count)
    angles = rng.uniform(0, np.pi, count)
    circles = np.stack([np.cos(angles), np.sin(angles)], 1)
    x = np.where(labels[:, None], [1.0, 0.4] - circles, circles) + 0.1 * rng.normal(size=(count, 2))
    return x.astype(np.float32), np.where(rng.random(count) < wrong, 1 - labels, labels)


x, y = half_circles(120, wrong=0.2)
x_test, y_test = half_circles(1000, wrong=0.2)


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(20, name="first")(x))
        return nn.Dense(2, name="last")(nn.tanh(nn.Dense(20, name="second")(x)))


module = Classifier()
network = bnnlaplace.Network.from_linen(module, module.init(jax.random.key(0), x[:1]))

# %% Three ways to train
# The first keeps the small prior precision it starts from until the last epoch. "online" takes steps of the weights on
# the log joint, and every few epochs sets the precision of each layer to where the evidence prefers it. "joint" follows
# the gradient of the evidence in weights and precisions at once, that of its log-determinant included. That takes
# `num_matvecs` products with the curvature for each of `num_probes` probes, as many again for the gradient, and some
# derivatives of products. So its gradient is held for `evidence_every` steps.

EPOCHS = 150
options = {"num_epochs": EPOCHS, "batch_size": 60, "curvature_batch_size": 120}


def optimizer():
    return optax.adam(optax.cosine_decay_schedule(2e-2, 2 * EPOCHS))


key = jax.random.key(1)
results = {
    "fixed": bnnlaplace.marglik_training(
        key, network, (x, y), optimizer(), **options, prior_precision=1e-3, burn_in_epochs=EPOCHS - 1, method="online"
    ),
    "online": bnnlaplace.marglik_training(
        key, network, (x, y), optimizer(), **options, method="online", evidence_every=5
    ),
    "joint": bnnlaplace.marglik_training(
        key, network, (x, y), optimizer(), **options, method="joint", evidence_every=4, num_matvecs=15
    ),
}

# %% What they found
# The exact evidence, by a dense structure, at the weights and precisions of each. Weights that maximise the evidence
# with its determinant lie beside the mode of the log joint; `fit` warns of that. With `settle_epochs` the last epochs
# would go to the mode.


def test_nll(network):
    log_probs = jax.nn.log_softmax(network(network.params, x_test))
    return -float(log_probs[jnp.arange(len(y_test)), y_test].mean())


evidence, nll = {}, {}
for name, result in results.items():
    prior_precision = result.prior_precision if name != "fixed" else 1e-3
    la = bnnlaplace.Laplace(result.network, hessian_structure="full", prior_precision=prior_precision)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", bnnlaplace.NotAModeWarning)
        la = la.fit((x, y))
    evidence[name], nll[name] = la.log_marginal_likelihood().mean, test_nll(result.network)
    print(f"{name:7s} log evidence {evidence[name]:7.1f} nats, test NLL {nll[name]:.3f} nats an example")
print({name: round(value, 2) for name, value in results["joint"].prior_precision.items()})

# %% The history
# One record for each epoch: loss, evidence with its standard error, prior precisions, gradient norms, seconds a step.

figure = Figure(figsize=(6, 2.6), layout="constrained")
panel = figure.subplots()
for name in ("online", "joint"):
    records = [record for record in results[name].history if record["log_evidence"] is not None]
    epochs = [record["epoch"] for record in records]
    panel.plot(epochs, [-record["log_evidence"] for record in records], lw=0.8, label=name)
panel.set(xlabel="epoch", ylabel="negative log evidence,\nestimated", yscale="log")
panel.legend(frameon=False)
print({name: results["joint"].history[-1][name] for name in ("phase", "loss", "gradient_norm")})

# %% Stop and continue
# `on_epoch` gets the result so far. Its state is a pytree and its history is JSON, so both can be saved. `start`
# continues from them, to the same numbers.

kept = []
short = {**options, "num_epochs": 4, "evidence_every": 2}
whole = bnnlaplace.marglik_training(key, network, (x, y), optax.sgd(1e-2), **short, on_epoch=kept.append)
continued = bnnlaplace.marglik_training(key, network, (x, y), optax.sgd(1e-2), **short, start=kept[1])
same = jax.tree.map(np.array_equal, whole.network.params, continued.network.params)
print(f"continued after epoch {len(kept[1].history)}: the same weights: {all(jax.tree.leaves(same))}")

assert evidence["fixed"] < min(evidence["online"], evidence["joint"])
assert all(jax.tree.leaves(same))
