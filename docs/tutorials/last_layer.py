"""Some of the weights: the last layer, no biases, LoRA.

A posterior over a part of a larger network costs only as much as that part: everything before it is computed once.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import bnnlaplace
from bnnlaplace import calibration
from bnnlaplace.core import leaf_names

# %% A network of 9,000 weights
# The network has two hidden layers of 64 units. It is trained on 400 digits for the log joint with a prior precision
# of 1.

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
x_train, y_train, x_test, y_test = x[:400], y[:400], x[400:900], y[400:900]


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        for width in (64, 64):
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(10, name="head")(x)


def fit(loss, params, steps, rate=3e-3):
    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    return jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0])(params)


def negative_log_joint(params, logits):
    misfit = optax.softmax_cross_entropy_with_integer_labels(logits, y_train).sum()
    return misfit + 0.5 * optax.tree.norm(params, squared=True)


model = Classifier()
params = jax.jit(model.init)(jax.random.key(0), x_train[:1])["params"]
params = fit(lambda params: negative_log_joint(params, model.apply({"params": params}, x_train)), params, 400)
network = bnnlaplace.Network.from_linen(model, {"params": params})


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


# %% The last layer
# The last layer is found in what the network computes, not by its name. Its 650 weights are few enough for the dense
# matrix, and the features that enter it are computed once. The other weights are frozen and have no prior, so this
# evidence cannot be compared with the evidence of all weights: it is that of another model.

last = bnnlaplace.Laplace(network, subset_of_weights="last_layer", hessian_structure="full").fit((x_train, y_train))
last = last.optimize_prior_precision()
print(f"{count(last.network.params):,} of {count(params):,} weights: {leaf_names(last.network.params)}")
print(f"prior precision {last.prior_precision:.3g}, log evidence {last.log_marginal_likelihood().mean:.1f} nats")
for name, probs in (
    ("MAP", jax.nn.softmax(network(network.params, x_test))),
    ("probit", last.predictive(x_test)),
    ("samples", last.predictive(x_test, link_approx="mc", key=jax.random.key(1))),
):
    metrics = calibration.evaluate(probs, y_test, seed=0)
    print(f"{name:9s}" + "  ".join(f"{key} {metrics[key].value:.3f}" for key in ("accuracy", "nll", "ece")))

# %% Samples among the frozen weights
# A sample has None in the places of the frozen weights. `full_params` fills them in, so that the model can take it.

sample = jax.tree.map(lambda leaf: leaf[0], last.sample(jax.random.key(1), num_samples=1))
filled = last.network.full_params(sample)
sample_accuracy = float(jnp.mean(model.apply({"params": filled}, x_test).argmax(-1) == y_test))
print(f"accuracy of one sample of the last layer: {sample_accuracy:.3f}")

# %% Any weights: a predicate on paths
# A path looks like "Dense_0/kernel". Here all weights except the biases have a posterior, by the diagonal.

no_biases = bnnlaplace.Laplace(network, subset_of_weights=lambda path: "bias" not in path, hessian_structure="diag")
no_biases = no_biases.fit((x_train, y_train))
print(f"no biases: {count(no_biases.network.params):,} weights")

# %% LoRA
# Two narrow matrices correct one kernel, which itself stays as it was. They alone are trained, for images that are
# shifted by a pixel, and they alone get a posterior. For these 256 weights Lanczos sees the whole GGN. A decomposition
# grows until it has converged at the best prior precision; `target_precision` asks for that of training instead.

shifted = jnp.roll(x_train.reshape(-1, 8, 8), 1, axis=2).reshape(x_train.shape)
key_a, key_b = jax.random.split(jax.random.key(2))
lora = {
    "lora_a": 0.1 * jax.random.normal(key_a, (64, 2)),
    "lora_b": 0.01 * jax.random.normal(key_b, (2, 64)),
}


def adapted(weights, x):
    kernel = weights["base"]["Dense_0"]["kernel"] + weights["lora_a"] @ weights["lora_b"]
    first = {**weights["base"]["Dense_0"], "kernel": kernel}
    return model.apply({"params": {**weights["base"], "Dense_0": first}}, x)


def with_base(lora):
    return {"base": params, **lora}


before = float(jnp.mean(adapted(with_base(lora), shifted).argmax(-1) == y_train))
lora = fit(lambda lora: negative_log_joint(lora, adapted(with_base(lora), shifted)), lora, 1500, 1e-2)
after = float(jnp.mean(adapted(with_base(lora), shifted).argmax(-1) == y_train))
adapter = bnnlaplace.Laplace(
    bnnlaplace.Network.from_function(adapted, with_base(lora)), subset_of_weights=lambda path: "lora" in path
).fit((shifted, y_train), key=jax.random.key(3), target_precision=1.0)
evidence = adapter.log_marginal_likelihood()
print(f"accuracy on shifted images: {before:.2f} before, {after:.2f} after")
print(f"{count(adapter.network.params)} weights, log evidence {evidence.mean:.1f} +- {evidence.sem:.1f} nats")

assert count(last.network.params) == 64 * 10 + 10
assert (filled["Dense_0"]["kernel"] == params["Dense_0"]["kernel"]).all()
assert (filled["head"]["kernel"] != params["head"]["kernel"]).any()
assert count(adapter.network.params) == 2 * (64 + 64)
assert after > before
