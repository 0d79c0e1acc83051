"""Add a likelihood.

A likelihood is a record of three functions of outputs and targets. It knows nothing of weights, so a new one takes a
few lines and works with every structure. The example on this page is a Poisson distribution of counts, whose log rate
is the output of the network.
"""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import Partial

import bnnlaplace
from bnnlaplace import Likelihood

# %% The functions
# Each function takes outputs of shape (..., C) and works along the last axis; it does not loop over examples. Let
# $\Lambda$ be the Hessian of $-\log p(y \mid f)$ in $f$, and $B$ any factor of it, $\Lambda = B B^\top$.
#
# - `log_prob`: $(f, y) \mapsto \log p(y \mid f)$, summed over the last axis, with its normalisation;
# - `factor_mv`: $(f, u) \mapsto B u$, linear in $u$, which has the shape of $f$;
# - `mean`: $f \mapsto E[y \mid f]$.
#
# Two more functions follow from `factor_mv`. Give them if you know a cheaper way: `factor_transpose_mv`,
# $(f, v) \mapsto B^\top v$, and `hessian_mv`, $(f, v) \mapsto \Lambda v$.
#
# For counts
#
# $$ -\log p(y \mid f) = \sum_c \bigl[ e^{f_c} - y_c f_c + \log(y_c!) \bigr], \qquad
#    \Lambda = \operatorname{diag}(e^f), \qquad B = \operatorname{diag}(e^{f/2}). $$
#
# $\Lambda$ must be positive semidefinite and must not depend on $y$, but for a weight (see below). If the Hessian does
# not satisfy this, take its expectation under $p(y \mid f)$, the Fisher information, which does.


def poisson_log_prob(f, y):
    return jnp.sum(y * f - jnp.exp(f) - jax.scipy.special.gammaln(y + 1.0), axis=-1)


def poisson_factor_mv(f, u):
    return jnp.exp(f / 2) * u


def poisson() -> Likelihood:
    """Independent counts with log rates f; targets shaped like f."""
    return Likelihood(
        name="poisson",
        target_kind="array",  # targets shaped like the outputs unless target_shape is given; "label" for class labels
        log_prob=Partial(poisson_log_prob),
        factor_mv=Partial(poisson_factor_mv),
        mean=Partial(jnp.exp),
    )


# %% More outputs than targets
# Targets have the shape of the outputs, or are labels. A likelihood whose outputs are, say, a mean and a log variance
# of each target states the shape of its targets: `target_shape=(1,)` for one target, whatever the outputs are, or a
# function from the number of outputs to the shape, such as `lambda c: (c // 2,)`. `bnnlaplace.heteroscedastic()` is the
# Gaussian likelihood of this kind: $2 C$ outputs are $C$ means and then $C$ log variances. Its `predictive` returns the
# mean, its variance under the posterior (epistemic) and the expected variance of the noise (aleatoric).

# %% Unknown labels and weights of classes
# `bnnlaplace.categorical(ignore_index=-100)` leaves out the label -100: those examples, or those positions of the
# outputs of a language model or a segmentation, have no target. `class_weights` multiplies $\log p$ by a number for
# each class, so that a label of weight 2 counts as two equal examples do. Predictions depend on neither. A likelihood
# of your own does the same by `target_weights`, $y \mapsto w(y) \ge 0$: the curvature becomes $w(y) B B^\top$, and
# `log_prob` must have the factor $w(y)$ too.

# %% Temperature
# `bnnlaplace.tempered(likelihood, T)` is $p(y \mid f)^{1/T}$: posterior and evidence are those of data in which each
# example counts $1/T$ times, and predictions are those of the likelihood itself. With $T$ below one the posterior is
# cold.

cold = bnnlaplace.tempered(poisson(), 0.5)
assert cold.log_prob(jnp.zeros(1), jnp.ones(1)) == 2 * poisson().log_prob(jnp.zeros(1), jnp.ones(1))

# %% Parameters of a likelihood
# If a likelihood depends on a number, pass it to the `Partial`s, as in `Partial(scaled_log_prob, scale)`. It becomes
# the first argument of each function, and a leaf of the record, which is a pytree. So it can be traced and
# differentiated, as the noise is in [The evidence in a training loop of your own](../tutorials/training_loop.md).

# %% Check it
# A comparison with automatic differentiation at one example finds a wrong sign or a missing factor of two.


def check(likelihood, f, y):
    columns = jnp.eye(len(f))
    exact = jax.hessian(lambda f: -likelihood.log_prob(f, y))(f)
    factor = jax.vmap(likelihood.factor_mv, in_axes=(None, 0), out_axes=1)(f, columns)
    transposed = jax.vmap(likelihood.factor_transpose_mv, in_axes=(None, 0), out_axes=1)(f, columns)
    hessian = jax.vmap(likelihood.hessian_mv, in_axes=(None, 0))(f, columns)
    np.testing.assert_allclose(hessian, exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(factor @ factor.T, exact, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(transposed, factor.T, rtol=1e-4, atol=1e-5)


check(poisson(), jnp.array([0.3, -1.2, 2.0]), jnp.array([1, 0, 9]))

# %% Use it
# The counts have a rate that depends on one input. The network has 31 weights and is trained to the mode of its log
# joint with a prior precision of 1. `Laplace` takes the likelihood in place of a name.

rng = np.random.default_rng(0)
x = rng.uniform(-2, 2, (150, 1)).astype(np.float32)
y = jnp.asarray(rng.poisson(np.exp(1 + np.sin(2 * x))), jnp.float32)


def log_rate(params, x):
    return jnp.tanh(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def negative_log_joint(params):
    return 0.5 * optax.tree.norm(params, squared=True) - poisson().log_prob(log_rate(params, x), y).sum()


optimizer = optax.adam(optax.cosine_decay_schedule(5e-2, 6000))


def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(negative_log_joint)(params), state)
    return (optax.apply_updates(params, updates), state), None


shapes = {"w1": (1, 10), "b1": (10,), "w2": (10, 1), "b2": (1,)}
params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
(params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=6000))((params, optimizer.init(params)))

network = bnnlaplace.Network.from_function(log_rate, params)
la = bnnlaplace.Laplace(network, likelihood=poisson(), hessian_structure="full").fit((x, y))
print(f"{sum(map(prod, shapes.values()))} weights, squared distance to the mode {la.mode_decrement():.2g}")
la = la.optimize_prior_precision()
print(f"prior precision {la.prior_precision:.2g}, log evidence {la.log_marginal_likelihood().mean:.1f} nats")

# %% Predictions
# The probit link is made for sigmoid and softmax. For any other likelihood ask for samples with `link_approx="mc"`: the
# prediction is the average of `likelihood.mean` over samples of the outputs.

points = np.linspace(-2, 2, 41, dtype=np.float32)[:, None]
rate = la.predictive(points, link_approx="mc", key=jax.random.key(0), num_samples=2000)
variance = la.functional_variance(points)[..., 0]
analytic = jnp.exp(network(network.params, points) + variance / 2)  # the mean of a log-normal distribution
relative = float(jnp.max(jnp.abs(rate / analytic - 1)))
error = float(jnp.sqrt(jnp.mean((jnp.log(rate) - 1 - jnp.sin(2 * points)) ** 2)))
print(
    f"largest relative difference to the exact mean {relative:.3f}; log rates are off by {error:.2f} (root mean square)"
)

# %% On disk
# Functions are not written to disk, only the leaves of the record. Pass your likelihood again when you load:
# `Laplace.load(path, network, likelihood=poisson())`.

assert la.mode_decrement(1.0) < 0.1
assert relative < 0.05
assert error < 0.3
