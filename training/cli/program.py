"""Parts that the command-line programs share: one line for a fault, exit codes, compilation cache, stopwatch."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

import jax
from rich.console import Console

from bnnlaplace.checkpoint import CheckpointError
from training.cli import interruption
from training.errors import Interrupted, UserError
from training.workdir import why_not_writable

USER_FAULT, INTERRUPTED = 2, interruption.EXIT_STATUS

_UNBOUNDED = 10_000  # Columns: more than any line printed here has.


def run(main: Callable[[Console], None]) -> int:
    """Run a program and turn a fault that the user can mend into one line on stderr.

    Returns
    -------
    int
        The exit status. 0 is success, and 2 is a fault that the message says how to mend. 130 follows Ctrl-C or
        SIGTERM, which stop the program at the next point where it asks for them (see `interruption`). Two of them stop
        it at once.
    """
    console = make_console()
    try:
        with interruption.watch():
            use_compilation_cache()
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


def make_console() -> Console:
    """Make a console as wide as the terminal. A file or a pipe has no width, so nothing is wrapped there."""
    return Console() if sys.stdout.isatty() else Console(width=_UNBOUNDED)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/bnnlaplace/xla.

    If that directory cannot be written, print a warning and go on without a cache.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # JAX reads this variable itself.
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(chosen or f"{home}/bnnlaplace/xla").expanduser()
    is_bucket = "://" in (chosen or "")
    if not is_bucket and (fault := why_not_writable(directory)):
        print(
            f"warning: the cache of compiled programs must be writable; got {fault}; every run compiles anew until "
            "XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR names a directory that is",
            file=sys.stderr,
        )
        jax.config.update("jax_compilation_cache_dir", None)
    elif not chosen:
        jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


class Stopwatch:
    """Seconds by stage, in the order in which the stages ran.

    `kept` tells a person who stops the program between two stages what is left of the work.
    """

    def __init__(self, console: Console, kept: str) -> None:
        self.console = console
        self.kept = kept
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and time it. If a signal came meanwhile, the program stops after the stage at the latest."""
        self.console.print(f"[bold]{name}[/bold]")
        started = perf_counter()
        yield
        self.seconds[name] = perf_counter() - started
        interruption.stop_if_requested(f"stopped after stage {name}; {self.kept}")
