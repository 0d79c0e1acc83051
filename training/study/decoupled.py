"""The usual training: AdamW, whose weight decay is decoupled from the loss, with batch statistics live to the end.

It takes as many epochs as the two phases of `training.train.loop`, with the same batches, learning rate and schedule.
Its weights are a mode of no log joint. At the end the batch statistics are those of the whole training set.
"""

import math
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from bnnlaplace.checkpoint import CheckpointError, load_pytree, save_pytree
from training import settings
from training.cli import interruption
from training.config import Config
from training.data.augment import augment
from training.data.load import ImageData
from training.errors import Interrupted, UserError
from training.train.batch_statistics import make_moments, population_statistics
from training.train.batches import Plan, weighted_batches
from training.train.objective import make_passes

CHECKPOINT, CHECKPOINT_SECONDS = "adamw", 20.0


class _State(NamedTuple):
    params: Any
    batch_stats: Any
    opt_state: Any
    loss: Any
    """Sum of the losses since the last check; it says whether one was not finite."""


def train_decoupled(
    config: Config, data: ImageData, module: nn.Module, *, weight_decay: float, workdir: Path
) -> tuple[Any, Any, float]:
    """Train a network, or go on where an earlier start was stopped. Return weights, batch statistics and seconds.

    Parameters
    ----------
    config
        Its optimiser section counts, except for the phase of polishing, whose epochs are added, and the decay of the
        second moment, which is Adam's usual .999.
    data, module
        As for `training.train.loop.train`.
    weight_decay
        Of the arrays of two or more dimensions, times the learning rate a step.
    workdir
        Where the checkpoint is kept. One of other settings is refused.

    Raises
    ------
    FloatingPointError
        The loss is not finite.
    UserError
        The checkpoint is damaged or of other settings.
    Interrupted
        Ctrl-C or SIGTERM came. A checkpoint was written.
    """
    optimizer, path = config.optimizer, workdir / CHECKPOINT
    epochs = optimizer.epochs + optimizer.polish_epochs
    plan = Plan(len(data.train.labels), optimizer.batch_size, epochs, 0)
    passes = make_passes(module)
    update = _adamw(config, plan, weight_decay)
    key_init, key_drop_path = jax.random.split(jax.random.key(config.seed))

    @jax.jit
    def take_step(state: _State, images: Any, labels: Any, step: Any) -> _State:
        (nll, (_, batch_stats)), gradient = passes.live_gradient(
            state.params, state.batch_stats, images, labels, jax.random.fold_in(key_drop_path, step)
        )
        gradient = jax.tree.map(lambda each: each / plan.batch_size, gradient)
        moves, opt_state = update.update(gradient, state.opt_state, state.params)
        return _State(optax.apply_updates(state.params, moves), batch_stats, opt_state, state.loss + nll)

    params, batch_stats = passes.initialise(key_init, data.train.images[:1])
    state = _State(params, batch_stats, jax.jit(update.init)(params), jnp.float32(0))
    state, first, seconds = _restored(path, state, config, weight_decay)
    started = saved_at = monotonic()

    def save(state: _State, step: int) -> None:
        took = seconds + monotonic() - started
        record = {"step": step, "seconds": took, "settings": settings.record(config), "weight_decay": weight_decay}
        save_pytree(path, state, record)

    for step in range(first, plan.total_steps):
        chosen = plan.indices(config.seed, step)
        images = data.train.images[chosen]
        if config.data.augment:
            images = augment(images, np.random.default_rng((config.seed, step)))
        state = take_step(state, images, data.train.labels[chosen], jnp.int32(step))
        is_last = step + 1 == plan.total_steps
        if (step + 1) % 16 == 0 or is_last:
            _require_finite(state, step)
            if interruption.requested() and not is_last:
                save(state, step + 1)
                raise Interrupted(f"stopped after step {step + 1} of {plan.total_steps}; saved as {path}")
            if monotonic() - saved_at > CHECKPOINT_SECONDS and not is_last:
                save(state, step + 1)
                saved_at = monotonic()
    if first < plan.total_steps:
        frozen = population_statistics(make_moments(module), state.params, state.batch_stats, lambda: _all(data, plan))
        state = state._replace(batch_stats=jax.tree.map(jnp.asarray, frozen))
        save(state, plan.total_steps)
        seconds += monotonic() - started
    return state.params, state.batch_stats, seconds


def _adamw(config: Config, plan: Plan, weight_decay: float) -> optax.GradientTransformation:
    """AdamW with a linear warm-up and a cosine to zero. Biases, scales and other vectors do not decay."""
    rate, warmup = config.optimizer.learning_rate, plan.end_of_epoch(config.optimizer.warmup_epochs)
    schedule = optax.join_schedules(
        [
            optax.linear_schedule(rate / max(warmup, 1), rate, max(warmup - 1, 1)),
            optax.cosine_decay_schedule(rate, max(plan.total_steps - warmup, 1)),
        ],
        [warmup],
    )
    return optax.chain(
        optax.clip_by_global_norm(config.optimizer.clip_norm),
        optax.adamw(
            schedule, weight_decay=weight_decay, mask=lambda tree: jax.tree.map(lambda leaf: leaf.ndim > 1, tree)
        ),
    )


def _all(data: ImageData, plan: Plan) -> Iterator[tuple[np.ndarray, float]]:
    return weighted_batches(data.train.images, plan.batch_size)


def _restored(path: Path, state: _State, config: Config, weight_decay: float) -> tuple[_State, int, float]:
    """Return state, number of steps and seconds of an earlier start; without one, those of the beginning."""
    if not path.exists():
        return state, 0, 0.0
    try:
        restored, metadata = load_pytree(path, state)
    except CheckpointError as error:
        raise UserError(f"{error}; remove {path} to train again") from None
    # Curvature and evaluation are not used here.
    settings.require_recorded(metadata["settings"], config, path, curvature=False, report=lambda message: None)
    if metadata["weight_decay"] != weight_decay:
        raise UserError(
            f"{path} must be of a weight decay of {weight_decay}; it has {metadata['weight_decay']}; use another "
            "--workdir"
        )
    return restored, int(metadata["step"]), float(metadata["seconds"])


def _require_finite(state: _State, step: int) -> None:
    if not math.isfinite(float(state.loss)):
        raise FloatingPointError(f"the loss is not finite at step {step + 1}; use a smaller optimizer.learning_rate")
