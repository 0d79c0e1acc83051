"""Choose the prior precision on validation data, or on folds of the training data.

The evidence needs no validation data, but its optimum can leave predictions underconfident, above all for networks with
normalisation layers. `optimize_prior_precision("gridsearch", ...)` takes the prior precision with the lowest negative
log likelihood (NLL) on validation data instead. Without validation data, networks that were trained without a part of
the training data choose it on that part.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure
from sklearn.datasets import load_digits

import bnnlaplace
from bnnlaplace import calibration

# %% Three sets of data
# There are 200 digits to train on, 400 for the choice and the rest for the test. The network has one hidden layer and
# is at the mode for a prior precision of 0.01.

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
train, validation, test = ((x[part], y[part]) for part in (slice(200), slice(200, 600), slice(600, None)))
PRIOR_PRECISION = 0.01


def logits(weights, x):
    return jnp.tanh(x @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]


def negative_log_joint(weights, x, y):
    misfit = optax.softmax_cross_entropy_with_integer_labels(logits(weights, x), y).sum()
    return misfit + 0.5 * PRIOR_PRECISION * optax.tree.norm(weights, squared=True)


optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 3000))
rng = np.random.default_rng(0)
shapes = {"w1": (64, 16), "b1": (16,), "w2": (16, 10), "b2": (10,)}
start = {name: jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


@jax.jit
def trained(x, y):
    def step(carry, _):
        weights, state = carry
        updates, state = optimizer.update(jax.grad(negative_log_joint)(weights, x, y), state)
        return (optax.apply_updates(weights, updates), state), None

    (weights, _), _ = jax.lax.scan(step, (start, optimizer.init(start)), length=3000)
    return weights


def posterior(x, y):
    network = bnnlaplace.Network.from_function(logits, trained(x, y))
    return bnnlaplace.Laplace(network, hessian_structure="kron", prior_precision=PRIOR_PRECISION).fit((x, y))


la = posterior(*train)
network = la.network

# %% The choice
# The curvature is not computed again. One pass over the validation data serves all prior precisions of the grid, by
# default 25 values from 0.01 to 10,000. Probabilities are those of the probit link, the default of `predictive`. With
# `link_approx="mc"` they are averages over samples of the outputs, which need a key and serve every prior precision.
#
# The evidence says itself that its posterior does not fit the training data. [Act on the evidence
# alone](variational.md) has the reason, and a remedy without validation data.

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    by_evidence = la.optimize_prior_precision()
print(f"{caught[0].category.__name__}: {caught[0].message}")
by_validation = la.optimize_prior_precision("gridsearch", validation=validation)
print(f"prior precision by the evidence {by_evidence.prior_precision:.3g}")
print(f"prior precision by the validation NLL {by_validation.prior_precision:.3g}")

# %% The whole curve
# `validation_curve` returns NLL and calibration error at every prior precision. If the best value lies at an end of the
# grid, `optimize_prior_precision` warns: pass `precisions` with a wider one. With "lanczos", `converged` says where the
# samples can be trusted; `optimize_prior_precision` chooses among those.

precisions = np.geomspace(0.01, 10_000, 25)
curve = la.validation_curve(*validation, precisions)
figure = Figure(figsize=(6, 2.8), layout="constrained")
panel = figure.subplots()
panel.semilogx(precisions, curve.negative_log_likelihood, label="validation NLL")
panel.semilogx(precisions, curve.expected_calibration_error, "--", label="validation ECE")
panel.axvline(by_evidence.prior_precision, color="black", lw=1, ls=":", label="best evidence")
panel.axvline(by_validation.prior_precision, color="tab:blue", lw=1, ls=":", label="best validation NLL")
panel.set(xlabel="prior precision", ylim=(0, 1))
panel.legend(frameon=False)

# %% Without validation data
# Five networks are trained, each without another fifth of the training data. Their posteriors predict those fifths, and
# the precision with the lowest NLL of all of them is that of the posterior of all training data. It costs five more
# trainings. In return, no data are set aside.

folds = np.arange(len(train[1])) % 5
nll_of_folds = np.zeros(len(precisions))
for fold in range(5):
    inside, outside = (tuple(each[part] for each in train) for part in (folds != fold, folds == fold))
    held_out_curve = posterior(*inside).validation_curve(*outside, precisions)
    nll_of_folds += len(outside[1]) * held_out_curve.negative_log_likelihood
by_folds = la.with_prior_precision(precisions[nll_of_folds.argmin()])
print(f"prior precision by folds {by_folds.prior_precision:.3g}")

# %% On the test data
# The test data had no part in the choice. Here the precisions chosen on validation data and on folds give a lower NLL
# than the point estimate, and a much lower one than the evidence.

predictions = {"MAP": jax.nn.softmax(network(network.params, test[0]))}
predictions |= {
    name: chosen.predictive(test[0])
    for name, chosen in (("evidence", by_evidence), ("validation NLL", by_validation), ("folds", by_folds))
}
nll = {}
for name, probs in predictions.items():
    metrics = calibration.evaluate(probs, test[1], seed=0)
    nll[name] = metrics["nll"].value
    print(f"{name:15s}" + "  ".join(f"{key} {metrics[key].value:.3f}" for key in ("accuracy", "nll", "ece")))

assert isinstance(caught[0].message, bnnlaplace.SaturatedPosteriorWarning)
assert abs(curve.best_precision / by_validation.prior_precision - 1) < 1e-3
assert max(nll["validation NLL"], nll["folds"]) < min(nll["MAP"], nll["evidence"])
