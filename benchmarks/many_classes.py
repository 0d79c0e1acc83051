"""What do a posterior of many classes, and its predictions, cost?

    python benchmarks/many_classes.py [--classes 100 1000 10000] [--structures diag lanczos kron] [--small]

A network with 16 hidden units is fitted to 16 examples, and predicts 64 inputs through the probit link and by 100
samples (32 probes of "lanczos"). Each case runs in a process of its own, so that the highest memory is its own. Seconds
are the median of three calls after the first, which compiles; memory is what the process takes above its imports.
Kronecker factors of more than 1,000 classes are left out: their decomposition takes C^3 multiplications.

Prints a table and writes `benchmarks/results/many_classes.json`; `--small`, which only shows that everything runs,
writes `many_classes_small.json`. About four minutes on 2 cores.
"""

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from record import console, interleaved, judge, peak_memory_mb, record_name, write
from rich.table import Table

from bnnlaplace import Laplace, Network

FEATURES, HIDDEN, EXAMPLES, INPUTS, REPETITIONS = 8, 16, 16, 64, 3
SAMPLES, MOST_CLASSES_OF_KRON = 100, 1000
STAGES = ("fit", "probit", "mc")
KEY = jax.random.key(0)


def stages(structure: str, num_classes: int) -> dict[str, Callable[[], Any]]:
    """The calls that are timed, in their order: predictions are those of the last fit."""
    keys = jax.random.split(KEY, 4)
    shapes = {"w1": (FEATURES, HIDDEN), "w2": (HIDDEN, num_classes)}
    params = {name: jax.random.normal(key, shapes[name]) for key, name in zip(keys, shapes, strict=False)}
    params["b2"] = jnp.zeros(num_classes)
    network = Network.from_function(lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"] + p["b2"], params)
    x = jax.random.normal(keys[2], (INPUTS, FEATURES))
    y = jax.random.randint(keys[3], (EXAMPLES,), 0, num_classes)
    of_samples = {"key": KEY} if structure == "lanczos" else {"key": KEY, "num_samples": SAMPLES}

    fitted = {}

    def fit() -> Any:
        options = {"key": KEY} if structure == "lanczos" else {}
        fitted["la"] = Laplace(network, hessian_structure=structure).fit((x[:EXAMPLES], y), **options)
        return jax.tree.leaves(fitted["la"])

    def predict(**options: Any) -> jax.Array:
        return fitted["la"].predictive(x, **options)

    return {
        "fit": fit,
        "probit": predict,
        "mc": partial(predict, link_approx="mc", **of_samples),
    }


def measure_case(structure: str, num_classes: int) -> dict[str, Any]:
    """Time one case in this process, and how far it raises the highest memory."""
    warnings.simplefilter("ignore")  # the weights are not trained
    before = peak_memory_mb()
    cases = stages(structure, num_classes)
    first = interleaved(cases, 1)
    again = interleaved(cases, REPETITIONS)
    return {"first": first, "again": again, "memory_mb": peak_memory_mb() - before}


def in_own_process(structure: str, num_classes: int) -> dict[str, Any]:
    """Run `measure_case` in a new process."""
    command = [sys.executable, __file__, "--case", structure, str(num_classes)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{structure} with {num_classes} classes failed: {done.stderr.strip()[-500:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def targets(results: dict[str, dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return each number that has a target, and the most that it should be."""
    bounds = {}
    if case := results.get("diag, 1000"):
        bounds["diag, 1,000 classes, averages over samples: seconds"] = case["again"]["mc"], 1.0
    for structure in ("diag", "lanczos"):
        if case := results.get(f"{structure}, 10000"):
            bounds[f"{structure}, 10,000 classes: seconds of all, compiled"] = sum(case["again"].values()), 10.0
            bounds[f"{structure}, 10,000 classes: MB"] = case["memory_mb"], 1024.0
    if {"diag, 1000", "diag, 10000"} <= results.keys():
        fits = [results[f"diag, {count}"]["again"]["fit"] for count in (1000, 10000)]
        bounds["diag, fit: seconds of 10,000 classes over ten times those of 1,000"] = fits[1] / fits[0] / 10, 1.2
    return bounds


def main(
    classes: tuple[int, ...] = (100, 1000, 10000),
    structures: tuple[str, ...] = ("diag", "lanczos", "kron"),
    small: bool = False,
) -> None:
    """Measure all cases, print and write.

    Args:
        classes: The numbers of classes.
        structures: The structures of the curvature.
        small: Few classes and one structure, to see that everything runs.
    """
    options = dict(locals())
    if small:
        classes, structures = (40,), ("diag",)
    results, table = {}, Table("case", *(f"{stage}, s" for stage in STAGES), "first calls, s", "memory, MB")
    table.title, table.title_justify = f"{HIDDEN} hidden units, {EXAMPLES} examples, {INPUTS} inputs", "left"
    for structure in structures:
        for count in classes:
            if structure == "kron" and count > MOST_CLASSES_OF_KRON:
                continue
            case = results[f"{structure}, {count}"] = in_own_process(structure, count)
            seconds = [f"{case['again'][stage]:.3f}" for stage in STAGES]
            table.add_row(
                f"{structure}, {count}", *seconds, f"{sum(case['first'].values()):.1f}", f"{case['memory_mb']:.0f}"
            )
    console.print(table)
    write(record_name("many_classes", main, options), {"results": results, "targets": judge(targets(results))})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--case"]:
        print(json.dumps(measure_case(sys.argv[2], int(sys.argv[3]))))
    else:
        tyro.cli(main)
