"""The width at which programs print, the line that names the report, and caches that cannot be written."""

import contextlib
import io
import os
import signal
import sys
import warnings
from pathlib import Path

import jax
import pytest
from rich.console import Console

from bnnlaplace.checkpoint import CheckpointError
from training.cli import program
from training.errors import Interrupted, StorageError, UserError
from training.report import html as report


def test_nothing_is_wrapped_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    program.make_console().print("word " * 100)
    assert capsys.readouterr().out.count("\n") == 1


def test_a_terminal_is_as_wide_as_it_is(capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    program.make_console().print("word " * 100)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 40


def test_the_path_of_the_report_is_the_last_line_alone_at_any_width(tmp_path, monkeypatch, capsys):
    class Results:
        seconds = {"data": 1.0, "evaluation": 2.0}

    monkeypatch.setattr(report, "draw_figures", lambda results: {})
    for name in ("write_metrics", "render_report", "print_table"):
        monkeypatch.setattr(report, name, lambda *_: "")
    directory = tmp_path / ("long [bold] :smile: " * 9)
    report.write_results(directory, Results(), Console(width=30))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(directory / "report.html")
    assert "3 s in all (data 1, evaluation 2)." in " ".join(lines[:-1])


def test_a_figure_that_cannot_be_written_is_one_line_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    class Figure:
        def savefig(self, buffer, **_):
            buffer.write(b"whole")

    def half(path, content):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "draw_figures", lambda results: {"evidence": Figure()})
    monkeypatch.setattr(report, "render_report", lambda *_: "")
    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(StorageError, match="evidence.png must be writable; got No space left on device; free the disk"):
        report.write_results(tmp_path, None, Console())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_a_terminal_cannot_show_does_not_end_a_run(monkeypatch):
    """A table with a dash, or a path in other letters, raised UnicodeEncodeError after the training."""
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    assert program.run(lambda console: console.print("1\N{EN DASH}2 \udcff")) == 0
    assert stream.buffer.getvalue() == b"1?2 ?\n"


def test_output_that_nobody_reads_is_one_line(monkeypatch, capsys):
    """Rich ended the program with status 1 and without a word."""
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert program.run(lambda console: console.print("word")) == 2
        monkeypatch.undo()
    assert capsys.readouterr().err == (
        "error: what is printed must be read to the end; got Broken pipe; print to a file, or to nothing: > /dev/null, "
        "and run the same command again\n"
    )


@pytest.fixture
def cache_settings():
    """Put JAX's settings back."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize(
    ("variable", "expected"), [("XDG_CACHE_HOME", "bnnlaplace/xla"), ("JAX_COMPILATION_CACHE_DIR", "")]
)
def test_a_cache_that_cannot_be_written_is_a_warning(variable, expected, tmp_path, monkeypatch, capsys, cache_settings):
    (tmp_path / "file").touch()
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / "file" / "cache"))
    program.use_compilation_cache()
    printed, error = capsys.readouterr()
    assert printed == "" and error.count("\n") == 1
    assert f"must be writable; got {tmp_path}/file: Not a directory; every run compiles anew" in error
    assert jax.config.jax_compilation_cache_dir is None


def test_a_cache_that_can_be_written_is_used(tmp_path, monkeypatch, capsys, cache_settings):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    program.use_compilation_cache()
    assert capsys.readouterr() == ("", "")
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "cache" / "bnnlaplace" / "xla")
    assert list(tmp_path.iterdir()) == []  # made when there is something to keep


# --- how a program ends ----------------------------------------------------------------------------------------------

FULL = OSError(28, "No space left on device", "/w/file")


@pytest.fixture
def ended(monkeypatch, capsys):
    """Return a function that runs a program whose body raises an error, and returns its status and its last line."""
    monkeypatch.setattr(program, "use_compilation_cache", lambda: None)

    def end(error, *, command=None, before=lambda: None):
        def main(console):
            with program.continued_by(command) if command else contextlib.nullcontext():
                before()
                raise error

        status = program.run(main)
        return status, capsys.readouterr().err.splitlines()[-1]

    return end


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (FULL, 2, "error: files must be readable and writable; got /w/file: No space left on device; free the disk"),
        (StorageError("x must be writable; free the disk"), 2, "error: x must be writable; free the disk"),
        (
            MemoryError("8 GB are needed"),
            2,
            "error: there must be enough memory: 8 GB are needed; free memory, or lower",
        ),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "error: there must be enough memory: RESOURCE"),
        (Interrupted("stopped after step 3"), 130, "stopped after step 3"),
        (KeyboardInterrupt(), 130, "stopped at once; what was finished is kept"),
    ],
)
def test_what_ends_a_program_is_a_line_that_says_how_to_continue(ended, error, status, message):
    assert ended(error)[0] == status
    found = ended(error, command="python -m it --resume")
    assert found[0] == status and found[1].startswith(message)
    assert found[1].endswith("continue with: python -m it --resume")


def test_a_fault_of_the_user_is_said_without_a_command(ended):
    assert ended(UserError("x must be y"), command="python -m it") == (2, "error: x must be y")
    assert ended(CheckpointError("x must be y")) == (2, "error: x must be y")


def test_an_error_that_two_signals_cause_in_a_library_is_an_interruption(ended):
    def signals():
        signal.raise_signal(signal.SIGTERM)
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)

    error = RuntimeError("a callback failed")
    expected = "stopped at once; what was finished is kept"
    assert ended(error, before=signals) == (130, expected)
    assert ended(error, before=signals, command="it") == (130, f"{expected}; continue with: it")


def test_other_errors_keep_their_traceback(ended):
    with pytest.raises(ZeroDivisionError):
        ended(ZeroDivisionError("a fault of ours"), command="it")


def test_a_cache_on_a_full_disk_is_one_line_however_many_programs_it_cannot_keep(monkeypatch, capsys):
    def main(console):
        for number in range(3):
            entry = f"Error writing persistent compilation cache entry for 'jit_{number}'"
            warnings.warn(f"{entry}: OSError: [Errno 28] No space left on device", UserWarning, stacklevel=1)
            warnings.warn("the curvature is\nrounded", UserWarning, stacklevel=1)

    monkeypatch.setattr(program, "use_compilation_cache", lambda: None)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert program.run(main) == 0
    error = capsys.readouterr().err
    assert error.splitlines()[1:] == ["warning: the curvature is rounded"]
    assert error.startswith(
        "warning: the cache of compiled programs must be writable; got OSError: [Errno 28] No space"
    )


def test_output_on_a_full_disk_is_one_line(tmp_path, monkeypatch, capsys):
    class Output(io.StringIO):
        def flush(self):
            raise FULL

        def fileno(self):
            return file.fileno()

    monkeypatch.setattr(program, "use_compilation_cache", lambda: None)
    with (tmp_path / "out").open("w") as file:
        monkeypatch.setattr(sys, "stdout", Output())
        assert program.run(lambda console: None) == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: files must be readable and writable; got /w/file: No space left")
        and error.count("\n") == 1
    )
