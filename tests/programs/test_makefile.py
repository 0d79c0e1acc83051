"""`make` completes an environment that an interruption left half made, and makes a complete one only once."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="needs make")

# Notes what it is told to do; stops in the middle of the stage $STOP_IN, after the interpreter is in place.
PYTHON = """#!/bin/sh
echo "$2" >> "$STAGES"
if [ "$2" = venv ]; then mkdir -p "$3/bin" && cp "$0" "$3/bin/python"; fi
test "$2" != "$STOP_IN"
"""


@pytest.fixture
def make(tmp_path):
    """Return a function that runs `make` in a directory of its own and returns its status and the stages it ran."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python, stages = tmp_path / "python", tmp_path / "stages"
    python.write_text(PYTHON)
    python.chmod(0o755)

    def run(target="fit-van", stop_in=""):
        stages.write_text("")
        environment = {**os.environ, "STAGES": str(stages), "STOP_IN": stop_in, "MAKEFLAGS": ""}
        done = subprocess.run(
            ["make", target, f"PYTHON={python}"], cwd=tmp_path, env=environment, capture_output=True, timeout=60
        )
        ran = [
            stage
            for stage in stages.read_text().split("\n")
            if stage in ("venv", "pip", "training.fit_van", "pytest", "mkdocs")
        ]
        return done.returncode, ran

    return run


@pytest.mark.parametrize("stage", ["venv", "pip"])
def test_an_interrupted_stage_is_gone_over_again(make, stage):
    status, ran = make(stop_in=stage)
    assert status != 0 and ran[-1] == stage
    status, ran = make()
    assert status == 0 and ran[0] == stage and ran[-1] == "training.fit_van"


def test_a_complete_environment_is_used_as_it_is(make):
    assert make() == (0, ["venv", "pip", "training.fit_van"])
    assert make() == (0, ["training.fit_van"])
    assert make("test") == (0, ["pip", "pytest"])  # with what the tests need
    assert make("test") == (0, ["pytest"])
    assert make("docs") == (0, ["pip", "mkdocs"])


def test_changed_dependencies_are_installed(make, tmp_path):
    make()
    later = (tmp_path / ".venv" / "installed-training").stat().st_mtime + 1
    os.utime(tmp_path / "pyproject.toml", (later, later))
    assert make() == (0, ["pip", "training.fit_van"])
