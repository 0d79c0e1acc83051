"""How many files does a call walk through, and how often does it change from one to another?

    python benchmarks/walks.py

A reader who follows a call opens each file that it enters, and looks for the place again after each move. Counted are
the files of this project that a call enters, and its moves: consecutive calls of functions of the project whose files
differ. Every walk starts with empty caches, so that functions which JAX compiles are called, too:

1. `la.log_marginal_likelihood(2.0)` of a fitted Laplace, with one prior precision, and with one for each weight.
2. `Laplace.fit(data)` for "lanczos" and "diag".
3. One training image through `training.fit_van`: from the images that `load` returns to the loss of the first step.

For the first it is also counted how often the prior is resolved. Prints a table and writes
`benchmarks/results/walks.json`, with the files of each walk in the order in which they are entered.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from record import ROOT, console, write
from rich.table import Table

import bnnlaplace

PACKAGES = ("bnnlaplace", "training")


class Walk(NamedTuple):
    """The calls of functions of this project that one call makes.

    Attributes
    ----------
    calls
        File and function of each, in order.
    """

    calls: list[tuple[str, str]]

    @property
    def files(self) -> list[str]:
        """The files in the order in which they are first entered."""
        return list(dict.fromkeys(file for file, _ in self.calls))

    @property
    def moves(self) -> int:
        """How often a call is in another file than the call before it."""
        files = [file for file, _ in self.calls]
        return sum(before != after for before, after in zip(files[:-1], files[1:], strict=True))

    def count(self, file: str, function: str) -> int:
        """How often a function is called."""
        return self.calls.count((file, function))


def walk(call: Callable[[], Any]) -> Walk:
    """Record the functions of this project that are entered while `call` runs in this thread."""
    calls: list[tuple[str, str]] = []
    roots = tuple(f"{ROOT / package}/" for package in PACKAGES)

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        # What runs when a module is imported is not part of a walk.
        if event == "call" and code.co_filename.startswith(roots) and code.co_name != "<module>":
            calls.append((str(Path(code.co_filename).relative_to(ROOT)), code.co_name))

    jax.clear_caches()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(None)
    return Walk(calls)


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
    """From a number for the prior precision to the evidence."""
    network, data = small_problem()
    for_each_weight = jax.tree.map(lambda leaf: np.linspace(0.5, 2.0, leaf.size).reshape(leaf.shape), network.params)
    walks = {}
    for name, precision in (("one prior precision", 1.0), ("one for each weight", for_each_weight)):
        la = bnnlaplace.Laplace(network, "classification", hessian_structure="diag", prior_precision=precision)
        la = la.fit(data)
        walks[f"log_marginal_likelihood(2.0), {name}"] = walk(lambda la=la: la.log_marginal_likelihood(2.0))
    return walks


def fit_walks() -> dict[str, Walk]:
    """From data to a fitted Laplace."""
    network, data = small_problem()
    walks = {}
    for structure, options in (("lanczos", {"key": jax.random.key(0), "num_probes": 4}), ("diag", {})):
        la = bnnlaplace.Laplace(network, "classification", hessian_structure=structure)
        walks[f"fit(data), {structure}"] = walk(lambda la=la, options=options: la.fit(data, **options))
    return walks


def main() -> None:
    """Record all walks, print and write."""
    walks = evidence_walks() | fit_walks()
    table = Table("walk", "files", "moves", "prior resolved", title="Walks through the project", title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {}
    for name, steps in walks.items():
        resolved = steps.count("bnnlaplace/prior/gaussian.py", "resolve")
        rows[name] = {"files": len(steps.files), "moves": steps.moves, "resolved": resolved, "order": steps.files}
        table.add_row(name, str(len(steps.files)), str(steps.moves), str(resolved))
    console.print(table)
    write("walks", {"walks": rows})


if __name__ == "__main__":
    main()
