"""Parts that the command-line programs share: one line for a fault, exit codes, compilation cache, stopwatch."""

import ctypes
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
from rich.console import Console

from bnnlaplace.checkpoint import CheckpointError
from training import faults
from training.cli import interruption
from training.errors import Interrupted, NoDataSetError, StorageError, UserError
from training.workdir import why_not_writable

USER_FAULT, INTERRUPTED = 2, interruption.EXIT_STATUS

_UNBOUNDED = 10_000  # Columns: more than any line printed here has.


def run(main: Callable[[Console], None], data_option: str = "$TFDS_DATA_DIR") -> int:
    """Run a program and turn a fault that the user can mend into one line on stderr.

    Parameters
    ----------
    main
        The program.
    data_option
        Its option that names the data directory, for the message that a data set is not there.

    Returns
    -------
    int
        The exit status. 0 is success, and 2 is a fault that the message says how to mend, such as a full disk. 130
        follows Ctrl-C or SIGTERM, which stop the program at the next point where it asks for them (see
        `interruption`). Two of them stop it at once.
    """
    if hasattr(sys.stdout, "reconfigure"):  # A character that the terminal does not have must not end a run.
        sys.stdout.reconfigure(errors="replace")
    console = make_console()
    stopped = False
    try:
        with interruption.watch(), _warnings_in_one_line():
            try:
                use_compilation_cache()
                main(console)
                sys.stdout.flush()  # which may find that the disk is full
            finally:
                stopped = interruption.insisted()
    except NoDataSetError as error:
        return _end(f"error: {error} by {data_option}", USER_FAULT)
    except (UserError, CheckpointError) as error:
        return _end(f"error: {error}", USER_FAULT)
    except Interrupted as error:
        return _end(str(error), INTERRUPTED)
    except KeyboardInterrupt:
        return _end(interruption.STOPPED_AT_ONCE, INTERRUPTED)
    except Exception as error:
        if stopped:  # A library has turned KeyboardInterrupt into an exception of its own.
            return _end(interruption.STOPPED_AT_ONCE, INTERRUPTED)
        if fault := faults.describe(error):
            return _end(f"error: {fault}, and run the same command again", USER_FAULT)
        raise
    return 0


def _end(message: str, status: int) -> int:
    with suppress(OSError):  # of a full disk, for one
        print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # Python would try once more at its end, and print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return status


@contextmanager
def continued_by(command: str) -> Iterator[None]:
    """Within the block, name the command that continues the run in whatever ends it before its end."""
    advice = f"; continue with: {command}"
    with interruption.advising(advice):
        try:
            yield
        except Interrupted as error:
            raise Interrupted(f"{error}{advice}") from None
        except StorageError as error:
            raise UserError(f"{error}; then{advice[1:]}") from error
        except UserError:
            raise
        except KeyboardInterrupt:
            raise Interrupted(f"{interruption.STOPPED_AT_ONCE}{advice}") from None
        except Exception as error:
            if interruption.insisted():
                raise Interrupted(f"{interruption.STOPPED_AT_ONCE}{advice}") from error
            if fault := faults.describe(error):
                raise UserError(f"{fault}; then{advice[1:]}") from error
            raise


class _Console(Console):
    """A console that raises BrokenPipeError if nobody reads on. Rich would end the program without a word."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        raise  # noqa: PLE0704 (called where the error is handled)


def make_console() -> Console:
    """Make a console as wide as the terminal. A file or a pipe has no width, so nothing is wrapped there."""
    return _Console() if sys.stdout.isatty() else _Console(width=_UNBOUNDED)


CACHE_WARNING = "Error (reading|writing) persistent compilation cache entry"
"""Pattern of what JAX says of every program that it cannot keep, as on a full disk."""


@contextmanager
def _warnings_in_one_line() -> Iterator[None]:
    """Within the block, print a warning as one line, without the place in the code. Each is printed once."""
    said = set()

    def show(message: Warning | str, *rest: Any) -> None:
        text = " ".join(str(message).split())
        line = _no_cache(text.split(": ", 1)[-1]) if re.match(CACHE_WARNING, text) else f"warning: {text}"
        if line not in said:
            said.add(line)
            print(line, file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def _no_cache(reason: str) -> str:
    return (
        f"warning: the cache of compiled programs must be writable; got {reason}; every run compiles anew until "
        "XDG_CACHE_HOME or JAX_COMPILATION_CACHE_DIR names a directory that is"
    )


def reporter(console: Console) -> Callable[[str], None]:
    """Make a function that prints a line about something unusual."""
    return lambda message: console.print(message, style="yellow", highlight=False, markup=False, soft_wrap=True)


def use_compilation_cache() -> None:
    """Keep compiled programs between runs, in $JAX_COMPILATION_CACHE_DIR or ~/.cache/bnnlaplace/xla.

    If that directory cannot be written, print a warning and go on without a cache.
    """
    chosen = os.environ.get("JAX_COMPILATION_CACHE_DIR")  # JAX reads this variable itself.
    home = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    directory = Path(chosen or f"{home}/bnnlaplace/xla").expanduser()
    is_bucket = "://" in (chosen or "")
    if not is_bucket and (fault := why_not_writable(directory)):
        print(_no_cache(fault), file=sys.stderr)
        jax.config.update("jax_compilation_cache_dir", None)
    elif not chosen:
        jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def release_programs() -> None:
    """Drop all compiled programs, and return the memory that compiling took. Call it where other programs follow.

    The programs of a training take some hundred megabytes, and the C library keeps what compiling them has freed.
    """
    jax.clear_caches()
    return_memory()


def return_memory() -> None:
    """Return memory to the system that the C library would keep for this process."""
    with suppress(OSError, AttributeError):  # the C library of another system
        ctypes.CDLL("libc.so.6").malloc_trim(0)


class Stopwatch:
    """Seconds by stage, in the order in which the stages ran."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage and time it. If a signal came meanwhile, the program stops after the stage at the latest."""
        self.console.print(f"[bold]{name}[/bold]")
        started = perf_counter()
        yield
        self.seconds[name] = perf_counter() - started
        interruption.stop_if_requested(f"stopped after stage {name}")
