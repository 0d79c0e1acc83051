"""The files of a training run in its work directory, and how they are read again.

::

    workdir/train/step_XXXXXXXX/   the state after a step, with the journal as metadata
    workdir/log.jsonl              the history of the journal, one record for each epoch

The newest two step checkpoints are kept, and a resumed run starts from the newest good one.
"""

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from bnnlaplace.checkpoint import CheckpointError, find_damage, load_pytree, save_pytree, write_text
from training.errors import UserError
from training.train.step import TrainState

LOG_FILE = "log.jsonl"
KEPT = 2

_NAME = re.compile(r"step_(\d{8})")


class TrainResult(NamedTuple):
    """A trained network and the record of its training."""

    params: Any
    batch_stats: Any
    prior_precision: float
    history: list[dict[str, Any]]
    """For each epoch: epoch, phase, loss, accuracy, validation_nll, validation_accuracy, prior_precision (during the
    epoch), learning_rate (of its last step), gradient_norm (of the log joint, at the end of each phase; otherwise
    None), seconds."""
    joint_gradient_norm: float
    """Norm of the gradient of log p(D, theta), in nats per unit of weight."""
    joint_gradient_to_prior: float
    """That norm divided by the norm of the gradient of the prior alone, prior_precision * |theta|."""


@dataclasses.dataclass
class Journal:
    """What a run remembers beside its arrays, all of it as JSON."""

    step: int = 0
    history: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    epoch_seconds: float = 0.0
    """Seconds spent on the present epoch so far."""
    gradient_norm: float = math.nan
    prior_gradient_norm: float = math.nan


def result_of(state: TrainState, journal: Journal) -> TrainResult:
    """Make the result of a finished run."""
    return TrainResult(
        params=state.params,
        batch_stats=state.batch_stats,
        prior_precision=float(state.prior_precision),
        history=journal.history,
        joint_gradient_norm=journal.gradient_norm,
        joint_gradient_to_prior=journal.gradient_norm / journal.prior_gradient_norm,
    )


def seconds_of(result: TrainResult) -> float:
    """Sum the wall-clock seconds of all epochs, over all starts of the run. Repeated steps count once."""
    return sum(record["seconds"] for record in result.history)


def load_trained(workdir: Path) -> TrainResult:
    """Read the result of a finished training from its work directory. The arrays are NumPy arrays.

    Raises
    ------
    UserError
        There is no training, it is not finished, or a file is damaged. The message names the file.
    """
    checkpoints = list_steps(workdir / "train")
    if not checkpoints:
        raise UserError(f"{workdir} must hold a trained network; it holds none; train it with training.fit_van")
    try:
        tree, metadata = load_pytree(checkpoints[-1])
    except CheckpointError as error:
        raise UserError(f"{error}, or train its last steps again with --resume") from None
    if not metadata["finished"]:
        raise UserError(f"the training in {workdir} must be finished; it is not; finish it with --resume")
    # The file has no containers without leaves, such as the statistics of a network without normalisation.
    tree.setdefault("batch_stats", {})
    return result_of(TrainState(**tree), _journal(metadata))


def save_progress(workdir: Path, state: TrainState, journal: Journal, finished: bool) -> Path:
    """Write a step checkpoint."""
    metadata = {"finished": finished, "journal": dataclasses.asdict(journal)}
    return save_step(workdir / "train", journal.step, state, metadata)


def load_progress(
    workdir: Path, like: TrainState, report: Callable[[str], None]
) -> tuple[TrainState, Journal, bool] | None:
    """Read the newest good step checkpoint: state, journal, and whether the training is finished."""
    newest = load_newest(workdir / "train", like, report=report)
    if newest is None:
        return None
    state, metadata = newest
    return state, _journal(metadata), metadata["finished"]


def _journal(metadata: dict[str, Any]) -> Journal:
    """Make the journal of a checkpoint. Fields that only earlier releases had are left out."""
    known = {field.name for field in dataclasses.fields(Journal)}
    return Journal(**{name: value for name, value in metadata["journal"].items() if name in known})


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
    directory: Path, like: Any = None, *, report: Callable[[str], None]
) -> tuple[Any, dict[str, Any]] | None:
    """Read the newest step checkpoint whose files are all as they were saved.

    A damaged checkpoint is renamed to `step_XXXXXXXX.damaged`. `report` is told which file is at fault and where the
    run continues.

    Returns
    -------
    tuple or None
        The tree and the metadata. If there is no checkpoint at all: None.

    Raises
    ------
    UserError
        There are checkpoints, but none is good. Or the newest good one has another structure than `like`.
    """
    damaged: list[str] = []
    for path in reversed(list_steps(directory)):
        if damage := find_damage(path):
            aside = path.with_name(f"{path.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            damaged.append(f"{damage} (set aside as {aside.name})")
            continue
        for damage in damaged:
            report(f"damaged checkpoint: {damage}; falling back to {path.name}")
        try:
            return load_pytree(path, like)
        except CheckpointError as error:
            raise UserError(str(error)) from None
    if damaged:
        raise UserError(f"{directory} must hold a good checkpoint; {damaged[0]}; start again in another --workdir")
    return None
