"""Imports point one way through the stages, and importing the package is light and changes no setting."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "bnnlaplace"

# The rooms in the order in which data pass: each imports only from those before it.
ROOMS = [
    *("core", "model", "curvature", "krylov", "structure", "evidence", "prior", "fitted", "fitting", "marglik"),
    *("calibration", "predictive", "variational", "checkpoint", "plots", "laplace"),
]
# What two rooms may import at most, whatever comes before them.
LEAVES = {"krylov": {"core"}, "calibration": {"core"}, "plots": {"core", "calibration"}}

LONGEST_FILE, LONGEST_FRONT_OBJECT, MOST_ARROWS = 400, 500, 80


def imported(file: Path) -> set[str]:
    """Dotted names of everything that a file imports."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative imports hide what depends on what"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def files_of(room: str) -> list[Path]:
    path = PACKAGE / room
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


def rooms_of(file: Path) -> set[str]:
    """The rooms that a file imports from."""
    return {name.split(".")[1] for name in imported(file) if name.startswith("bnnlaplace.")}


def test_imports_point_one_way():
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert found - {"__init__"} == set(ROOMS)
    faults, arrows = [], set()
    for position, room in enumerate(ROOMS):
        allowed = LEAVES.get(room, set(ROOMS[:position])) | {room}
        for file in files_of(room):
            used = rooms_of(file)
            arrows |= {(room, other) for other in used - {room}}
            faults += [f"{file.relative_to(ROOT)} imports {other}" for other in sorted(used - allowed)]
    assert not faults
    assert len(arrows) <= MOST_ARROWS


def test_files_are_one_idea_each():
    lengths = {path.relative_to(ROOT): len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    lengths |= {
        path.relative_to(ROOT): len(path.read_text().splitlines()) for path in (ROOT / "training").rglob("*.py")
    }
    front = Path("bnnlaplace/laplace.py")
    assert lengths.pop(front) <= LONGEST_FRONT_OBJECT
    assert {str(path): length for path, length in lengths.items() if length > LONGEST_FILE} == {}


def test_the_package_knows_no_application_and_draws_in_one_room():
    for file in PACKAGE.rglob("*.py"):
        roots = {name.split(".")[0] for name in imported(file)}
        assert not roots & {"training", "benchmarks", "studies"}, file
        assert "matplotlib" not in roots or file.parent.name == "plots", file


def test_import_changes_no_setting_and_stays_light():
    """What users need for some calls alone is imported by those: plots, checkpoints, optimisers, data sets."""
    program = (
        "import jax, sys; before = dict(jax.config.values); import bnnlaplace; "
        "assert {name: jax.config.values[name] for name in before} == before; "
        "heavy = {'matplotlib', 'optax', 'orbax', 'flax', 'tensorflow', 'tensorflow_datasets', 'sklearn', 'PIL', "
        "'pydantic', 'tyro', 'rich', 'jinja2'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT, timeout=120)
