"""A process that has imported the programs and runs each job in a fork of itself: start-up is paid once.

It reads jobs from stdin, one JSON object a line, and answers each with its process, and then with its exit status and
the time. The images and the network are tiny, every epoch writes a checkpoint, and the report has one figure. All else
is the programs as they are.
"""

import io
import json
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from bnnlaplace import plots
from training import evaluate, fit_van, posteriors
from training.cli import program
from training.models.van import Normalise
from training.report import evaluation, html
from training.train import checkpoints, loop
from training.train.batches import Plan

PROGRAMS = {"fit_van": fit_van, "evaluate": evaluate}
SIZES = {"train": 24, "validation": 12, "test": 12}


class Network(nn.Module):
    """One layer before and one after a normalisation: all that the loop distinguishes."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = Normalise(self.mean, self.std)(images).reshape(len(images), -1)
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(3)(nn.tanh(x))


class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Squares of three shades of grey."""

    VERSION = tfds.core.Version("1.0.0")
    name = "tiny"

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(4, 4, 1)),
            "label": tfds.features.ClassLabel(names=["a", "b", "c"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {split: self._generate_examples(split) for split in SIZES}

    def _generate_examples(self, split: str) -> Iterator[tuple[int, dict[str, Any]]]:
        rng = np.random.default_rng(list(SIZES).index(split))
        for index in range(SIZES[split]):
            encoded = io.BytesIO()
            pixels = rng.integers(0, 150, (4, 4)) + 50 * (index % 3)
            Image.fromarray(pixels.astype(np.uint8)).save(encoded, format="PNG")
            yield index, {"image": encoded.getvalue(), "label": index % 3}


def make_tiny() -> None:
    """Let the programs use the tiny network, and keep a checkpoint of every epoch."""
    fit_van.van.from_config = lambda config, num_classes: Network(config.data.mean, config.data.std)
    loop.CHECKPOINT_SECONDS = 0.0
    use_compilation_cache = program.use_compilation_cache

    def use_it_for_all() -> None:
        use_compilation_cache()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    program.use_compilation_cache = use_it_for_all
    html.draw_figures = lambda results: {"training": plots.training_curve(results.history)}


# --- signals at a phase ---------------------------------------------------------------------------------------------

PHASES: dict[str, tuple[Any, str]] = {
    "data": (fit_van, "load"),
    "training": (Plan, "indices"),
    "checkpoint": (checkpoints, "save_pytree"),
    "fitting": (posteriors.Laplace, "fit"),
    "curves": (evaluation, "precision_curve"),
    "evaluation": (evaluation.link, "monte_carlo_double"),
    "figures": (html, "draw_figures"),
    "report": (html, "render_report"),
}
"""For each phase a function that runs in it."""


def send_at(phase: str, call: int, signals: list[int], stuck: float, told: Path) -> None:
    """Send signals in a call of the function of a phase, which may be stuck for some seconds then."""
    owner, name = PHASES[phase]
    original: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def send(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            told.write_text(str(time.time()))
            for number in signals:
                os.kill(os.getpid(), number)
                time.sleep(0.05)
            time.sleep(stuck)
        return original(*args, **options)

    setattr(owner, name, send)


# --- jobs -----------------------------------------------------------------------------------------------------------


def child(job: dict[str, Any]) -> int:
    """Run a program with its output in files."""
    for descriptor, name in ((1, "out"), (2, "err")):
        file = os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    make_tiny()
    if "send" in job:
        send_at(**{**job["send"], "told": Path(job["send"]["told"])})
    if "largest_file" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["largest_file"], resource.RLIM_INFINITY))
    if "memory" in job:  # the library's own check, at the first fit
        posteriors.Laplace.fit = _no_memory
    return PROGRAMS[job["program"]].main(job["argv"])


def _no_memory(*args: Any, **options: Any) -> None:
    from bnnlaplace.core.memory import MemoryEstimate

    MemoryEstimate(needed=10**12, free=10**9, shrink="use fewer max_vectors").check()


def main() -> None:
    """Answer jobs until stdin ends."""
    warnings.simplefilter("ignore", RuntimeWarning)  # JAX warns of forks; its backend starts in the children alone.
    print("ready", flush=True)
    for line in sys.stdin:
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            status = 70
            try:
                status = child(json.loads(line))
                sys.stdout.flush()
            except BaseException:
                import traceback

                traceback.print_exc()
            finally:
                os._exit(status)
        print(pid, flush=True)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(code, time.time(), flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["prepare"]:  # In a process of its own: it starts threads, which a fork would lose.
        Tiny(data_dir=os.environ["TFDS_DATA_DIR"], file_format="array_record").download_and_prepare()
    else:
        main()
