"""Training to a mode of the posterior: the loop around the steps, and what it keeps on disk.

Phase "train" runs with batch statistics, drop-path and augmentation live. Then the batch statistics are replaced by
those of the whole training set, and phase "polish" runs with all three off. Its network is the deterministic one that
the Laplace approximation expands, and its loss is exactly the negative log joint over N. At the end of each phase the
gradient of the log joint over all training images is measured: it says how close the weights are to a mode.

Where the evidence trains the prior (`training.train.evidence`), "online" sets the precision at the end of some epochs,
and "joint" computes another gradient of the log-determinant before some steps. Both end half way through polishing, so
that the run still ends at a mode, under the prior that it reports.

Images, keys and schedules are pure functions of (seed, step), and a checkpoint holds the state of a step. So a run
that is interrupted after any step continues to the same numbers. `training.train.checkpoints` says what is on disk.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from training.cli import interruption
from training.config import Config
from training.data.augment import augment
from training.data.load import ImageData
from training.data.reading import Split
from training.errors import Interrupted, UserError
from training.pretrained.start import start_from
from training.train import progress
from training.train.batch_statistics import make_moments, population_statistics
from training.train.batches import Plan, fixed_order, weighted_batches
from training.train.checkpoints import (
    Journal,
    TrainResult,
    append_log,
    list_steps,
    load_progress,
    result_of,
    rewrite_log,
    save_progress,
)
from training.train.evidence import (
    EvidenceSteps,
    Window,
    at_rest,
    check_window,
    forgotten,
    make_evidence_steps,
    window,
    without_sums,
)
from training.train.objective import Batches, JointGradient, Passes, evaluate, joint_gradient, make_passes, norm_of
from training.train.prior import by_layer_or_none, geometric_mean
from training.train.step import Steps, TrainState, frozen_state, initial_state, make_steps, no_sums

CHECKPOINTS = 10
CHECKPOINT_SECONDS = 10.0

# The host prepares batches while the device computes. It stays at most this many ahead, so that a run stops promptly.
STEPS_IN_FLIGHT = 2


class _Run(NamedTuple):
    """All that stays the same from the first step of a run to the last."""

    config: Config
    data: ImageData
    plan: Plan
    passes: Passes
    steps: Steps
    moments: Callable[..., Any]
    key_init: jax.Array
    key_drop_path: jax.Array
    workdir: Path
    console: Console
    evidence: EvidenceSteps
    window: Window | None


def train(
    config: Config,
    data: ImageData,
    module: nn.Module,
    *,
    workdir: Path,
    resume: bool,
    console: Console,
) -> TrainResult:
    """Train a network to a mode of the posterior, or continue a run that was interrupted.

    Parameters
    ----------
    config
        The settings of the run.
    data
        The images that the data section of `config` describes.
    module
        A Flax network: ``module.apply(variables, images, train=..., rngs={"drop_path": key}, mutable=["batch_stats"])``
        returns logits. Its batch statistics, if any, are those of `flax.linen.BatchNorm` layers.
    workdir
        A directory claimed by `training.workdir.open_workdir`.
    resume
        Continue from the newest good checkpoint in `workdir`. If there is none, start at the beginning and say so. The
        result of a finished run is returned, and nothing is computed.
    console
        Where the progress and messages for the user are printed.

    Raises
    ------
    UserError
        The batch is larger than the training set. The evidence is to train the prior, but in no epoch. Loss, evidence
        or a gradient is not finite: the message names the step, and the last good checkpoint is kept. There are
        checkpoints, but none is good, or they record other settings. Or as `start_from` with `config.init_from`.
    Interrupted
        Ctrl-C or SIGTERM came. The running step was finished, and a checkpoint was written.

    Notes
    -----
    Beside the steps it costs one gradient over the training set at the end of each phase, and a few forward passes over
    it between the phases. Each kind of pass compiles once.
    """
    run = _prepare(config, data, module, workdir, console)
    state, journal = (_restore(run) if resume else None) or _begin(run)
    if journal.step < run.plan.total_steps:  # a run that an earlier release finished can still be evaluated
        check_window(config)
    rewrite_log(workdir, journal.history)
    if not run.plan.total_steps:
        return _without_steps(run, state, journal)
    with (
        interruption.watch() as interrupted,
        progress.show(console, journal.step, run.plan.total_steps, run.plan.total_epochs) as display,
    ):
        saved_at = time.monotonic()
        while journal.step < run.plan.total_steps:
            state = _run_epoch(run, state, journal, display, interrupted)
            _require_finite(run, state)
            epoch = len(journal.history) + 1
            if journal.step == run.plan.end_of_epoch(epoch):
                state = _end_epoch(run, state, journal)
                _require_finite(run, state)  # an online update may have made it otherwise
                display.epoch(journal.history[-1])
            if interrupted():
                path = _save(run, state, journal)
                raise Interrupted(f"stopped after step {journal.step}; saved as {path}")
            if _checkpoint_is_due(run.plan, journal, time.monotonic() - saved_at):
                _save(run, state, journal)
                saved_at = time.monotonic()
    return result_of(state, journal)


def _without_steps(run: _Run, state: TrainState, journal: Journal) -> TrainResult:
    """Keep the weights that the run starts from, and measure how far they are from a mode."""
    if not list_steps(run.workdir / "train"):
        journal.gradient_norm, journal.prior_gradient_norm = _joint_gradient(run, state)
        if not math.isfinite(journal.gradient_norm):
            raise UserError("the log joint must have a finite gradient at the weights of --init-from; import others")
        _save(run, state, journal)
    return result_of(state, journal)


def check_batch_size(config: Config, data: ImageData) -> None:
    """Raise a UserError if a batch is larger than the training set. `train` checks it too."""
    num_examples = len(data.train.labels)
    if config.optimizer.batch_size > num_examples:
        raise UserError(
            f"`optimizer.batch_size` must be at most the number of training images, {num_examples}; "
            f"got {config.optimizer.batch_size}; make it smaller"
        )


# --- start ----------------------------------------------------------------------------------------------------------


def _prepare(config: Config, data: ImageData, module: nn.Module, workdir: Path, console: Console) -> _Run:
    check_batch_size(config, data)
    optimizer, num_examples = config.optimizer, len(data.train.labels)
    plan = Plan(num_examples, optimizer.batch_size, optimizer.epochs, optimizer.polish_epochs)
    passes = make_passes(module)
    key_init, key_drop_path = jax.random.split(jax.random.key(config.seed))
    return _Run(
        config=config,
        data=data,
        plan=plan,
        passes=passes,
        steps=make_steps(passes, optimizer, plan, config.prior),
        moments=make_moments(module),
        key_init=key_init,
        key_drop_path=key_drop_path,
        workdir=workdir,
        console=console,
        evidence=make_evidence_steps(config, data, module),
        window=window(config),
    )


def _initial_state(run: _Run) -> TrainState:
    params, batch_stats = run.passes.initialise(run.key_init, run.data.train.images[:1])
    return initial_state(params, batch_stats, run.config.optimizer, run.config.prior)


def _begin(run: _Run) -> tuple[TrainState, Journal]:
    state = _initial_state(run)
    if run.config.init_from is not None:
        started = start_from(run.config.init_from, run.config, state.params, state.batch_stats)
        _say(run, started.described)
        on_device = jax.tree.map(jnp.asarray, (started.params, started.batch_stats))
        state = state._replace(params=on_device[0], batch_stats=on_device[1])
    return state, Journal()


def _restore(run: _Run) -> tuple[TrainState, Journal] | None:
    like = jax.eval_shape(lambda: _initial_state(run))
    progress_so_far = load_progress(run.workdir, like, run.config, report=lambda message: _say(run, message))
    if progress_so_far is None:
        _say(run, f"no training checkpoint in {run.workdir}: starting at the beginning")
        return None
    state, journal, finished = progress_so_far
    if finished:
        _say(run, f"training is finished: {journal.step} steps, {len(journal.history)} epochs")
    else:
        _say(run, f"resuming after step {journal.step} of {run.plan.total_steps}")
    return state, journal


# --- epochs ---------------------------------------------------------------------------------------------------------


def _run_epoch(
    run: _Run, state: TrainState, journal: Journal, display: progress.Display, interrupted: Callable[[], bool]
) -> TrainState:
    """Take the rest of the steps of the present epoch, or fewer if the run is interrupted."""
    started = time.monotonic() - journal.epoch_seconds
    epoch = len(journal.history)
    polishing = epoch >= run.plan.epochs
    take_step = run.steps.polish if polishing else run.steps.train
    in_flight: deque[TrainState] = deque()
    if state.evidence and not run.window.contains(epoch + 1):
        state = state._replace(evidence=at_rest(state.evidence))
    for step in range(journal.step, run.plan.end_of_epoch(epoch + 1)):
        if _evidence_is_due(run, epoch + 1, step):
            state = _evidence_step(run, state, journal, step)
        indices = run.plan.indices(run.config.seed, step)
        images = run.data.train.images[indices]
        if run.config.data.augment and not polishing:
            images = augment(images, np.random.default_rng((run.config.seed, step)))
        state = take_step(state, images, run.data.train.labels[indices], run.key_drop_path)
        journal.step = step + 1
        in_flight.append(state)
        if len(in_flight) > STEPS_IN_FLIGHT:
            arrived = jax.block_until_ready(in_flight.popleft())
            display.step(journal.step, arrived.sums, run.plan.batch_size)
        if interrupted():
            break
    jax.block_until_ready(state)
    journal.epoch_seconds = time.monotonic() - started
    return state


def _evidence_is_due(run: _Run, epoch: int, step: int) -> bool:
    """Whether the gradient of the log-determinant is computed before a step."""
    if run.config.prior.update != "joint" or not run.window.contains(epoch):
        return False
    return (step - run.plan.end_of_epoch(run.window.first - 1)) % run.window.every == 0


def _evidence_step(run: _Run, state: TrainState, journal: Journal, step: int) -> TrainState:
    jax.block_until_ready(state)
    started = time.monotonic()
    # `training.train.evidence` says why the weights wait until their function is the one that is expanded.
    moves_weights = step >= run.plan.train_steps or not jax.tree.leaves(state.batch_stats)
    state = jax.block_until_ready(run.evidence.joint(state, step, moves_weights))
    journal.evidence_seconds += time.monotonic() - started
    return state


def _end_epoch(run: _Run, state: TrainState, journal: Journal) -> TrainState:
    """Evaluate and record a complete epoch. Freeze the network at the end of phase "train", and update the prior."""
    started, epoch = time.monotonic(), len(journal.history) + 1
    end_of_phase = journal.step in (run.plan.train_steps, run.plan.total_steps)
    loss, correct, steps, norm = (np.asarray(total).item() for total in state.sums)
    if epoch == run.plan.epochs:
        state = _freeze(run, state)
    nll, accuracy = evaluate(run.passes, state.params, state.batch_stats, _batches(run, run.data.validation))
    gradient_norm = None
    if end_of_phase:
        gradient_norm, journal.prior_gradient_norm = _joint_gradient(run, state)
        journal.gradient_norm = gradient_norm
    record = {
        "epoch": epoch,
        "phase": "train" if epoch <= run.plan.epochs else "polish",
        "loss": loss / steps,
        "accuracy": correct / (steps * run.plan.batch_size),
        "validation_nll": nll,
        "validation_accuracy": accuracy,
        "prior_precision": geometric_mean(state.prior_precision, state.params),
        "prior_precision_by_layer": by_layer_or_none(state.prior_precision),
        "learning_rate": run.steps.learning_rate(journal.step - 1),
        "gradient_norm": gradient_norm,
        "step_gradient_norm": norm,
    }
    took = time.monotonic()
    num_evidence, state = _end_of_evidence(run, state, epoch, record)
    journal.evidence_seconds += time.monotonic() - took if run.config.prior.update == "online" else 0.0
    record["seconds"] = round(journal.epoch_seconds + time.monotonic() - started, 3)
    record["seconds_per_step"] = (journal.epoch_seconds - _in_steps(run, journal)) / max(steps, 1)
    record["seconds_per_evidence_step"] = journal.evidence_seconds / num_evidence if num_evidence else None
    journal.history.append(record)
    journal.epoch_seconds = journal.evidence_seconds = 0.0
    append_log(run.workdir, record)
    return state._replace(sums=no_sums(), evidence=without_sums(state.evidence))


def _in_steps(run: _Run, journal: Journal) -> float:
    """Seconds of evidence steps that the seconds of an epoch's steps contain."""
    return journal.evidence_seconds if run.config.prior.update == "joint" else 0.0


def _freeze(run: _Run, state: TrainState) -> TrainState:
    def batches() -> Iterator[tuple[np.ndarray, float]]:
        return weighted_batches(run.data.train.images, run.plan.batch_size)

    batch_stats = population_statistics(run.moments, state.params, state.batch_stats, batches)
    frozen = frozen_state(state, batch_stats, run.config.optimizer)
    return frozen._replace(evidence=forgotten(frozen.evidence))


def _end_of_evidence(run: _Run, state: TrainState, epoch: int, record: dict[str, Any]) -> tuple[int, TrainState]:
    """Record the evidence of an epoch. If an online update is due, make it. Return how often it was computed."""
    record |= dict.fromkeys(
        ("log_evidence", "log_evidence_sem", "log_evidence_diagonal", "log_determinant_gradient_norm")
    )
    if evidence := state.evidence:
        record["log_determinant_gradient_norm"] = norm_of(evidence.held[0])
        count = int(evidence.count)
        if count:
            record["log_evidence"] = float(evidence.mean)
        if count > 1:
            record["log_evidence_sem"] = math.sqrt(float(evidence.squares) / (count - 1) / count)
        return count, state
    is_online = run.config.prior.update == "online" and run.window.contains(epoch)
    if not is_online or epoch % run.window.every:
        return 0, state
    state, evidence, of_diagonal = run.evidence.online(state, epoch)
    sem = float(evidence.sem)
    record |= {"log_evidence": float(evidence.mean), "log_evidence_sem": sem if math.isfinite(sem) else None}
    record["log_evidence_diagonal"] = None if of_diagonal is None else float(of_diagonal)
    return 1, state


def _batches(run: _Run, split: Split) -> Batches:
    return fixed_order(split, run.plan.batch_size)


def _joint_gradient(run: _Run, state: TrainState) -> JointGradient:
    batches = _batches(run, run.data.train)
    return joint_gradient(run.passes, state.params, state.batch_stats, state.prior_precision, batches)


def _require_finite(run: _Run, state: TrainState) -> None:
    bad_step = int(state.bad_step)
    if bad_step >= 0:
        kept = list_steps(run.workdir / "train")
        more = {"joint": ", --prior.learning-rate", "online": ", another --prior.precision"}.get(
            run.config.prior.update, ""
        )
        last = f"the last good checkpoint is {kept[-1]}" if kept else "no checkpoint had been written yet"
        raise UserError(
            f"loss, evidence and gradients must stay finite; they did not at step {bad_step + 1} of "
            f"{run.plan.total_steps}; use a smaller --optimizer.learning-rate or --optimizer.clip-norm{more} in "
            f"another --workdir ({last})"
        )


def _save(run: _Run, state: TrainState, journal: Journal) -> Path:
    return save_progress(run.workdir, state, journal, run.config, finished=journal.step == run.plan.total_steps)


def _checkpoint_is_due(plan: Plan, journal: Journal, seconds: float) -> bool:
    """Say whether to write a checkpoint: at the end, and at most ten times before, no two within ten seconds."""
    every = -(-plan.total_epochs // CHECKPOINTS)
    regular = len(journal.history) % every == 0 and seconds >= CHECKPOINT_SECONDS
    return regular or journal.step == plan.total_steps


def _say(run: _Run, message: str) -> None:
    run.console.print(message, markup=False, highlight=False, soft_wrap=True)
