"""The steps that train the prior by the evidence, and the part of the state that they keep.

The curvature is that of the network as it predicts: batch statistics are frozen at their running values, drop-path and
augmentation are off. Its images are drawn by the number of the step ("joint"), or are a stratified subset that is the
same throughout ("online").

While batch statistics are live, the steps train another function than the one that is expanded: the scale of a kernel
before a normalised layer has no effect on the loss, but the frozen network's log-determinant would shrink it without
end. So the log-determinant moves the weights only where the two functions are the same: in polishing, or in networks
without batch statistics. Before that it moves the prior alone.

A gradient that is held for many steps is one random number in all of them. So the held gradient is a mean over the last
`MEMORY` estimates: as much noise as from a new estimate in each step, at a fraction of the cost.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnnlaplace
from bnnlaplace.core.types import Estimate
from bnnlaplace.marglik import EvidenceOptions, held, prior_update
from bnnlaplace.marglik.objective import half_log_determinant
from training.config import Config, Prior
from training.data.load import ImageData
from training.data.shuffle import stratified_indices
from training.errors import UserError

# Trained precisions stay within these bounds. If the weights of a layer have died or are hardly trained yet, the
# maximiser of the evidence can be zero or infinite.
PRECISION_RANGE = (1e-3, 1e3)
_PROBE_STREAM, _SUBSET_STREAM, _IMAGE_STREAM = 101, 102, 103
_MICROBATCH = 128

MEMORY = 10
"""Estimates of the gradient of the log-determinant that the held one remembers."""


class EvidenceState(NamedTuple):
    """What training by the evidence keeps beside the weights. The leaves are arrays."""

    held: tuple[Any, Any]
    """The gradient of half the log-determinant in the weights and in the logarithms of the precisions, in nats: a mean
    of the first estimates, then a moving average."""
    estimates: jax.Array
    """How many estimates it is made of."""
    opt_state: Any
    """Adam's state of the logarithms of the precisions."""
    active: jax.Array
    """Whether precisions are trained now. `held` is zero otherwise."""
    mean: jax.Array
    """Mean of the estimates of the log evidence in this epoch so far, in nats."""
    squares: jax.Array
    """Sum of their squared deviations from it."""
    count: jax.Array
    """How many there are."""


def precision_optimizer(config: Prior) -> optax.GradientTransformation:
    """Return the optimiser of the logarithms of the precisions."""
    return optax.adam(config.option("learning_rate"))


def initial_evidence(config: Prior, params: Any, precision: Any) -> Any:
    """Return the state before the first evidence step. There is none unless the update is joint."""
    if config.update != "joint":
        return ()
    zeros = partial(jax.tree.map, jnp.zeros_like)
    number = jnp.float32(0)
    opt_state = precision_optimizer(config).init(precision)
    return EvidenceState(
        held=(zeros(params), zeros(precision)),
        estimates=jnp.int32(0),
        opt_state=opt_state,
        active=jnp.bool(False),
        mean=number,
        squares=number,
        count=jnp.int32(0),
    )


def without_sums(evidence: Any) -> Any:
    """Return the state before the first evidence step of an epoch."""
    if not evidence:
        return evidence
    number = jnp.float32(0)
    return evidence._replace(mean=number, squares=number, count=jnp.int32(0))


def at_rest(evidence: EvidenceState) -> EvidenceState:
    """Return the state in which precisions stay and the log-determinant does not count."""
    return forgotten(evidence)._replace(active=jnp.bool(False))


def forgotten(evidence: Any) -> Any:
    """Return the state without a gradient of the log-determinant, as when the network changes."""
    if not evidence:
        return evidence
    gradient, estimates = held.forgotten(evidence.held)
    return evidence._replace(held=gradient, estimates=estimates)


class Window(NamedTuple):
    """The epochs in which the evidence counts, numbered from 1, and how often it is computed."""

    first: int
    last: int
    every: int

    def contains(self, epoch: int) -> bool:
        """Whether the evidence counts in an epoch."""
        return self.first <= epoch <= self.last


def window(config: Config) -> Window | None:
    """Return when the evidence counts; None for posthoc.

    It ends half way through polishing, so that the run ends at a mode of the log joint under the prior that it reports.
    """
    prior, optimizer = config.prior, config.optimizer
    if prior.update == "posthoc":
        return None
    every = prior.option("every_epochs" if prior.update == "online" else "every_steps")
    last = optimizer.epochs + optimizer.polish_epochs // 2
    if prior.update == "online":
        # After the very last epoch no step would move the weights to the new mode.
        last = min(last, optimizer.epochs + optimizer.polish_epochs - 1)
    return Window(prior.option("burn_in") + 1, last, every)


def check_window(config: Config) -> None:
    """Raise a UserError if training by the evidence would never compute it, and would be that of posthoc."""
    counts = window(config)
    if counts is None:
        return
    prior, optimizer, is_online = config.prior, config.optimizer, config.prior.update == "online"
    epochs = range(counts.first, counts.last + 1)
    if any(epoch % counts.every == 0 for epoch in epochs) if is_online else len(epochs):
        return
    if not optimizer.epochs + optimizer.polish_epochs:
        raise UserError(
            f"`prior.update` must be posthoc where nothing is trained; got {prior.update}; use --prior.update posthoc"
        )
    every = f"`prior.{'every_epochs' if is_online else 'every_steps'}` {counts.every}"
    due = f"after each multiple of {counts.every}" if is_online else "in each"
    raise UserError(
        f"`prior.update` {prior.update} must compute the evidence in at least one epoch; got `prior.burn_in` "
        f"{prior.option('burn_in')}, {every}, `optimizer.epochs` {optimizer.epochs} and `optimizer.polish_epochs` "
        f"{optimizer.polish_epochs}: it would be computed {due} from epoch {counts.first} to {counts.last}, which is "
        "none; lower --prior.burn-in"
        f"{' or --prior.every-epochs' if is_online else ''}, or raise --optimizer.epochs"
    )


class EvidenceSteps(NamedTuple):
    """The evidence steps of a run. Each compiles at its first call."""

    joint: Callable[[Any, int, bool], Any]
    """(state, step, whether it moves the weights) -> state, with another estimate of the log-determinant's gradient."""
    online: Callable[[Any, int], tuple[Any, Estimate, float | None]]
    """(state, epoch) -> state with other precisions, the log evidence, and that of the diagonal at its own best
    precisions if the curvature is another one."""


def make_evidence_steps(config: Config, data: ImageData, module: nn.Module) -> EvidenceSteps:
    """Build the evidence steps of a run. They are functions of the seed and of the number of the step or epoch."""
    prior, num_data = config.prior, len(data.train.labels)
    options = EvidenceOptions(
        {"lanczos": "lanczos", "diagonal": "diag"}.get(prior.option("curvature"), "lanczos"),
        prior.option("matvecs") or 1,
        prior.option("probes") or 1,
        microbatch=_MICROBATCH,
    )
    diagonal = EvidenceOptions("diag", 1, 1, microbatch=_MICROBATCH)
    model = {"likelihood": bnnlaplace.categorical(), "num_data": num_data, "options": options}
    key_probe = jax.random.fold_in(jax.random.key(config.seed), _PROBE_STREAM)
    count = min(prior.option("examples") or 1, num_data)

    def network(state: Any) -> bnnlaplace.Network:
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        return bnnlaplace.Network.from_linen(module, variables, train=False)

    @jax.jit
    def joint(network: Any, state: Any, images: Any, labels: Any, key: jax.Array, share: jax.Array) -> Any:
        logs = jax.tree.map(jnp.log, state.prior_precision)
        gradient_of = jax.grad(
            lambda params, logs: half_log_determinant(params, logs, (images, labels), key, network=network, **model),
            (0, 1),
            has_aux=True,
        )
        (of_weights, of_logs), terms = gradient_of(state.params, logs)
        estimate = jax.tree.map(lambda leaf: share * leaf, of_weights), of_logs
        value, before = terms.log_marginal_likelihood.mean, state.evidence
        # Welford's update: the deviations are small beside the mean.
        number, deviation = before.count + 1, value - before.mean
        mean = before.mean + deviation / number
        gradient = held.averaged(before.held, estimate, before.estimates, MEMORY)
        evidence = before._replace(
            held=gradient,
            estimates=before.estimates + 1,
            active=jnp.bool(True),
            mean=mean,
            squares=before.squares + deviation * (value - mean),
            count=number,
        )
        is_finite = held.all_finite(value, gradient)
        return state._replace(evidence=evidence, bad_step=held.first_bad_step(state.bad_step, state.step, is_finite))

    @jax.jit
    def online(network: Any, state: Any, images: Any, labels: Any, key: jax.Array) -> Any:
        logs = jax.tree.map(jnp.log, state.prior_precision)
        rest = {"network": network, **model}
        update = prior_update(state.params, logs, (images, labels), key, **rest)
        precision = jax.tree.map(lambda log: jnp.clip(jnp.exp(log), *PRECISION_RANGE), update.log_precision)
        is_finite = held.all_finite(update.log_evidence.mean, precision)
        bad_step = held.first_bad_step(state.bad_step, state.step, is_finite)
        of_diagonal = None
        if options.hessian_structure != diagonal.hessian_structure:
            compared = prior_update(state.params, logs, (images, labels), key, **rest | {"options": diagonal})
            of_diagonal = compared.log_evidence.mean
        return state._replace(prior_precision=precision, bad_step=bad_step), update.log_evidence, of_diagonal

    def joint_at(state: Any, step: int, moves_weights: bool) -> Any:
        generator = np.random.default_rng((config.seed, _IMAGE_STREAM, step))
        chosen = np.sort(generator.choice(num_data, count, replace=False))
        key = jax.random.fold_in(key_probe, step)
        return joint(
            network(state), state, data.train.images[chosen], data.train.labels[chosen], key, float(moves_weights)
        )

    def online_at(state: Any, epoch: int) -> Any:
        chosen = np.sort(stratified_indices(data.train.labels, count, (config.seed + _SUBSET_STREAM) % 2**63))
        key = jax.random.fold_in(key_probe, epoch)
        return online(network(state), state, data.train.images[chosen], data.train.labels[chosen], key)

    return EvidenceSteps(joint_at, online_at)
