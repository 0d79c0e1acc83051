"""The progress of a run: a live bar on a terminal, a few plain lines elsewhere."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.train.step import EpochSums

PLAIN_LINES = 10
SECONDS_BETWEEN_UPDATES = 0.25


class Display(NamedTuple):
    """The functions that the loop calls to report."""

    step: Callable[[int, EpochSums, int], None]
    """Called after a step: steps done, sums over the epoch so far (computed, not pending), and images per step."""
    epoch: Callable[[dict[str, Any]], None]
    """Called after an epoch, with its record."""


@contextmanager
def show(console: Console, steps_done: int, total_steps: int, total_epochs: int) -> Iterator[Display]:
    """Show the progress of a run within the block."""
    if not console.is_terminal:
        every = -(-total_epochs // PLAIN_LINES)

        def line(record: dict[str, Any]) -> None:
            if record["epoch"] % every == 0 or record["epoch"] == total_epochs:
                text = f"epoch {record['epoch']}/{total_epochs} ({record['phase']}): {_numbers(record)}"
                console.print(text, highlight=False, soft_wrap=True)

        yield Display(lambda done, sums, batch_size: None, line)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("loss {task.fields[loss]:.4f}  accuracy {task.fields[accuracy]:.3f}"),
        TextColumn("{task.fields[validation]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, refresh_per_second=1 / SECONDS_BETWEEN_UPDATES) as progress:
        task = progress.add_task(
            "train", total=total_steps, completed=steps_done, loss=float("nan"), accuracy=float("nan"), validation=""
        )

        shown_at = 0.0

        def step(done: int, sums: EpochSums, batch_size: int) -> None:
            nonlocal shown_at
            if time.monotonic() - shown_at < SECONDS_BETWEEN_UPDATES:
                return
            shown_at = time.monotonic()
            loss, correct, steps, _ = (np.asarray(total).item() for total in sums)
            progress.update(task, completed=done, loss=loss / steps, accuracy=correct / (steps * batch_size))

        def epoch(record: dict[str, Any]) -> None:
            validation = f"validation {record['validation_accuracy']:.3f}  {prior_and_evidence(record)}"
            description = f"{record['phase']} {record['epoch']}/{total_epochs}"
            progress.update(task, description=description, validation=validation)

        yield Display(step, epoch)


def _numbers(record: dict[str, Any]) -> str:
    return (
        f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.3f}, validation NLL {record['validation_nll']:.4f}, "
        f"validation accuracy {record['validation_accuracy']:.3f}, {prior_and_evidence(record)}, "
        f"gradient norm {record['step_gradient_norm']:.3g}, {1e3 * record['seconds_per_step']:.3g} ms a step"
    )


def prior_and_evidence(record: dict[str, Any]) -> str:
    """Say what the prior precision is, by layer the smallest and the largest, and the log evidence with its error."""
    text = f"prior precision {record['prior_precision']:.3g}"
    if by_layer := record["prior_precision_by_layer"]:
        text += f" (geometric mean; layers {min(by_layer.values()):.3g} to {max(by_layer.values()):.3g})"
    if record["log_evidence"] is None:
        return text
    sem = record["log_evidence_sem"]
    return f"{text}, log evidence {record['log_evidence']:.1f}" + ("" if sem is None else f" +- {sem:.1f}")
