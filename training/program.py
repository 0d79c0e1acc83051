"""What the command-line programs share: one line for a fault, exit codes, the compilation cache, where results go."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import jax
from rich.console import Console

from bnnlaplace.checkpoint import CheckpointError
from training import report
from training.errors import Interrupted, UserError
from training.results import RunResults, write_metrics

USER_FAULT, INTERRUPTED = 2, 130


def run(main: Callable[[Console], None]) -> int:
    """Run a program and turn what the user can mend into one line on stderr.

    Returns
    -------
    The exit status: 0; 2 for a fault that the message says how to mend; 130 after Ctrl-C.
    """
    console = Console()
    use_compilation_cache()
    try:
        main(console)
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_FAULT
    except Interrupted as error:
        print(str(error), file=sys.stderr)
        return INTERRUPTED
    except OSError as error:
        print(f"error: files must be readable and writable; {error}; check the path and the disk", file=sys.stderr)
        return USER_FAULT
    except KeyboardInterrupt:
        print("stopped; what was finished is kept", file=sys.stderr)
        return INTERRUPTED
    return 0


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/bnnlaplace/xla."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        jax.config.update("jax_compilation_cache_dir", str(home / "bnnlaplace" / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Stopwatch:
    """Seconds by stage, in the order the stages ran."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and time it."""
        self.console.print(f"[bold]{name}[/bold]")
        started = perf_counter()
        yield
        self.seconds[name] = perf_counter() - started


def write_results(directory: Path, results: RunResults, console: Console) -> None:
    """Print the table and write metrics.json, report.html and the figures."""
    figures = report.draw_figures(results)
    (directory / "figures").mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        figure.savefig(directory / "figures" / f"{name}.png", dpi=150)
    write_metrics(directory / "metrics.json", results)
    report.write_report(directory / "report.html", results, figures)
    report.print_table(console, results)
    total = sum(results.seconds.values())
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in results.seconds.items())
    console.print(f"{total:.0f} s in all ({stages}). Report: {directory / 'report.html'}", highlight=False)
