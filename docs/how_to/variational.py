"""Act on the evidence alone.

The evidence of a Laplace approximation can choose a prior whose posterior predicts badly. This page shows how to notice
that, why it happens, and how `fit(approximation="variational")` finds a posterior whose evidence can be acted on.
Validation data are not needed.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import bnnlaplace
from bnnlaplace import calibration

# %% A network that has learned its labels by heart
# There are 200 digits to train on, and the rest for the test. The network has one hidden layer and is at the mode for a
# prior precision of 0.1.

images, labels = load_digits(return_X_y=True)
x, y = jnp.asarray(images / 16, jnp.float32), jnp.asarray(labels)
train, test = (x[:200], y[:200]), (x[600:], y[600:])
PRIOR_PRECISION = 0.1


def logits(weights, x):
    return jnp.tanh(x @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]


def negative_log_joint(weights):
    misfit = optax.softmax_cross_entropy_with_integer_labels(logits(weights, train[0]), train[1]).sum()
    return misfit + 0.5 * PRIOR_PRECISION * optax.tree.norm(weights, squared=True)


optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 3000))


def step(carry, _):
    weights, state = carry
    updates, state = optimizer.update(jax.grad(negative_log_joint)(weights), state)
    return (optax.apply_updates(weights, updates), state), None


rng = np.random.default_rng(0)
shapes = {"w1": (64, 16), "b1": (16,), "w2": (16, 10), "b2": (10,)}
weights = {name: jnp.asarray(0.2 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
(weights, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3000))((weights, optimizer.init(weights)))
network = bnnlaplace.Network.from_function(logits, weights)
la = bnnlaplace.Laplace(network, hessian_structure="kron", prior_precision=PRIOR_PRECISION)

# %% The warning
# `optimize_prior_precision` compares the posterior that it has chosen with up to 64 training examples. Knowing all
# examples cannot make them less probable, on average, than predicting each one from those before it. So the negative
# log likelihood (NLL) of training data under the posterior must not exceed $-\log p(D) / N$. If it does,
# `SaturatedPosteriorWarning` says so, with both numbers.
#
# It is not the prior that is wrong but the Gaussian. Where training has made the labels certain, the curvature of the
# likelihood at the mode is almost zero. The Gaussian is then so wide that it reaches where the training labels are
# wrong.

laplace = la.fit(train)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    laplace = laplace.optimize_prior_precision()
print(f"{caught[0].category.__name__}: {caught[0].message}")

# %% The variational posterior
# The variational posterior is the Gaussian with the largest evidence lower bound (ELBO) for the linearised network. Its
# curvature and its mean are averaged under its own predictions, so that it knows where the likelihood falls. It needs a
# key for samples of the outputs, and data that can be read several times. Every structure and every likelihood can be
# used. For a regression the result is that of Laplace, and options of samples and iterations have no effect. A
# likelihood whose curvature is its Fisher information, such as "heteroscedastic", gets the average of that. Then the
# bound is valid for the Gaussian that is found, but some other Gaussian may have a larger one. `on_iteration=print`
# would show each iteration, with a bound that is averaged over the samples that the fit was chosen by. The bound of the
# result is averaged over fresh ones, and is a little lower.
#
# With `prior_structure="scalar"` the fit also chooses the prior precision by the bound, a step whenever the rest has
# settled. "layerwise" and "diag" choose one for each layer and for each weight. Without it the prior stays as it is.

options = bnnlaplace.Variational(prior_structure="scalar")
variational = la.fit(train, key=jax.random.key(0), approximation=options)
bound = variational.log_marginal_likelihood()
print(f"prior precision {variational.prior_precision:.2g} after {variational.fitted.bound.iterations} iterations")
print(f"{type(bound).__name__}: log evidence of at least {bound.mean:.0f} nats, standard error {bound.sem:.1f}")

# %% What it predicts
# The result is used as any other `Laplace`: it predicts, samples, and is saved and loaded. `log_marginal_likelihood` is
# a `LowerBound`, an `Estimate` of the ELBO. Here it is below the evidence of the Laplace approximation, which is not a
# bound of anything, and too good to be true.

predictions = {"MAP": jax.nn.softmax(network(network.params, test[0]))}
predictions |= {
    name: chosen.predictive(test[0]) for name, chosen in (("Laplace", laplace), ("variational", variational))
}
nll = {}
for name, probs in predictions.items():
    metrics = calibration.evaluate(probs, test[1], seed=0)
    nll[name] = metrics["nll"].value
    print(f"{name:12s}" + "  ".join(f"{key} {metrics[key].value:.3f}" for key in ("accuracy", "nll", "ece")))

# %% What it costs
# An iteration costs a Laplace fit of the structure, samples of the outputs at all training inputs, and Newton steps of
# the mean. Memory grows with the samples: by default up to 512 numbers for each output of each training example, and up
# to 4,096 if examples are few. The Jacobian of a convolutional network is formed once for all iterations, if it takes
# at most a quarter of the free memory. The iteration begins where the last fit ended. So fitting the result again, or
# at another prior precision near by, takes few iterations.

again = variational.fit(train, key=jax.random.key(0), approximation="variational")
print(f"fitted again: {again.fitted.bound.iterations} iterations")

# %% A mean that stays at the weights
# The mean of the linearised network can be far from the weights, where it may predict worse than they do. With
# `fixed_mean=True` it stays at the weights, and the fit finds the covariance alone. The bound then does not tell which
# prior precision predicts best, because it counts the distance of the weights to the prior mean in full. So this
# posterior needs data that training has not seen, as a temperature does. Here 200 images choose the precision. The fit
# is repeated at each one, because the averages belong to their precision.

held_out, fixed = (x[200:400], y[200:400]), bnnlaplace.Variational(fixed_mean=True)


def nll_of(posterior, data):
    return calibration.evaluate(posterior.predictive(data[0]), data[1], seed=0)["nll"].value


candidates = [
    la.with_prior_precision(precision).fit(train, key=jax.random.key(0), approximation=fixed)
    for precision in (1.0, 10.0, 100.0, 1000.0)
]
best = min(candidates, key=lambda posterior: nll_of(posterior, held_out))
nll["fixed mean"] = nll_of(best, test)
print(f"prior precision {best.prior_precision:.0f}, test NLL {nll['fixed mean']:.3f}")

# %% Another choice of the prior
# `optimize_prior_precision` of a variational posterior maximises the bound with the averaged curvature as it is. The
# curvature belongs to the former prior precision, so pass a function that fits it again:
#
#     la.optimize_prior_precision(refit=lambda la: la.fit(data, key=key, approximation="variational"))

assert isinstance(caught[0].message, bnnlaplace.SaturatedPosteriorWarning)
assert isinstance(bound, bnnlaplace.LowerBound) and bound.mean < laplace.log_marginal_likelihood().mean
assert nll["variational"] < 0.6 * nll["Laplace"] and nll["variational"] < 1.1 * nll["MAP"]
assert again.fitted.bound.iterations <= 3
assert nll["fixed mean"] < 1.1 * nll["MAP"]
