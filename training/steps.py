"""The step checkpoints of a run, `train/step_XXXXXXXX`: the newest two are kept, and the newest good one is resumed."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnnlaplace.checkpoint import CheckpointError, find_damage, load_pytree, save_pytree
from training.errors import UserError

KEPT = 2

_NAME = re.compile(r"step_(\d{8})")


def save_step(directory: Path, step: int, tree: Any, metadata: dict[str, Any]) -> Path:
    """Write the checkpoint of a step, then remove what it supersedes: all but the newest two, and the remains of
    saves that were killed. One run at a time writes to a directory."""
    path = directory / f"step_{step:08d}"
    save_pytree(path, tree, metadata)
    for old in list_steps(directory)[:-KEPT]:
        shutil.rmtree(old)
    for remains in directory.glob(".step_*"):
        shutil.rmtree(remains)
    return path


def list_steps(directory: Path) -> list[Path]:
    """The step checkpoints there are, oldest first, good or not."""
    found = directory.iterdir() if directory.exists() else ()
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def load_newest(
    directory: Path, like: Any = None, *, report: Callable[[str], None]
) -> tuple[Any, dict[str, Any]] | None:
    """Read the newest step checkpoint whose files are all as they were saved.

    A damaged one is set aside as `step_XXXXXXXX.damaged`, and `report` is told which file is at fault and where the
    run continues.

    Returns
    -------
    (tree, metadata), or None where there is no checkpoint at all.

    Raises
    ------
    UserError
        There are checkpoints but not one good one; or the newest good one has another structure than `like`.
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
