"""The wheel holds bnnlaplace alone and works without the extras; the programs run from a checkout, in any directory."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Without these, as `pip install .` leaves out the extras.
WITHOUT_EXTRAS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        extras = {"matplotlib", "tensorflow_datasets", "sklearn", "PIL", "pydantic", "tyro", "jinja2"}
        if name.partition(".")[0] in extras:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
import bnnlaplace, jax.numpy as jnp, warnings
warnings.simplefilter("ignore", bnnlaplace.NotAModeWarning)
print(bnnlaplace.__file__)
network = bnnlaplace.Network.from_function(lambda w, x: x @ w, jnp.eye(3))
la = bnnlaplace.Laplace(network, hessian_structure="diag").fit((jnp.eye(3), jnp.arange(3)))
la.save(sys.argv[1])
again = bnnlaplace.Laplace.load(sys.argv[1], network)
assert (again.predictive(jnp.eye(3)) == la.predictive(jnp.eye(3))).all()
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that nothing is left in the source tree."""
    pytest.importorskip("setuptools", minversion="77")
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("bnnlaplace", "training", "configs", "benchmarks"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", str(target), str(source)]
    subprocess.run(command, check=True, cwd=source, timeout=300)
    (found,) = target.glob("*.whl")
    return found


def test_the_wheel_holds_the_package_alone_and_its_types(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"bnnlaplace"}
    assert "bnnlaplace/py.typed" in names
    assert {str(path.relative_to(ROOT)) for path in (ROOT / "bnnlaplace").rglob("*.py")} <= set(names)


def test_the_package_works_without_the_extras(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WITHOUT_EXTRAS, str(tmp_path / "posterior")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path / "installed"))  # not the source tree


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ([], "van_digits"),
        (["--config", "configs/van_digits.py"], "van_digits"),
        (["--config", "configs/van_cifar10.py"], "van_cifar10"),
    ],
)
def test_shipped_experiments_are_found_from_any_directory(tmp_path, options, name):
    program = "import sys, training.fit_van as program; sys.exit(program.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *options, "--help"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80"},  # wide enough for one column of options
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"(default: checkpoints/{name})" in " ".join(done.stdout.replace("│", " ").split())
