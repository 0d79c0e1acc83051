"""What do fit, evidence and predictive cost beside laplace-torch, in time and in memory?

    python benchmarks/laplace_torch.py [--parts time memory] [--classes 10 100] [--repetitions 5] [--small]

time     Seconds of fitting, of the log marginal likelihood, of the probit predictive on a test batch, and of all three.
memory   How far the resident memory of a process of its own rises above what imports, data and networks need.

The same networks in both packages: perceptrons and a small convolutional network, in float32, at random weights. The
diagonal and, where this package has it, the Kronecker structure are fitted to all weights of the larger ones; the
full GGN to a smaller perceptron, as it has P^2 entries; the last layer gets the same structures, the full GGN for few
classes only. Both packages take the data 64 examples at a time. Alternatives run in turn in one process on the same
cores; the first call, which compiles here, is reported apart.

The peer is laplace-torch, `pip install -e '.[peers]'`; without it our side runs alone. Prints tables and writes
`benchmarks/results/laplace_torch.json`; the name of the record holds every option that is not the default. `--small`
only shows that everything runs.

Takes about ten minutes on 2 cores that do nothing else. Other programs slow down most those threads that wait for one
another, as the peer's do. So seconds of the processors stand beside those of the clock, and the record has the load of
the machine before and after.
"""

import gc
import importlib.metadata
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
import tyro
from laplace_torch_cases import Case, cases, data, our_steps
from record import Results, console, judge, record_name, write
from rich.table import Table

Part = Literal["time", "memory"]
STEPS = ("fit", "evidence", "predictive")
MEGABYTE = 1 / 1024  # ru_maxrss counts kilobytes on Linux.
HAVE_PEER = importlib.util.find_spec("laplace") is not None and importlib.util.find_spec("torch") is not None


class Timing(NamedTuple):
    """Seconds of each step in the first call and in each round, and processor seconds in each round."""

    first: dict[str, float]
    rounds: dict[str, list[float]]
    processors: dict[str, list[float]]


def medians(rounds: dict[str, list[float]]) -> dict[str, float]:
    """Medians over the rounds of each step and of the total."""
    totals = [sum(parts) for parts in zip(*rounds.values(), strict=True)]
    return {step: statistics.median(values) for step, values in (rounds | {"total": totals}).items()}


def steps_of(library: str, case: Case) -> dict[str, Callable[[], Any]]:
    """Return the three steps; each uses the result of the one before."""
    if library == "ours":
        return our_steps(case)
    from laplace_torch_peer import peer_steps

    return peer_steps(case)


def run(steps: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Run each step once; return its seconds and the processor seconds of all threads."""
    seconds, processors = {}, {}
    for step, call in steps.items():
        start, busy = time.perf_counter(), time.process_time()
        jax.block_until_ready(call())
        seconds[step], processors[step] = time.perf_counter() - start, time.process_time() - busy
    return seconds, processors


def timed(case: Case, libraries: tuple[str, ...], repetitions: int) -> dict[str, Timing]:
    """Time all libraries in turn, `repetitions` times after a first call of each."""
    steps = {library: steps_of(library, case) for library in libraries}
    timings = {
        library: Timing(run(steps[library])[0], {step: [] for step in STEPS}, {step: [] for step in STEPS})
        for library in libraries
    }
    for _ in range(repetitions):
        for library in libraries:
            gc.collect()
            seconds, processors = run(steps[library])
            for step in STEPS:
                timings[library].rounds[step].append(seconds[step])
                timings[library].processors[step].append(processors[step])
    return timings


def times(selected: list[Case], libraries: tuple[str, ...], repetitions: int) -> Results:
    """Print and return the times of all cases, each as soon as it is known."""
    answers: Results = {}
    for case in selected:
        table = Table("library", *STEPS, "total", "processors, total", "first call", title_justify="left")
        table.title = f"{case.name}, {case.examples} examples: milliseconds"
        for column in table.columns[1:]:
            column.justify = "right"
        answers[case.name] = {}
        for library, timing in timed(case, libraries, repetitions).items():
            wall, busy = medians(timing.rounds), medians(timing.processors)
            answers[case.name][library] = timing._asdict() | {"medians": wall, "processor_medians": busy}
            row = [*wall.values(), busy["total"], sum(timing.first.values())]
            table.add_row(library, *(f"{1e3 * value:.1f}" for value in row))
        if len(libraries) == 2:
            ours, theirs = (answers[case.name][library] for library in libraries)
            answers[case.name]["ratios"] = {
                kind: {step: ours[kind][step] / theirs[kind][step] for step in ours[kind]}
                for kind in ("medians", "processor_medians")
            }
            wall, busy = answers[case.name]["ratios"].values()
            table.add_row("ours / theirs", *(f"{ratio:.3g}" for ratio in (*wall.values(), busy["total"])), "")
        console.print(table)
    return answers


def memory(selected: list[Case], libraries: tuple[str, ...], options: list[str]) -> Results:
    """Print and return how far memory rises in each case, which runs in a process of its own."""
    table = Table("case", *libraries, *(["ours / theirs"] if len(libraries) == 2 else []))
    table.title, table.title_justify = "megabytes above imports, data and networks", "left"
    answers: Results = {}
    for case in selected:
        rises = {library: peak(library, case.name, options) for library in libraries}
        row = [f"{value:.0f}" if value is not None else "failed" for value in rises.values()]
        answers[case.name] = dict(rises)
        if len(rises) == 2 and None not in rises.values():
            answers[case.name]["ratio"] = rises["ours"] / max(rises["laplace-torch"], 1.0)
            row.append(f"{answers[case.name]['ratio']:.3g}")
        table.add_row(case.name, *row)
    console.print(table)
    return answers


def peak(library: str, name: str, options: list[str]) -> float | None:
    """Run `measure_peak` in a process of its own and return its megabytes; None if it ends in an error."""
    command = [sys.executable, __file__, "--measure", library, name, *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        console.print(f"  {library}, {name}: {done.stderr.strip().splitlines()[-1:]}", markup=False)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


def measure_peak(library: str, case: Case) -> float:
    """How far the highest resident memory rises while the three steps run once, compilation included."""
    import resource

    data(case)
    steps = steps_of(library, case)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    run(steps)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * MEGABYTE


def targets(answers: dict[str, Results]) -> Results:
    """Judge the ratios by their targets; empty without the peer."""
    bounds = {}
    for name, case in answers.get("time", {}).items():
        bound = 1.0 if "kron" in name else 0.2
        if "ratios" in case:
            bounds[f"time, {name}"] = case["ratios"]["medians"]["total"], bound
    for name, case in answers.get("memory", {}).items():
        if "ratio" in case and "100 classes" in name:
            bounds[f"memory, {name}"] = case["ratio"], 0.2
    return judge(bounds)


def main(
    parts: tuple[Part, ...] = get_args(Part),
    classes: tuple[int, ...] = (10, 100),
    repetitions: int = 5,
    small: bool = False,
    measure: tuple[str, str] | None = None,
) -> None:
    """Run the parts, print and write.

    Args:
        parts: Which questions to answer.
        classes: Numbers of classes.
        repetitions: How often to repeat each timing; the median counts.
        small: Small networks, one repetition and the memory of one case, to see that everything runs.
        measure: A library and the name of a case: print the rise of memory alone. Used for the part "memory".
    """
    options = dict(locals())
    selected = cases(tuple(dict.fromkeys(classes)), small)
    if measure:
        library, name = measure
        print(json.dumps(measure_peak(library, next(case for case in selected if case.name == name))))
        return
    load_before = os.getloadavg()[0]
    libraries = ("ours", "laplace-torch") if HAVE_PEER else ("ours",)
    versions = (
        {name: importlib.metadata.version(name) for name in ("torch", "laplace-torch", "curvlinops-for-pytorch")}
        if HAVE_PEER
        else {}
    )
    if not HAVE_PEER:
        console.print(
            "laplace-torch is not installed, and its rows are left out: pip install -e '.[peers]'", markup=False
        )
    answers: dict[str, Results] = {}
    if "time" in parts:
        answers["time"] = times(selected, libraries, 1 if small else repetitions)
    if "memory" in parts:
        arguments = ["--classes", *map(str, classes), *(["--small"] if small else [])]
        answers["memory"] = memory(selected[:1] if small else selected, libraries, arguments)
    loads = [load_before, os.getloadavg()[0]]
    content = {
        "options": options,
        "peers": versions,
        "load_of_the_machine": loads,
        **answers,
        "targets": targets(answers),
    }
    console.print(f"  load of the machine, before and after: {loads[0]:.1f} and {loads[1]:.1f}")
    write(record_name("laplace_torch", main, options), content)


if __name__ == "__main__":
    tyro.cli(main)
