"""What `pip install .` installs is enough: the programs find the shipped experiments from any directory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The packages as an installation has them, built from a copy so that nothing is left in the source tree."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bnnlaplace", "training", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", *options, "--target", str(target), str(source)]
    subprocess.run(command, check=True, cwd=source, timeout=300)
    return target


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "van_digits"),
        (["--config", "configs/van_digits.py"], "van_digits"),
        (["--config", "configs/van_cifar10.py"], "van_cifar10"),
    ],
)
def test_shipped_experiments_are_found_from_any_directory(installed, tmp_path, options, name):
    program = (
        "import sys, training.fit_van as program; print(program.__file__, file=sys.stderr); "
        "sys.exit(program.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *options, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed), "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith(str(installed))  # not the source tree
    assert f"(default: checkpoints/{name})" in done.stdout
