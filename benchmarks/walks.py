"""How many files does a call walk through, and how often does it change from one to another?

    python benchmarks/walks.py

A reader who follows a call opens each file that it enters, and looks for the place again after each move. Counted are
the files of this project that a call enters, and its moves: consecutive calls of functions of the project whose files
differ. Every walk starts with empty caches, so that functions which JAX compiles are called, too:

1. `la.log_marginal_likelihood(2.0)` of a fitted Laplace, with one prior precision, and with one for each weight.
2. `Laplace.fit(data)` for "lanczos" and "diag".
3. One training image through `training.fit_van` with the default experiment: from the images that `load` returns to the
   first loss, with everything that is prepared on the way, and in the first step alone.

For the first it is also counted how often the prior is resolved. Prints a table and writes
`benchmarks/results/walks.json`, with the files of each walk in the order in which they are entered.
"""

import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from record import ROOT, console, write
from rich.console import Console
from rich.table import Table

import bnnlaplace
from training import fit_van

PACKAGES = ("bnnlaplace", "training")
Function = tuple[str, str]  # its file and its name


class Walk(NamedTuple):
    """The functions of this project that one call enters.

    Attributes
    ----------
    calls
        The functions in order, each as often as it is called.
    """

    calls: list[Function]

    @property
    def files(self) -> list[str]:
        """The files in the order in which they are first entered."""
        return list(dict.fromkeys(file for file, _ in self.calls))

    @property
    def moves(self) -> int:
        """How often a call is in another file than the call before it."""
        files = [file for file, _ in self.calls]
        return sum(before != after for before, after in zip(files[:-1], files[1:], strict=True))


def walk(call: Callable[[], Any], start: Function | None = None, stop: Function | None = None) -> Walk:
    """Record the functions of this project that are entered while `call` runs in this thread.

    With `start` the walk begins when that function returns, and with `stop` it ends when that one does, and `call` too.
    """
    calls: list[Function] = []
    roots = tuple(f"{ROOT / package}/" for package in PACKAGES)
    is_recording = start is None

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal is_recording
        code = frame.f_code
        # What runs when a module is imported is not part of a walk.
        if not code.co_filename.startswith(roots) or code.co_name == "<module>":
            return
        function = str(Path(code.co_filename).relative_to(ROOT)), code.co_name
        if event == "call" and is_recording:
            calls.append(function)
        elif event == "return" and function == start:
            is_recording = True
        elif event == "return" and function == stop and is_recording:
            raise _Arrived

    jax.clear_caches()
    sys.setprofile(profile)
    try:
        call()
    except _Arrived:
        pass
    finally:
        sys.setprofile(None)
    return Walk(calls)


class _Arrived(BaseException):
    """A walk has reached its end, and the rest of the program is not needed."""


def small_problem() -> tuple[bnnlaplace.Network, tuple[np.ndarray, np.ndarray]]:
    """A function network with two layers, and data of three classes."""
    rng = np.random.default_rng(0)
    params = {
        "w1": jnp.asarray(rng.normal(size=(4, 6)), jnp.float32),
        "w2": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32),
    }
    network = bnnlaplace.Network.from_function(lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"], params)
    return network, (rng.normal(size=(20, 4)).astype(np.float32), rng.integers(0, 3, 20))


def evidence_walks() -> dict[str, Walk]:
    """Walk from a number for the prior precision to the evidence."""
    network, data = small_problem()
    for_each_weight = jax.tree.map(lambda leaf: np.linspace(0.5, 2.0, leaf.size).reshape(leaf.shape), network.params)
    walks = {}
    for name, precision in (("one prior precision", 1.0), ("one for each weight", for_each_weight)):
        la = bnnlaplace.Laplace(network, "classification", hessian_structure="diag", prior_precision=precision)
        la = la.fit(data)
        walks[f"log_marginal_likelihood(2.0), {name}"] = walk(lambda la=la: la.log_marginal_likelihood(2.0))
    return walks


def fit_walks() -> dict[str, Walk]:
    """Walk from data to a fitted Laplace."""
    network, data = small_problem()
    walks = {}
    for structure, options in (("lanczos", {"key": jax.random.key(0), "num_probes": 4}), ("diag", {})):
        la = bnnlaplace.Laplace(network, "classification", hessian_structure=structure)
        walks[f"fit(data), {structure}"] = walk(lambda la=la, options=options: la.fit(data, **options))
    return walks


def image_walks() -> dict[str, Walk]:
    """Walk from the loaded images, or from a batch of them, to the loss of the first training step."""
    starts = {
        "fit_van, loaded images to the first loss": ("training/data/load.py", "load"),
        "fit_van, a training step": ("training/train/progress.py", "show"),  # the last thing before the first step
    }
    walks = {}
    for name, start in starts.items():
        with tempfile.TemporaryDirectory() as directory:
            walks[name] = walk(
                lambda directory=directory: fit_van.fit(["--workdir", f"{directory}/run"], Console(quiet=True)),
                start=start,
                stop=("training/train/step.py", "train"),
            )
    return walks


def main() -> None:
    """Record all walks, print and write."""
    # The networks are not trained.
    warnings.simplefilter("ignore", bnnlaplace.NotAModeWarning)
    walks = evidence_walks() | fit_walks() | image_walks()
    table = Table("walk", "files", "moves", "prior resolved", title="Walks through the project", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {}
    for name, steps in walks.items():
        resolved = steps.calls.count(("bnnlaplace/prior/gaussian.py", "resolve"))
        rows[name] = {"files": len(steps.files), "moves": steps.moves, "resolved": resolved, "order": steps.files}
        table.add_row(name, str(len(steps.files)), str(steps.moves), str(resolved))
    console.print(table)
    write("walks", {"walks": rows})


if __name__ == "__main__":
    main()
