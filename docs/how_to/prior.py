"""Choose a prior.

One precision for all weights or one for each layer, a mean other than zero, the noise of a regression, and what to do
with weights that are no mode.
"""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnnlaplace
from bnnlaplace import prior

# %% A network to look at
# A curve in one variable, with noise of standard deviation 0.2, and five other variables that have nothing to do with
# it. The two kinds of input enter by layers of their own. The weights are trained for the log joint with this noise and
# a given prior, at first of precision 1.

NOISE = 0.2
rng = np.random.default_rng(0)
x = rng.uniform(-2, 2, (300, 6)).astype(np.float32)
y = jnp.asarray(np.sin(2 * x[:, :1]) + NOISE * rng.normal(size=(300, 1)), jnp.float32)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        first = nn.Dense(10, name="time")(x[:, :1]) + nn.Dense(10, use_bias=False, name="others")(x[:, 1:])
        return nn.Dense(1, name="out")(nn.tanh(first))


def train(params, x, y, precision=1.0, mean=0.0, steps=4000):
    """The weights at the mode; `precision` and `mean` as `Laplace` takes them."""
    beliefs = prior.resolve(precision, mean, params)
    tau = beliefs.precision * (1.0 if beliefs.relative is None else beliefs.relative)

    def negative_log_joint(params):
        fit = bnnlaplace.gaussian(NOISE).log_prob(Net().apply({"params": params}, x), y).sum()
        return 0.5 * jnp.sum(tau * beliefs.deviation(params) ** 2) - fit

    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.grad(negative_log_joint)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0])
    return bnnlaplace.Network.from_linen(Net(), {"params": run(params)})


start = Net().init(jax.random.key(0), x[:1])["params"]
options = {"likelihood": "regression", "hessian_structure": "full", "sigma_noise": NOISE}
network = train(start, x, y)
la = bnnlaplace.Laplace(network, **options, prior_precision=1.0).fit((x, y))


def tell(what, la):
    print(f"{what}: log evidence {la.log_marginal_likelihood().mean:.1f} nats")


def rounded(precisions):
    return {name: float(f"{precision:.2g}") for name, precision in precisions.items()}


tell("as trained", la)

# %% One number
# Without arguments `optimize_prior_precision` chooses one factor for the prior precision as it is. No curvature is
# computed again, whatever the structure.

one = la.optimize_prior_precision()
tell(f"prior precision {one.prior_precision:.2g}", one)

# %% One for each layer
# `prior_structure="layerwise"` chooses one precision for each group of weights. A group is a layer, unless
# `prior_groups` says otherwise. Where a group of weights says nothing about the data, its precision is large.

layers = la.optimize_prior_precision(prior_structure="layerwise")
tell(f"{rounded(layers.prior_precision)}", layers)

# %% Train again
# The weights are now a mode for a prior that has changed. Where it has changed much, train on with the precisions that
# were found, fit, and choose again, until the evidence has stopped rising. Here two rounds.

for _ in range(2):
    network = train(network.params, x, y, layers.prior_precision)
    again = bnnlaplace.Laplace(network, **options, prior_precision=layers.prior_precision).fit((x, y))
    layers = again.optimize_prior_precision(prior_structure="layerwise")
    tell(f"{rounded(layers.prior_precision)}", layers)

# %% Groups of your own
# `prior_groups` is a function from the path of a weight, such as `time/kernel`, to the name of its group. A dictionary
# of precisions has those names.

kinds = bnnlaplace.Laplace(
    la.network,
    **options,
    prior_precision={"kernel": 1.0, "bias": 1.0},
    prior_groups=lambda path: path.rpartition("/")[2],
).fit((x, y))
kinds = kinds.optimize_prior_precision(prior_structure="layerwise")
tell(f"{rounded(kinds.prior_precision)}", kinds)

# %% One for each weight
# `prior_structure="diag"`. The evidence rises with every number that it may choose, so that here it says little about
# whether the model has become better. "kron" cannot have them, as its blocks are Kronecker products.

each = bnnlaplace.Laplace(la.network, **{**options, "hessian_structure": "diag"}).fit((x, y))
for structure in ("layerwise", "diag"):
    tell(f"diagonal curvature, {structure}", each.optimize_prior_precision(prior_structure=structure))

# %% With "lanczos"
# A Krylov space belongs to the ratios of the precisions. A common factor needs no other space; for new ratios the
# curvature is fitted again, a few times, by a function that is passed as `refit`:
#
#     la.optimize_prior_precision(prior_structure="layerwise", refit=lambda la: la.fit((x, y), key=key))
#
# Of data with no more outputs than `max_vectors`, 512 by default, "lanczos" keeps the whole curvature. Then it is exact
# and needs no `refit`.

spectral = bnnlaplace.Laplace(la.network, **{**options, "hessian_structure": "lanczos"}).fit((x, y))
spectral = spectral.optimize_prior_precision(prior_structure="layerwise")
tell(f"{type(spectral.structure).__name__}, {rounded(spectral.prior_precision)}", spectral)

# %% The noise of a regression
# `optimize_sigma_noise=True` maximises over the noise, too, from the same curvature. The weights remain those for the
# noise and the prior of training, and noise that they have learned is missing in what it finds: train again and repeat,
# as above.

noisy = layers.with_sigma_noise(0.3).optimize_prior_precision(optimize_sigma_noise=True)
print(f"noise {float(noisy.sigma_noise):.3f}; the data were made with {NOISE}")

# %% A mean other than zero
# `prior_mean` is a number, or weights like those of the network. For a network that was trained before and is adapted
# to few data, take the weights it began with: the prior says then how far they move, and may be narrow. Here: twenty
# observations of the same curve, shifted by 0.3.

x_few = rng.uniform(-2, 2, (20, 6)).astype(np.float32)
y_few = jnp.asarray(0.3 + np.sin(2 * x_few[:, :1]) + NOISE * rng.normal(size=(20, 1)), jnp.float32)
found = {}
for what, precision, mean in (("zero", 1.0, 0.0), ("the weights from before", 100.0, network.params)):
    tuned = train(network.params, x_few, y_few, precision, mean)
    found[what] = bnnlaplace.Laplace(tuned, **options, prior_precision=precision, prior_mean=mean).fit((x_few, y_few))
    tell(f"prior around {what}, precision {precision:g}", found[what])

# %% Weights that are no mode
# Evidence and posterior are those of a mode of the log joint. `fit` warns (`NotAModeWarning`) where the mode is not
# much nearer than a posterior sample. Weight decay is a prior precision if it is a part of the loss: with a loss that
# is a mean over N examples the precision is N times the factor of |theta|^2 / 2. Decoupled weight decay, that of AdamW,
# is no part of any loss. Here training is stopped early.

early = bnnlaplace.Laplace(train(start, x, y, steps=100), **options)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    early_fit = early.fit((x, y))
print(f"{caught[0].category.__name__}: {caught[0].message}")

# %% A mode whatever training did
# Where training cannot go on, `fit(mean="linear")` replaces the network by its linearisation at the weights, whose log
# joint is concave, and expands that one at its own mode. The evidence is that of the linearised network. Another prior
# has another mode: fit again with it. `network.params` of the result are the weights at the mode; only the linearised
# network is good there, so that predictions are its own.

linear = early.fit((x, y), mean="linear")
tell(f"squared distance to the mode {linear.mode_decrement():.2g}", linear)

assert layers.prior_precision["others"] > 10 * layers.prior_precision["time"]
assert layers.log_marginal_likelihood().mean > one.log_marginal_likelihood().mean + 10
assert (
    found["the weights from before"].log_marginal_likelihood().mean > found["zero"].log_marginal_likelihood().mean + 10
)
assert abs(float(noisy.sigma_noise) / NOISE - 1) < 0.25
assert isinstance(caught[0].message, bnnlaplace.NotAModeWarning)
assert linear.mode_decrement() < 1e-2
