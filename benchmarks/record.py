"""Shared by the benchmarks: interleaved timing, tables, and JSON records whose names hold the options."""

import hashlib
import importlib.metadata
import inspect
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

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The programs in `training` are not installed. Benchmarks that import them find them beside this folder.
sys.path.append(str(ROOT))
MOST_BYTES_ON_CPU = 4e9
Results = dict[str, dict[str, Any]]

# A log file has no width, and the default of 80 columns would break tables.
console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)


def compile_seconds(run: Callable[[], Any]) -> float:
    """Seconds of the first call, which are compilation and one execution."""
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


class Program(NamedTuple):
    """A function that has been compiled for its arguments, but has not run yet.

    Attributes
    ----------
    run
        Calls the function.
    compile_seconds
        Seconds of tracing, lowering and compilation.
    memory_bytes
        Memory of arguments, outputs and temporary arrays, as XLA lays them out.
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
    """Seconds of each case in each repetition. The cases run in turn and must be compiled already."""
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
    """Memory up to which a program is run. A larger one is compiled only, so that its memory is known."""
    return MOST_BYTES_ON_CPU if jax.default_backend() == "cpu" else 0.5 * free_bytes()


def measure(cases: Mapping[str, Program], repetitions: int) -> Results:
    """Measure seconds, compilation and memory of each case. Seconds are None if it needs more than `most_bytes`."""
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
    """Print measurements as a table with one case in each row."""
    table = Table("case", *("ms", "compile s", "memory MB"), title=title, title_justify="left")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, case in results.items():
        milliseconds = f"{1e3 * case['seconds']:.1f}" if case["seconds"] is not None else "not run: too large"
        table.add_row(name, milliseconds, f"{case['compile_seconds']:.1f}", f"{case['memory_bytes'] / 1e6:.1f}")
    console.print(table)


def judge(targets: Mapping[str, tuple[float, float]]) -> Results:
    """Print numbers beside the bounds that they should not exceed, and return both."""
    for name, (value, bound) in targets.items():
        met = "met" if value <= bound else "[bold]NOT met[/bold]"
        console.print(f"  {name}: {value:.3g} (target at most {bound:g}: {met})")
    return {
        name: {"value": value, "target": bound, "met": bool(value <= bound)} for name, (value, bound) in targets.items()
    }


def record_name(benchmark: str, main: Callable[..., Any], options: Mapping[str, Any]) -> str:
    """Name a record by its benchmark and by every option of `main` that differs from its default.

    So no record takes the place of one of other options: ``evidence``, ``evidence_classes_10-100_no_weights``. Records
    of other devices than the CPU have the platform in their name.
    """
    parts = [benchmark] if jax.default_backend() == "cpu" else [benchmark, jax.default_backend()]
    for name, parameter in inspect.signature(main).parameters.items():
        value = options[name]
        if value is parameter.default or value == parameter.default:
            continue
        if isinstance(value, bool):
            parts.append(name if value else f"no_{name}")
        elif isinstance(value, Path):
            parts.append(_path_name(value))
        else:
            values = value if isinstance(value, (tuple, list)) else [value]
            parts.append(f"{name}_{'-'.join(map(str, values))}")
    return "_".join(parts)


def _path_name(path: Path) -> str:
    """The name of a run in `checkpoints/`; a run elsewhere gets a digest of its place, as names may be the same."""
    path = path.resolve()
    if path.parent == ROOT / "checkpoints":
        return path.name
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def peak_memory_mb() -> float:
    """The highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def write(name: str, content: Mapping[str, Any]) -> Path:
    """Write `results/NAME.json` with versions, device, cores and peak memory of this process, and print its path."""
    device = jax.devices()[0]
    environment = {
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "platform": device.platform,
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "peak_memory_mb": peak_memory_mb(),
    }
    if shared := environment.keys() & content.keys():
        raise ValueError(f"a record must not have {sorted(shared)} twice; rename them in its content")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(environment | dict(content), indent=2, default=str) + "\n")
    report(path)
    return path


def report(path: Path) -> None:
    """Print on one line, however long it is, where something was written."""
    console.print(f"written to {path}", soft_wrap=True)
