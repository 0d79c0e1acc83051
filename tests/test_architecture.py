"""Imports point one way, and importing the package changes no global setting."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Each part may import itself, those listed, and nothing else of the project.
ALLOWED = {
    "bnnlaplace.types": set(),
    "bnnlaplace.tree": set(),
    "bnnlaplace.precise": set(),
    "bnnlaplace.eigenvectors": set(),
    "bnnlaplace.memory": set(),
    "bnnlaplace.random_key": set(),
    "bnnlaplace.network": {"types", "tree", "precise"},
    "bnnlaplace.outline": {"tree", "network"},
    "bnnlaplace.deterministic": {"tree", "network", "outline"},
    "bnnlaplace.equations": {"network", "outline"},
    "bnnlaplace.features": {"tree", "memory", "network", "outline", "equations"},
    "bnnlaplace.subset": {"tree", "network", "outline", "equations"},
    "bnnlaplace.likelihood": {"types", "tree"},
    "bnnlaplace.data": {"tree", "network", "outline", "likelihood"},
    "bnnlaplace.curvature": {"types", "tree", "precise", "network", "outline", "likelihood", "data", "equations"},
    "bnnlaplace.data_terms": {"tree", "network", "likelihood", "curvature"},
    "bnnlaplace.krylov": {"types", "tree", "precise"},
    "bnnlaplace.log_joint": set(),
    "bnnlaplace.determinant": {"types", "tree", "precise", "random_key", "likelihood", "curvature", "krylov"},
    "bnnlaplace.evidence": {
        *("types", "tree", "network", "likelihood", "curvature", "krylov", "log_joint", "determinant"),
    },
    "bnnlaplace.prior": {"tree", "log_joint"},
    "bnnlaplace.structure": {
        *(
            "types",
            "tree",
            "precise",
            "eigenvectors",
            "network",
            "likelihood",
            "data",
            "curvature",
            "krylov",
            "log_joint",
            "prior",
        ),
    },
    "bnnlaplace.linear_mode": set(),
    "bnnlaplace.mode": {"structure"},
    "bnnlaplace.fitting": {
        *("tree", "memory", "network", "deterministic", "subset", "features", "likelihood", "data", "data_terms"),
        *("curvature", "log_joint", "prior", "linear_mode", "structure", "random_key", "outline"),
    },
    "bnnlaplace.choice": {"log_joint", "mode", "prior"},
    "bnnlaplace.link": {"likelihood"},
    "bnnlaplace.forward": {"tree", "network", "outline", "features"},
    "bnnlaplace.posterior": {
        *("types", "tree", "precise", "eigenvectors", "network", "outline", "equations", "curvature", "structure"),
        "forward",
    },
    "bnnlaplace.predictive": {"tree", "random_key", "likelihood", "structure", "link", "forward", "posterior"},
    "bnnlaplace.metric_inputs": set(),
    "bnnlaplace.resampling": set(),
    "bnnlaplace.detection": {"metric_inputs"},
    "bnnlaplace.temperature": {"metric_inputs"},
    "bnnlaplace.calibration": {"metric_inputs", "detection", "resampling"},
    "bnnlaplace.validation": {
        *("tree", "outline", "likelihood", "structure", "prior", "forward", "posterior", "link", "calibration"),
    },
    "bnnlaplace.files": set(),
    "bnnlaplace.checkpoint": {"files", "tree"},
    "bnnlaplace.saved": {"tree", "network", "likelihood", "data_terms", "prior", "structure", "checkpoint"},
    "bnnlaplace.plots": {"calibration"},
}


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


def files_of(part: str) -> list[Path]:
    path = ROOT.joinpath(*part.split("."))
    return sorted(path.rglob("*.py")) if path.is_dir() else [path.with_suffix(".py")]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_point_one_way(part):
    own = part.removeprefix("bnnlaplace.")
    for file in files_of(part):
        used = {name.split(".")[1] for name in imported(file) if name.startswith("bnnlaplace.")}
        assert used <= ALLOWED[part] | {own}, f"{file} imports {used - ALLOWED[part] - {own}}"


def test_every_part_is_listed():
    parts = {
        f"bnnlaplace.{path.stem}" for path in (ROOT / "bnnlaplace").iterdir() if path.suffix == ".py" or path.is_dir()
    }
    parts -= {"bnnlaplace.__init__", "bnnlaplace.__pycache__"}
    assert parts == set(ALLOWED) | {"bnnlaplace.laplace"}


def test_the_package_knows_no_application():
    for file in (ROOT / "bnnlaplace").rglob("*.py"):
        assert not {name.split(".")[0] for name in imported(file)} & {"training", "benchmarks", "studies"}, file


def test_matplotlib_stays_in_plots():
    for file in (ROOT / "bnnlaplace").rglob("*.py"):
        if file.parent.name != "plots":
            assert not {name.split(".")[0] for name in imported(file)} & {"matplotlib"}, file


def test_import_changes_no_setting_and_stays_light():
    program = (
        "import jax, sys; before = dict(jax.config.values); import bnnlaplace; "
        "assert dict(jax.config.values) == before; "
        "assert not {'matplotlib', 'tensorflow', 'tensorflow_datasets', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=ROOT, timeout=120)
