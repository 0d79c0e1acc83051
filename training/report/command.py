"""The command that runs a configuration again: the options that differ from the settings that it starts from."""

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from training.cli.arguments import DEFAULT_CONFIG, ROOT, load_config
from training.config import Config
from training.data.load import with_statistics
from training.errors import UserError
from training.settings import flattened

_WORKDIR = "checkpoints/again"


def command_of(config: Config, images: np.ndarray) -> list[str]:
    """Return the words to type to have a run again, in another work directory.

    Parameters
    ----------
    config
        The settings of the run, with its pixel statistics. They become options if they are not those of its images.
    images
        The training images.
    """
    start, own = _start(), flattened(dataclasses.asdict(config))
    measured = with_statistics(dataclasses.replace(config.data, mean=None, std=None), images)
    for name in ("mean", "std"):
        if getattr(config.data, name) == getattr(measured, name):
            own[f"data.{name}"] = None
    options = [part for name, value in own.items() if value != start[name] for part in _option(name, value)]
    return ["python", "-m", "training.fit_van", "--workdir", _WORKDIR, *options]


def for_shell(words: Sequence[str]) -> str:
    """Write the words of a command as a shell takes them, with a line for each option."""
    lines: list[list[str]] = [[]]
    for word in words:
        if word.startswith("--"):
            lines.append([])
        lines[-1].append(word)
    return " \\\n    ".join(shlex.join(line) for line in lines)


def _start() -> dict[str, Any]:
    """The settings of a command without options."""
    try:
        config = load_config(ROOT / DEFAULT_CONFIG)
    except UserError:  # The file is being edited: the defaults are the nearest that is known.
        config = Config()
    return flattened(dataclasses.asdict(config))


def _option(name: str, value: Any) -> Iterator[str]:
    """The words of one option."""
    *sections, field = name.replace("_", "-").split(".")
    if isinstance(value, bool):
        yield "--" + ".".join([*sections, field if value else f"no-{field}"])
        return
    yield f"--{'.'.join([*sections, field])}"
    yield from map(str, value if isinstance(value, tuple) else [value])
