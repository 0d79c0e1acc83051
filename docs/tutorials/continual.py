"""Continual learning: one task after another.

A network that is trained on a second task forgets the first. The posterior of the first task says which weights it
needs, and how exactly. As the prior of the second task it keeps them there.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import bnnlaplace

# %% Three tasks
# The tasks are to tell digits whose pixels have been permuted, in another way for each task. So all tasks share their
# ten classes and all weights, but their inputs have nothing in common. 800 images are for training, the others for
# tests.

TASKS = 3
rng = np.random.default_rng(0)
images, labels = load_digits(return_X_y=True)
shuffled = rng.permutation(len(images))
x, y = (images[shuffled] / 16).astype(np.float32), labels[shuffled]
train, test = [], []
for _ in range(TASKS):
    order = rng.permutation(64)
    train.append((x[:800, order], y[:800]))
    test.append((x[800:, order], y[800:]))


def outputs(weights, x):
    return jnp.tanh(x @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]


shapes = {"w1": (64, 50), "b1": (50,), "w2": (50, 10), "b2": (10,)}
first = {name: jnp.asarray(0.1 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def trained(penalty, weights, data, steps=1000):
    """Minimise the negative log joint: the loss of all examples and what the prior adds."""
    x, y = data

    def negative_log_joint(weights):
        return optax.softmax_cross_entropy_with_integer_labels(outputs(weights, x), y).sum() + penalty(weights)

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, _):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(negative_log_joint)(weights), state)
        return (optax.apply_updates(weights, updates), state), None

    run = jax.jit(lambda weights: jax.lax.scan(step, (weights, optimizer.init(weights)), length=steps)[0][0])
    return run(weights)


def accuracies(weights):
    return [float(jnp.mean(outputs(weights, x).argmax(axis=1) == y)) for x, y in test]


def tell(what, numbers):
    print(f"{what:34s}" + "  ".join(f"{number:.2f}" for number in numbers))


# %% Fine-tuning forgets
# Every task starts at the weights of the one before it, with the same prior N(0, 1). What that has learned is lost.


def around_zero(weights):
    return 0.5 * optax.tree.norm(weights, squared=True)


weights, fine_tuned = first, []
for task in range(TASKS):
    weights = trained(around_zero, weights, train[task])
    fine_tuned.append(accuracies(weights))
    tell(f"fine-tuned on task {task + 1}, accuracies", fine_tuned[-1])

# %% The posterior as the prior
# `la.log_density` is the log density of the posterior at any weights. Its negative is the penalty of the next task, and
# `fit(data, prior=la)` makes this posterior the prior of the next one: the curvatures of all tasks add up. Data of
# earlier tasks are not needed again. The prior precision is chosen in the first task, and is no argument of later ones.


def one_after_another(structure):
    """Return the accuracies after each task, and the posteriors."""
    weights, found, posteriors = first, [], []
    penalty, options = around_zero, {}
    for data in train:
        weights = trained(penalty, weights, data)
        network = bnnlaplace.Network.from_function(outputs, weights)
        la = bnnlaplace.Laplace(network, hessian_structure=structure).fit(data, **options)
        posteriors.append(la)
        found.append(accuracies(weights))
        penalty, options = lambda weights, la=la: -la.log_density(weights), {"prior": la}
    return found, posteriors


kron, posteriors = one_after_another("kron")
for task, numbers in enumerate(kron):
    tell(f"kron, after task {task + 1}, accuracies", numbers)

# %% How much of the curvature is needed
# What is still forgotten is lost to the Gaussian: far from the old weights the old loss is not quadratic, and its
# curvature is known in blocks alone. "diag" costs least. It takes the weights as independent, and remembers less.
# "full" would need the matrix of all 3,760 weights in every step of the training.

diag, _ = one_after_another("diag")
means = {name: np.mean(found[-1]) for name, found in (("fine-tuned", fine_tuned), ("diag", diag), ("kron", kron))}
print("mean accuracy after the last task: " + ", ".join(f"{name} {mean:.2f}" for name, mean in means.items()))

figure = Figure(figsize=(6, 2.6), layout="constrained")
panel = figure.subplots()
for name, found in (("fine-tuned", fine_tuned), ("diag", diag), ("kron", kron)):
    panel.plot(range(1, TASKS + 1), [numbers[0] for numbers in found], "o-", label=name)
panel.set(xlabel="trained up to task", ylabel="accuracy on task 1", ylim=(0, 1), xticks=range(1, TASKS + 1))
panel.legend(frameon=False)

# %% The evidence of a task given those before
# The evidence of a later task is that of its data given the earlier ones, log p(D2 | D1). So they add up to the
# evidence of all data, as far as the Gaussian is right, and can compare networks.

evidences = [la.log_marginal_likelihood().mean for la in posteriors]
tell("log evidences, in nats", evidences)
print(f"of all tasks: {sum(evidences):.0f} nats")

# %% Predictions
# The last posterior answers for all tasks, like any other.

predictive = [posteriors[-1].predictive(x) for x, _ in test]
tell("probit, accuracies", [float(jnp.mean(p.argmax(axis=1) == y)) for p, (_, y) in zip(predictive, test, strict=True)])

assert fine_tuned[-1][0] < 0.3
assert kron[-1][0] > fine_tuned[-1][0] + 0.3
assert means["kron"] > means["diag"] + 0.05 > means["fine-tuned"] + 0.2
assert min(numbers[task] for task, numbers in enumerate(kron)) > 0.9
