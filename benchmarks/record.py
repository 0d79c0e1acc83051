"""What the benchmarks share: interleaved timing, tables of it, and a JSON record with versions and device."""

import importlib.metadata
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console
from rich.table import Table

from bnnlaplace.core.memory import free_bytes

RESULTS = Path(__file__).parent / "results"
MOST_BYTES_ON_CPU = 4e9
Results = dict[str, dict[str, Any]]

# A log file has no width of its own, and the default of 80 columns would break tables.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def compile_seconds(run: Callable[[], Any]) -> float:
    """Seconds of the first call: compilation, and one execution."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


class Program(NamedTuple):
    """A function compiled for its arguments, not run yet.

    Attributes
    ----------
    run
        Call the function.
    compile_seconds
        Of tracing, lowering and compilation.
    memory_bytes
        Of arguments, outputs and temporary arrays, as XLA lays them out.
    """

    run: Callable[[], Any]
    compile_seconds: float
    memory_bytes: int


def compile_ahead(function: Callable[..., Any], *arguments: Any) -> Program:
    """Compile `function(*arguments)` without running it."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    memory = compiled.memory_analysis()
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes
    return Program(partial(compiled, *arguments), seconds, total)


def rounds(cases: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Seconds of each case in each repetition, all cases in turn; they must be compiled already."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repetitions):
        for name, run in cases.items():
            start = time.perf_counter()
            jax.block_until_ready(run())
            seconds[name].append(time.perf_counter() - start)
    return seconds


def interleaved(cases: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, float]:
    """Median seconds of each case, as `rounds` measures them."""
    return {name: statistics.median(times) for name, times in rounds(cases, repetitions).items()}


def most_bytes() -> float:
    """Programs that need more are compiled, so that their memory is known, but not run."""
    return MOST_BYTES_ON_CPU if jax.default_backend() == "cpu" else 0.5 * free_bytes()


def measure(cases: Mapping[str, Program], repetitions: int) -> Results:
    """Median seconds and those of each round, compilation and memory of each case; None where it needs too much."""
    bound = most_bytes()
    affordable = {name: case.run for name, case in cases.items() if case.memory_bytes <= bound}
    for run in affordable.values():
        jax.block_until_ready(run())
    seconds = rounds(affordable, repetitions)
    return {
        name: {
            "seconds": statistics.median(seconds[name]) if name in seconds else None,
            "rounds": seconds.get(name),
            "compile_seconds": case.compile_seconds,
            "memory_bytes": case.memory_bytes,
        }
        for name, case in cases.items()
    }


def show(title: str, results: Mapping[str, Mapping[str, Any]]) -> None:
    """Print measurements, one case in each row."""
    table = Table("case", *("ms", "compile s", "memory MB"), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, found in results.items():
        time = f"{1e3 * found['seconds']:.1f}" if found["seconds"] is not None else "not run: too large"
        table.add_row(name, time, f"{found['compile_seconds']:.1f}", f"{found['memory_bytes'] / 1e6:.1f}")
    console.print(table)


def judge(targets: Mapping[str, tuple[float, float]]) -> Results:
    """Print numbers beside the bounds that they should not exceed."""
    for name, (value, bound) in targets.items():
        met = "met" if value <= bound else "[bold]NOT met[/bold]"
        console.print(f"  {name}: {value:.3g} (target at most {bound:g}: {met})")
    return {
        name: {"value": value, "target": bound, "met": bool(value <= bound)} for name, (value, bound) in targets.items()
    }


def write(name: str, content: Mapping[str, Any]) -> Path:
    """Write `results/NAME.json` with versions, device, cores and peak memory of this process."""
    device = jax.devices()[0]
    record = {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "platform": device.platform,
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "peak_memory_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        **content,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path
