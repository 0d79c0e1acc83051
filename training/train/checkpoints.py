"""The files of a training run in its work directory, and how they are read again.

::

    workdir/train/step_XXXXXXXX/   the state after a step, with the journal as metadata
    workdir/log.jsonl              the history of the journal, one record for each epoch

The newest two step checkpoints are kept, and a resumed run starts from the newest good one. Each records the settings
of the run and their digest, and is refused beside a config.json of others.
"""

import dataclasses
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bnnlaplace.checkpoint import CheckpointError, find_damage, load_pytree, save_pytree, write_text
from training import settings
from training.config import Config
from training.errors import UserError
from training.train.prior import by_layer_or_none, geometric_mean
from training.train.step import TrainState
from training.workdir import continue_command

LOG_FILE = "log.jsonl"
KEPT = 2

_NAME = re.compile(r"step_(\d{8})")


class TrainResult(NamedTuple):
    """A trained network and the record of its training."""

    params: Any
    batch_stats: Any
    prior_precision: float
    """The precision of training, or its geometric mean over the weights if every layer has its own."""
    history: list[dict[str, Any]]
    """For each epoch: epoch, phase, loss, accuracy, validation_nll, validation_accuracy, prior_precision (during the
    epoch; a geometric mean if every layer has its own), prior_precision_by_layer (None for a scalar), log_evidence and
    log_evidence_sem (nats; None without an evidence step), learning_rate (of its last step), gradient_norm (of the log
    joint over all images, at the end of each phase; otherwise None), step_gradient_norm (of the last step, in nats) and
    log_determinant_gradient_norm (of the part of the log-determinant; None unless joint), seconds, seconds_per_step and
    seconds_per_evidence_step."""
    joint_gradient_norm: float
    """Norm of the gradient of log p(D, theta), in nats per unit of weight."""
    joint_gradient_to_prior: float
    """That norm divided by the norm of the gradient of the prior alone, prior_precision * |theta|."""
    prior_precision_by_layer: dict[str, float] | None = None
    """The precision of each layer; None if all weights have the same."""

    @property
    def prior(self) -> float | dict[str, float]:
        """The prior precision of training as `Laplace` takes it."""
        return self.prior_precision if self.prior_precision_by_layer is None else self.prior_precision_by_layer


@dataclasses.dataclass
class Journal:
    """What a run remembers beside its arrays, all of it as JSON."""

    step: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    epoch_seconds: float = 0.0
    """Seconds spent on the present epoch so far."""
    evidence_seconds: float = 0.0
    """Of these, seconds spent on evidence steps."""
    gradient_norm: float = math.nan
    prior_gradient_norm: float = math.nan


def result_of(state: TrainState, journal: Journal) -> TrainResult:
    """Make the result of a finished run."""
    return TrainResult(
        params=state.params,
        batch_stats=state.batch_stats,
        prior_precision=geometric_mean(state.prior_precision, state.params),
        history=journal.history,
        joint_gradient_norm=journal.gradient_norm,
        joint_gradient_to_prior=journal.gradient_norm / journal.prior_gradient_norm,
        prior_precision_by_layer=by_layer_or_none(state.prior_precision),
    )


def seconds_of(result: TrainResult) -> float:
    """Sum the wall-clock seconds of all epochs, over all starts of the run. Repeated steps count once."""
    return sum(record["seconds"] for record in result.history)


def load_trained(
    workdir: Path, config: Config | None = None, report: Callable[[str], None] = lambda message: None
) -> TrainResult:
    """Read the result of a finished training from its work directory. The arrays are NumPy arrays.

    If a config is given, the settings that the checkpoint records are compared with it. `report` is told in one line if
    it records none.

    Raises
    ------
    UserError
        There is no training, it is not finished, it had other settings, or a file is damaged. The message names the
        file.
    """
    checkpoints = list_steps(workdir / "train")
    if not checkpoints:
        raise UserError(f"{workdir} must hold a trained network; it holds none; train it with training.fit_van")
    try:
        tree, metadata = load_pytree(checkpoints[-1])
        journal, finished = _journal(checkpoints[-1], metadata), metadata["finished"]
    except (CheckpointError, OSError) as error:
        raise UserError(f"{error}; or train its last steps again: {continue_command(workdir)}") from None
    if config is not None:
        _require_settings(checkpoints[-1], metadata, config, report)
    if not finished:
        raise UserError(
            f"the training in {workdir} must be finished; it is not; finish it: {continue_command(workdir)}"
        )
    # The file has no containers without leaves, such as the statistics of a network without normalisation.
    parts = {"batch_stats": {}, "evidence": (), **tree} if isinstance(tree, dict) else {}
    if parts.keys() != set(TrainState._fields):
        raise UserError(
            f"{checkpoints[-1]} must hold the state of a training; got {', '.join(parts) or 'another tree'}"
        )
    return result_of(TrainState(**parts), journal)


def save_progress(workdir: Path, state: TrainState, journal: Journal, config: Config, finished: bool) -> Path:
    """Write a step checkpoint."""
    metadata = {
        "finished": finished,
        "journal": dataclasses.asdict(journal),
        "settings": settings.record(config),
    }
    return save_step(workdir / "train", journal.step, state, metadata)


def load_progress(
    workdir: Path, like: TrainState, config: Config, report: Callable[[str], None]
) -> tuple[TrainState, Journal, bool] | None:
    """Read the newest good step checkpoint: state, journal, and whether the training is finished."""
    newest = load_newest(workdir / "train", like, report=report)
    if newest is None:
        return None
    path, state, metadata = newest
    _require_settings(path, metadata, config, report)
    return state, _journal(path, metadata), metadata["finished"]


def _require_settings(path: Path, metadata: dict[str, Any], config: Config, report: Callable[[str], None]) -> None:
    settings.require_recorded(metadata.get("settings"), config, path, curvature=False, report=report)


def _journal(path: Path, metadata: Any) -> Journal:
    """Make the journal of a checkpoint. Fields that only earlier releases had are left out.

    Raises
    ------
    CheckpointError
        The metadata are not those of a step.
    """
    known = {field.name for field in dataclasses.fields(Journal)}
    try:
        journal = Journal(**{name: value for name, value in metadata["journal"].items() if name in known})
        valid = (
            isinstance(metadata["finished"], bool)
            and isinstance(journal.step, int)
            and journal.step == int(_NAME.fullmatch(path.name)[1])
            and all(isinstance(record["seconds"], float) for record in journal.history)
            and all(
                isinstance(number, float | int)
                for number in (
                    journal.epoch_seconds,
                    journal.evidence_seconds,
                    journal.gradient_norm,
                    journal.prior_gradient_norm,
                )
            )
        )
    except (KeyError, TypeError, AttributeError, ValueError):
        valid = False
    if not valid:
        raise CheckpointError(f"the metadata of {path} must be those of a step as it was saved; they are not")
    return journal


def rewrite_log(workdir: Path, history: list[dict[str, Any]]) -> None:
    """Make the log hold these records and no others."""
    write_text(workdir / LOG_FILE, "".join(_line(record) for record in history))


def append_log(workdir: Path, record: dict[str, Any]) -> None:
    """Add the record of an epoch to the log."""
    with (workdir / LOG_FILE).open("a") as log:
        log.write(_line(record))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record) + "\n"


def save_step(directory: Path, step: int, tree: Any, metadata: dict[str, Any]) -> Path:
    """Write the checkpoint of a step. Then remove all but the newest two, and the remains of saves that were killed.

    Only one run at a time may write to a directory.
    """
    path = directory / f"step_{step:08d}"
    save_pytree(path, tree, metadata)
    for old in list_steps(directory)[:-KEPT]:
        shutil.rmtree(old)
    for remains in directory.glob(".step_*"):
        shutil.rmtree(remains)
    return path


def list_steps(directory: Path) -> list[Path]:
    """List the step checkpoints of a directory, oldest first, good or not."""
    entries = directory.iterdir() if directory.exists() else ()
    return sorted(path for path in entries if _NAME.fullmatch(path.name))


def load_newest(
    directory: Path, like: Any, *, report: Callable[[str], None]
) -> tuple[Path, Any, dict[str, Any]] | None:
    """Read the newest step checkpoint whose files are all as they were saved.

    A damaged checkpoint is renamed to `step_XXXXXXXX.damaged`. `report` is told which file is at fault and where the
    run continues.

    Returns
    -------
    tuple or None
        The path, the tree and the metadata. If there is no checkpoint at all: None.

    Raises
    ------
    UserError
        There are checkpoints, but none is good. Or the newest good one has another structure than `like`.
    """
    damaged: list[str] = []
    for path in reversed(list_steps(directory)):
        try:
            _, metadata = load_pytree(path)
            _journal(path, metadata)
        except (CheckpointError, OSError) as error:
            fault = find_damage(path) or error
            damaged.append(f"{fault} (set aside as {_set_aside(path).name})")
            continue
        for damage in damaged:
            report(f"damaged checkpoint: {damage}; falling back to {path.name}")
        try:
            return path, load_pytree(path, like)[0], metadata  # The files are good: what differs is the network.
        except CheckpointError as error:
            raise UserError(str(error)) from None
    if damaged:
        raise UserError(f"{directory} must hold a good checkpoint; {damaged[0]}; start again in another --workdir")
    return None


def _set_aside(path: Path) -> Path:
    """Rename a damaged checkpoint, whatever it is, to a name that no checkpoint has. If that fails: leave it."""
    aside, number = path.with_name(f"{path.name}.damaged"), 2
    while os.path.lexists(aside):
        aside, number = path.with_name(f"{path.name}.damaged{number}"), number + 1
    try:
        path.rename(aside)
    except OSError:
        return path
    return aside
