"""One step of the optimiser on the negative log joint over N.

For a batch of B of the N training images the objective is

    1/B sum_b -log p(y_b | x_b, theta) + prior_precision / (2 N) |theta|^2,

an unbiased estimate of -log p(D, theta) / N up to the constant of the prior. Its minimiser is a mode of the posterior
under the prior N(0, 1/prior_precision), and a Laplace approximation expands around such a mode. Weight decay that is
decoupled from the loss has no such meaning. The prior precision is part of the state, so a change compiles nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from training.config import Optimizer
from training.train.batches import Plan
from training.train.objective import Passes


class EpochSums(NamedTuple):
    """Sums over the steps of an epoch so far."""

    loss: jax.Array
    correct: jax.Array
    steps: jax.Array


class TrainState(NamedTuple):
    """All that a step changes. The leaves are arrays, so the state is one checkpoint."""

    params: Any
    batch_stats: Any
    opt_state: Any
    step: jax.Array
    prior_precision: jax.Array
    sums: EpochSums
    bad_step: jax.Array
    """The first step with a loss or gradient that is not finite, or -1. It is read once an epoch, not at every step."""


class Steps(NamedTuple):
    """The steps of a run. Each compiles at its first call."""

    train: Callable[[TrainState, Any, Any, jax.Array], TrainState]
    """(state, images, labels, key): batch statistics and drop-path live."""
    polish: Callable[[TrainState, Any, Any, jax.Array], TrainState]
    """(state, images, labels, key): both frozen. The key is not used."""
    learning_rate: Callable[[int], float]
    """Learning rate by the number of the step."""


def make_steps(passes: Passes, config: Optimizer, plan: Plan) -> Steps:
    """Build the steps of both phases."""
    schedule = _schedule(config, plan)
    optimizer = _optimizer(config)

    def update(state: TrainState, nll: jax.Array, correct: jax.Array, gradient: Any) -> TrainState:
        decay = state.prior_precision / plan.num_examples
        loss = nll / plan.batch_size + 0.5 * decay * optax.tree.norm(state.params, squared=True)
        gradient = jax.tree.map(lambda g, p: g / plan.batch_size + decay * p, gradient, state.params)
        direction, opt_state = optimizer.update(gradient, state.opt_state)
        rate = schedule(state.step)
        finite = jnp.isfinite(loss) & jnp.isfinite(optax.tree.norm(gradient))
        return state._replace(
            params=jax.tree.map(lambda p, d: p - rate * d, state.params, direction),
            opt_state=opt_state,
            step=state.step + 1,
            sums=EpochSums(state.sums.loss + loss, state.sums.correct + correct, state.sums.steps + 1),
            bad_step=jnp.where(finite | (state.bad_step >= 0), state.bad_step, state.step),
        )

    def train(state: TrainState, images: Any, labels: Any, key: jax.Array) -> TrainState:
        (nll, (correct, batch_stats)), gradient = passes.live_gradient(
            state.params, state.batch_stats, images, labels, jax.random.fold_in(key, state.step)
        )
        return update(state._replace(batch_stats=batch_stats), nll, correct, gradient)

    # The expensive part of polishing is the frozen gradient, which the gradient of the log joint has compiled already.
    compiled_update = jax.jit(update)
    everything = np.ones(plan.batch_size, bool)

    def polish(state: TrainState, images: Any, labels: Any, key: jax.Array) -> TrainState:
        del key
        (nll, correct), gradient = passes.frozen_gradient(state.params, state.batch_stats, images, labels, everything)
        return compiled_update(state, nll, correct, gradient)

    return Steps(jax.jit(train), polish, lambda step: float(schedule(step)))


def initial_state(params: Any, batch_stats: Any, config: Optimizer, prior_precision: float) -> TrainState:
    """Return the state before the first step."""
    return TrainState(
        params=params,
        batch_stats=batch_stats,
        opt_state=jax.jit(_optimizer(config).init)(params),
        step=jnp.int32(0),
        prior_precision=jnp.float32(prior_precision),
        sums=no_sums(),
        bad_step=jnp.int32(-1),
    )


def frozen_state(state: TrainState, batch_stats: Any, config: Optimizer) -> TrainState:
    """Return the state before the first polishing step: the given batch statistics, and an optimiser without memory."""
    opt_state = jax.jit(_optimizer(config).init)(state.params)
    return state._replace(batch_stats=jax.tree.map(jnp.asarray, batch_stats), opt_state=opt_state)


def no_sums() -> EpochSums:
    """Return the sums before the first step of an epoch."""
    return EpochSums(jnp.float32(0), jnp.int32(0), jnp.int32(0))


def _optimizer(config: Optimizer) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.scale_by_adam(b2=config.second_moment_decay))


def _schedule(config: Optimizer, plan: Plan) -> optax.Schedule:
    """Join a linear warm-up, a cosine to zero, and, from the first polishing step, a second cosine to zero."""
    warmup = plan.end_of_epoch(config.warmup_epochs)
    rising = optax.linear_schedule(config.learning_rate / max(warmup, 1), config.learning_rate, max(warmup - 1, 1))
    falling = optax.cosine_decay_schedule(config.learning_rate, max(plan.train_steps - warmup, 1))
    polishing = optax.cosine_decay_schedule(config.polish_learning_rate, max(plan.total_steps - plan.train_steps, 1))
    return optax.join_schedules([rising, falling, polishing], [warmup, plan.train_steps])
