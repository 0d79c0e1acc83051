"""A Linen classifier with batch normalisation.

This page trains a small network on handwritten digits and brings it to a mode of its log joint. Two posteriors are put
on it, the evidence chooses their prior precision, and the predictions are compared.
"""

import tempfile
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from sklearn.datasets import load_digits

import bnnlaplace
from bnnlaplace import calibration, plots

# %% Data and model
# There are 400 images of 8 x 8 pixels to train on; the other 1,397 are for the test. A hidden layer of eight units
# keeps this page fast: the network has 626 weights. `train` says whether batch normalisation takes its statistics from
# the batch.

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
x_train, y_train, x_test, y_test = x[:400], y[:400], x[400:], y[400:]


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        return nn.Dense(10)(nn.tanh(x))


model = Classifier()
variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), x_train[:1])

# %% Training, in two phases
# A Laplace approximation expands the log joint at a mode. The loss is therefore the negative log joint
#
# $$ -\log p(D, \theta) = -\sum_n \log p(y_n \mid f(x_n; \theta)) + \tfrac{\delta}{2} \|\theta\|^2 + \text{const}. $$
#
# The log likelihood is summed over the data, not averaged, and $\delta$ is the prior precision. Weight decay that is
# decoupled from the loss, as in AdamW, leads to another point.
#
# With live batch statistics the output for one example depends on the other examples of the batch, so the network has
# no posterior in this sense. The first phase trains with live statistics. The second phase freezes them and descends to
# the mode of the network that is left.

PRIOR_PRECISION = 1.0


def negative_log_joint(params, logits):
    fit = optax.softmax_cross_entropy_with_integer_labels(logits, y_train).sum()
    return fit + 0.5 * PRIOR_PRECISION * optax.tree.norm(params, squared=True)


def live(params, batch_stats):
    state = {"params": params, "batch_stats": batch_stats}
    logits, updated = model.apply(state, x_train, train=True, mutable=["batch_stats"])
    return negative_log_joint(params, logits), updated["batch_stats"]


def frozen(params, batch_stats):
    logits = model.apply({"params": params, "batch_stats": batch_stats}, x_train, train=False)
    return negative_log_joint(params, logits), batch_stats


def train(loss, params, batch_stats, optimizer, steps):
    def step(carry, _):
        params, batch_stats, state = carry
        gradient, batch_stats = jax.grad(loss, has_aux=True)(params, batch_stats)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), batch_stats, state), None

    carry = (params, batch_stats, optimizer.init(params))
    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])(carry)[:2]


params, batch_stats = variables["params"], variables["batch_stats"]
params, batch_stats = train(live, params, batch_stats, optax.adam(1e-2), 300)
params, batch_stats = train(frozen, params, batch_stats, optax.adam(optax.cosine_decay_schedule(1e-2, 3000)), 3000)

# %% Two posteriors
# `Network.from_linen` takes the module, its variables and the arguments of every call. All collections except "params"
# are frozen. `hessian_structure="lanczos"` stands for the whole GGN, which is known by its products; "diag" stands for
# its exact diagonal.
#
# `mode_decrement` is the squared distance to the mode in posterior standard deviations. Compare it with the number of
# directions that the data determine: the weights are near a mode if it is much smaller.

network = bnnlaplace.Network.from_linen(model, {"params": params, "batch_stats": batch_stats}, train=False)
lanczos = bnnlaplace.Laplace(network, hessian_structure="lanczos").fit((x_train, y_train), key=jax.random.key(1))
diagonal = bnnlaplace.Laplace(network, hessian_structure="diag").fit((x_train, y_train))

effective = lanczos.krylov_error().effective_parameters
print(f"distance to the mode, squared: {lanczos.mode_decrement():.2g}; directions the data determine: {effective:.0f}")

# %% The evidence chooses the prior precision
# One decomposition gives the evidence at every prior precision, so no curvature is computed again. The diagonal
# overstates the log-determinant (Hadamard's inequality), so its evidence is lower.

lanczos, diagonal = lanczos.optimize_prior_precision(), diagonal.optimize_prior_precision()
for name, la in (("lanczos", lanczos), ("diag", diagonal)):
    evidence, best = la.log_marginal_likelihood(), la.evidence_optimum()
    print(
        f"{name:8s} prior precision {best.prior_precision:.3g} [{best.low:.3g}, {best.high:.3g}], "
        f"log evidence {evidence.mean:.1f} +- {evidence.sem:.1f} nats"
    )

# %% Predictions and their calibration
# `evaluate` returns every metric with a 95 % bootstrap interval. With one seed, all methods are evaluated on the same
# resamples.
#
# Look at the numbers before you use them. With normalisation layers the evidence prefers wide priors: here both
# posteriors are underconfident, at the accuracy of MAP. [Choose the prior precision on validation
# data](../how_to/gridsearch.md) if you need calibrated probabilities.

predictions = {
    "MAP": jax.nn.softmax(network(network.params, x_test)),
    "lanczos, probit": lanczos.predictive(x_test),
    "lanczos, samples": lanczos.predictive(x_test, link_approx="mc", key=jax.random.key(2)),
    "diag, probit": diagonal.predictive(x_test),
}
metrics = {name: calibration.evaluate(probs, y_test, seed=0) for name, probs in predictions.items()}
for name, metric in metrics.items():
    print(f"{name:17s}" + "  ".join(f"{key} {metric[key].value:.3f}" for key in ("accuracy", "nll", "ece", "brier")))
nll = metrics["lanczos, probit"]["nll"]
print(f"NLL of lanczos with the probit link: {nll.value:.3f}, 95 % interval [{nll.low:.3f}, {nll.high:.3f}]")
figure = plots.reliability_diagram(
    {name: calibration.reliability_bins(predictions[name], y_test) for name in ("MAP", "lanczos, probit")}
)

# %% On disk and back
# `save` writes everything except the module, with a SHA-256 of every file. `load` takes a network of the same structure
# and replaces its weights.

with tempfile.TemporaryDirectory() as directory:
    lanczos.save(Path(directory) / "posterior")
    untrained = bnnlaplace.Network.from_linen(model, variables, train=False)
    loaded = bnnlaplace.Laplace.load(Path(directory) / "posterior", untrained)
difference = float(jnp.abs(loaded.predictive(x_test) - predictions["lanczos, probit"]).max())
print(f"largest difference between predictions before and after: {difference}")

assert lanczos.mode_decrement(PRIOR_PRECISION) < 0.1 * effective
assert lanczos.log_marginal_likelihood().mean > diagonal.log_marginal_likelihood().mean
assert metrics["lanczos, probit"]["accuracy"].value > 0.85
assert difference == 0
