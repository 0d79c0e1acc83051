"""What the programs share: how wide they print, where the report is said to lie, caches that cannot be written."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from rich.console import Console

from training.cli import program
from training.errors import UserError
from training.report import html as report

ROOT = Path(__file__).resolve().parents[3]


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
    for name in ("write_metrics", "write_report", "print_table"):
        monkeypatch.setattr(report, name, lambda *_: None)
    directory = tmp_path / ("long [bold] :smile: " * 9)
    report.write_results(directory, Results(), Console(width=30))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == str(directory / "report.html")
    assert "3 s in all (data 1, evaluation 2)." in " ".join(lines[:-1])


def test_a_figure_that_cannot_be_written_is_one_line_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    class Figure:
        def savefig(self, path, **_):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(report, "draw_figures", lambda results: {"evidence": Figure()})
    with pytest.raises(UserError, match=r"evidence.png must be writable; got No space left on device; free the disk"):
        report.write_results(tmp_path, None, Console())
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


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


def test_programs_run_with_directories_that_cannot_be_written(tmp_path):
    """A cache below a file is a warning, a work directory below a file an error, and neither leaves anything behind."""
    (tmp_path / "file").touch()
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "file" / "cache"),
        "MPLCONFIGDIR": str(tmp_path / "matplotlib"),
        "TFDS_DATA_DIR": str(tmp_path / "sets"),
    }
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-m", "training.fit_van", "--workdir", str(tmp_path / "file" / "run")],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    warning, error = done.stderr.splitlines()
    assert warning.startswith("warning: the cache of compiled programs must be writable")
    assert error.startswith("error: `--workdir` must be writable") and error.endswith("or free the disk")
    assert (tmp_path / "file").read_bytes() == b""


# Signals that come within a callback of the garbage collector, as JAX has one: exceptions there are forgotten.
IN_A_CALLBACK = """
import gc, os, signal, sys, time
from rich.console import Console
from training.cli import interruption, program

def main(console):
    def interrupt(phase, info):
        for _ in range(int(sys.argv[1]) if phase == "start" else 0):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)
    with program.Stopwatch(console, kept="all is kept").stage("posterior"):
        gc.callbacks.append(interrupt)
        gc.collect(0)
        gc.callbacks.clear()
        if sys.argv[1] == "2":
            time.sleep(60)
    print("went on")

interruption.SECONDS_TO_UNWIND = 0.5
sys.exit(program.run(main))
"""


@pytest.mark.parametrize(
    ("signals", "last_line"),
    [(1, "stopped after stage posterior; all is kept"), (2, "stopped at once; what was finished is kept")],
)
def test_signals_in_a_callback_are_not_forgotten(signals, last_line, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", IN_A_CALLBACK, str(signals)],
        cwd=ROOT, env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)}, capture_output=True, text=True, timeout=50,
    )  # fmt: skip
    assert done.returncode == 130 and "went on" not in done.stdout
    assert done.stderr.splitlines()[-1] == last_line
    assert ("Exception ignored" in done.stderr) == (signals == 2)  # the control: a second one does raise there
