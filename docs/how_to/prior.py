"""Choose a prior.

The prior can have one precision for all weights, one for each layer or one for each weight, and a mean other than zero.
This page shows how the evidence chooses the precisions and the noise of a regression, and what to do with weights that
are not at a mode.
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
# The targets are a curve in one variable with noise of standard deviation 0.2. Five other variables have nothing to do
# with it. Each kind of input enters by a layer of its own. The weights are trained for the log joint with this noise
# and a given prior, at first of precision 1.

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
    """Return the network at its mode; `precision` and `mean` are what `Laplace` takes."""
    gaussian_prior = prior.resolve(precision, mean, params)
    precisions = gaussian_prior.precision * gaussian_prior.relative

    def negative_log_joint(params):
        fit = bnnlaplace.gaussian(NOISE).log_prob(Net().apply({"params": params}, x), y).sum()
        return 0.5 * jnp.sum(precisions * gaussian_prior.deviation(params) ** 2) - fit

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
# Without arguments `optimize_prior_precision` multiplies the prior precision by the best factor. No curvature is
# computed again, whatever the structure.

one = la.optimize_prior_precision()
tell(f"prior precision {one.prior_precision:.2g}", one)

# %% One for each layer
# `prior_structure="layerwise"` chooses one precision for each group of weights. A group is a layer, unless
# `prior_groups` says otherwise. If the data do not need a group of weights, its precision becomes large.

layers = la.optimize_prior_precision(prior_structure="layerwise")
tell(f"{rounded(layers.prior_precision)}", layers)

# %% Train again
# The weights were a mode for the prior before the choice. If the prior has changed much, train on with the new
# precisions, fit and choose again, until the evidence stops rising. Two rounds are enough here.

for _ in range(2):
    network = train(network.params, x, y, layers.prior_precision)
    again = bnnlaplace.Laplace(network, **options, prior_precision=layers.prior_precision).fit((x, y))
    layers = again.optimize_prior_precision(prior_structure="layerwise")
    tell(f"{rounded(layers.prior_precision)}", layers)

# %% Groups of your own
# `prior_groups` is a function from the path of a weight, such as `time/kernel`, to the name of its group. A dictionary
# of precisions has these names as keys.

kinds = bnnlaplace.Laplace(
    la.network,
    **options,
    prior_precision={"kernel": 1.0, "bias": 1.0},
    prior_groups=lambda path: path.rpartition("/")[2],
).fit((x, y))
kinds = kinds.optimize_prior_precision(prior_structure="layerwise")
tell(f"{rounded(kinds.prior_precision)}", kinds)

# %% One for each weight
# `prior_structure="diag"` chooses one precision for each weight. The evidence rises with every number that it may
# choose, so a higher evidence says little about whether the model is better. "kron" does not support this choice,
# because its blocks are Kronecker products.

each = bnnlaplace.Laplace(la.network, **{**options, "hessian_structure": "diag"}).fit((x, y))
for structure in ("layerwise", "diag"):
    tell(f"diagonal curvature, {structure}", each.optimize_prior_precision(prior_structure=structure))

# %% With "lanczos"
# A Krylov space belongs to the ratios between the precisions. A common factor leaves the space as it is. For new ratios
# the curvature is fitted again, a few times, by a function that is passed as `refit`:
#
#     la.optimize_prior_precision(prior_structure="layerwise", refit=lambda la: la.fit((x, y), key=key))
#
# If the data have no more outputs than `max_vectors`, 512 by default, "lanczos" keeps the whole curvature. It is exact
# then, and needs no `refit`.

spectral = bnnlaplace.Laplace(la.network, **{**options, "hessian_structure": "lanczos"}).fit((x, y))
spectral = spectral.optimize_prior_precision(prior_structure="layerwise")
tell(f"{type(spectral.structure).__name__}, {rounded(spectral.prior_precision)}", spectral)

# %% The noise of a regression
# `optimize_sigma_noise=True` also maximises over the noise, from the same curvature. The weights stay those of
# training, and noise that they have learned is missing from the estimate. Train again and repeat, as above.

noisy = layers.with_sigma_noise(0.3).optimize_prior_precision(optimize_sigma_noise=True)
print(f"noise {float(noisy.sigma_noise):.3f}; the data were made with {NOISE}")

# %% A mean other than zero
# `prior_mean` is a number, or weights like those of the network. If a trained network is adapted to few data, take the
# weights that it began with: the prior then says how far they move, and it may be narrow. The example has twenty
# observations of the same curve, shifted by 0.3.

x_few = rng.uniform(-2, 2, (20, 6)).astype(np.float32)
y_few = jnp.asarray(0.3 + np.sin(2 * x_few[:, :1]) + NOISE * rng.normal(size=(20, 1)), jnp.float32)
adapted = {}
for what, precision, mean in (("zero", 1.0, 0.0), ("the weights from before", 100.0, network.params)):
    tuned = train(network.params, x_few, y_few, precision, mean)
    adapted[what] = bnnlaplace.Laplace(tuned, **options, prior_precision=precision, prior_mean=mean).fit((x_few, y_few))
    tell(f"prior around {what}, precision {precision:g}", adapted[what])

# %% Weights that are not at a mode
# Evidence and posterior are defined at a mode of the log joint. `fit` warns (`NotAModeWarning`) if the mode is not much
# nearer than a posterior sample. Weight decay is a prior precision if it is part of the loss: if the loss is a mean
# over $N$ examples, the precision is $N$ times the factor of $\|\theta\|^2 / 2$. Decoupled weight decay, as in AdamW,
# is not part of any loss. In this example training is stopped early.

early = bnnlaplace.Laplace(train(start, x, y, steps=100), **options)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    early_fit = early.fit((x, y))
print(f"{caught[0].category.__name__}: {caught[0].message}")

# %% A mode whatever training did
# If training cannot go on, `fit(mean="linear")` replaces the network by its linearisation at the weights. The log joint
# of the linearised network is concave, and the expansion is at its mode. The evidence is that of the linearised
# network. For another prior fit again, because its mode is another one. `network.params` of the result are the weights
# at the mode. Predictions are those of the linearised network, because only it is accurate there.

linear = early.fit((x, y), mean="linear")
tell(f"squared distance to the mode {linear.mode_decrement():.2g}", linear)

assert layers.prior_precision["others"] > 10 * layers.prior_precision["time"]
assert layers.log_marginal_likelihood().mean > one.log_marginal_likelihood().mean + 10
assert (
    adapted["the weights from before"].log_marginal_likelihood().mean
    > adapted["zero"].log_marginal_likelihood().mean + 10
)
assert abs(float(noisy.sigma_noise) / NOISE - 1) < 0.25
assert isinstance(caught[0].message, bnnlaplace.NotAModeWarning)
assert linear.mode_decrement() < 1e-2
