"""One step of the optimiser on the negative log joint over N.

For a batch of B of the N training images the objective is

    1/B sum_b -log p(y_b | x_b, theta) + prior_precision / (2 N) |theta|^2,

an unbiased estimate of -log p(D, theta) / N up to the constant of the prior. Its minimiser is a mode of the posterior
under the prior N(0, 1/prior_precision), and a Laplace approximation expands around such a mode. Weight decay that is
decoupled from the loss has no such meaning. The prior precision is part of the state, so a change compiles nothing.

If weights and prior are trained jointly, the gradient of half the log-determinant, as the last evidence step left it,
is added in both. The logarithm of the precision then follows its gradient: prior_precision / 2 |theta|^2 pulls it down,
the log-determinant pushes it up.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnnlaplace.marglik.held import all_finite, first_bad_step
from training.config import Optimizer, Prior
from training.train.batches import Plan
from training.train.evidence import PRECISION_RANGE, initial_evidence, precision_optimizer
from training.train.objective import Passes
from training.train.prior import by_leaf, initial_precision


class EpochSums(NamedTuple):
    """Sums over the steps of an epoch so far."""

    loss: jax.Array
    correct: jax.Array
    steps: jax.Array
    gradient_norm: jax.Array
    """Norm of the gradient of the last step, for all images, in nats."""


class TrainState(NamedTuple):
    """All that a step changes. The leaves are arrays, so the state is one checkpoint."""

    params: Any
    batch_stats: Any
    opt_state: Any
    step: jax.Array
    prior_precision: Any
    """One number, or a dictionary with one for each layer."""
    sums: EpochSums
    bad_step: jax.Array
    """The first step with a loss, evidence or gradient that is not finite, or -1. It is read once an epoch."""
    evidence: Any = ()
    """An `EvidenceState` if weights and prior are trained jointly."""


class Steps(NamedTuple):
    """The steps of a run. Each compiles at its first call."""

    train: Callable[[TrainState, Any, Any, jax.Array], TrainState]
    """(state, images, labels, key): batch statistics and drop-path live."""
    polish: Callable[[TrainState, Any, Any, jax.Array], TrainState]
    """(state, images, labels, key): both frozen. The key is not used."""
    learning_rate: Callable[[int], float]
    """Learning rate by the number of the step."""


def make_steps(passes: Passes, config: Optimizer, plan: Plan, prior: Prior) -> Steps:
    """Build the steps of both phases."""
    schedule = _schedule(config, plan)
    optimizer = _optimizer(config)

    def update(state: TrainState, nll: jax.Array, correct: jax.Array, gradient: Any) -> TrainState:
        decay = jax.tree.map(lambda number: number / plan.num_examples, by_leaf(state.prior_precision, state.params))
        squares = jax.tree.map(lambda number, p: number * jnp.sum(jnp.square(p)), decay, state.params)
        loss = nll / plan.batch_size + 0.5 * sum(jax.tree.leaves(squares))
        gradient = jax.tree.map(lambda g, number, p: g / plan.batch_size + number * p, gradient, decay, state.params)
        if state.evidence:
            held = state.evidence.held[0]
            gradient = jax.tree.map(lambda g, h: g + h / plan.num_examples, gradient, held)
        direction, opt_state = optimizer.update(gradient, state.opt_state)
        rate, norm = schedule(state.step), optax.tree.norm(gradient)
        sums = EpochSums(
            state.sums.loss + loss, state.sums.correct + correct, state.sums.steps + 1, plan.num_examples * norm
        )
        return _with_trained_prior(state, prior)._replace(
            params=jax.tree.map(lambda p, d: p - rate * d, state.params, direction),
            opt_state=opt_state,
            step=state.step + 1,
            sums=sums,
            bad_step=first_bad_step(state.bad_step, state.step, all_finite(loss, norm)),
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


def _with_trained_prior(state: TrainState, prior: Prior) -> TrainState:
    """Return the state after a step of the logarithms of the precisions, if they are trained jointly."""
    evidence = state.evidence
    if not evidence:
        return state
    precision = state.prior_precision
    # d/dlog delta of delta |theta|^2 / 2, summed over the weights of each precision, plus that of the determinant.
    halves = jax.grad(lambda logs: _half_quadratic_form(jax.tree.map(jnp.exp, logs), state.params))(
        jax.tree.map(jnp.log, precision)
    )
    gradient = jax.tree.map(jnp.add, halves, evidence.held[1])
    moves, opt_state = precision_optimizer(prior).update(gradient, evidence.opt_state)
    moved = jax.tree.map(lambda number, move: jnp.clip(number * jnp.exp(move), *PRECISION_RANGE), precision, moves)

    def if_active(new: Any, old: Any) -> Any:
        return jax.tree.map(lambda one, other: jnp.where(evidence.active, one, other), new, old)

    kept = evidence._replace(opt_state=if_active(opt_state, evidence.opt_state))
    return state._replace(prior_precision=if_active(moved, precision), evidence=kept)


def _half_quadratic_form(precision: Any, params: Any) -> jax.Array:
    terms = jax.tree.map(lambda number, p: 0.5 * number * jnp.sum(jnp.square(p)), by_leaf(precision, params), params)
    return sum(jax.tree.leaves(terms))


def initial_state(params: Any, batch_stats: Any, config: Optimizer, prior: Prior) -> TrainState:
    """Return the state before the first step."""
    precision = initial_precision(prior.precision, prior.structure, params)
    return TrainState(
        params=params,
        batch_stats=batch_stats,
        opt_state=jax.jit(_optimizer(config).init)(params),
        step=jnp.int32(0),
        prior_precision=precision,
        sums=no_sums(),
        bad_step=jnp.int32(-1),
        evidence=initial_evidence(prior, params, precision),
    )


def frozen_state(state: TrainState, batch_stats: Any, config: Optimizer) -> TrainState:
    """Return the state before the first polishing step: the given batch statistics, and an optimiser without memory."""
    opt_state = jax.jit(_optimizer(config).init)(state.params)
    return state._replace(batch_stats=jax.tree.map(jnp.asarray, batch_stats), opt_state=opt_state)


def no_sums() -> EpochSums:
    """Return the sums before the first step of an epoch."""
    return EpochSums(jnp.float32(0), jnp.int32(0), jnp.int32(0), jnp.float32(0))


def _optimizer(config: Optimizer) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), optax.scale_by_adam(b2=config.second_moment_decay))


def _schedule(config: Optimizer, plan: Plan) -> optax.Schedule:
    """Join a linear warm-up, a cosine to zero, and, from the first polishing step, a second cosine to zero."""
    warmup = plan.end_of_epoch(config.warmup_epochs)
    rising = optax.linear_schedule(config.learning_rate / max(warmup, 1), config.learning_rate, max(warmup - 1, 1))
    falling = optax.cosine_decay_schedule(config.learning_rate, max(plan.train_steps - warmup, 1))
    polishing = optax.cosine_decay_schedule(config.polish_learning_rate, max(plan.total_steps - plan.train_steps, 1))
    return optax.join_schedules([rising, falling, polishing], [warmup, plan.train_steps])
