"""The files of training import one another in one direction, so there are no circles."""

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Each room imports only from those before it. The programs at the end import nothing of one another.
ROOMS = (
    *("errors", "faults", "sealed", "lock", "config", "settings", "workdir"),
    *("cli", "data", "models", "pretrained", "train", "trained_on", "posteriors", "report", "study"),
)
PROGRAMS = ("fit_van", "evaluate", "import_weights", "summarise")


def imported_rooms(file: Path) -> set[str]:
    """The rooms of training that a file imports from."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in names if name.startswith("training.")}


def test_imports_point_one_way() -> None:
    found = {
        path.stem for path in (ROOT / "training").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert found - {"__init__"} == set(ROOMS) | set(PROGRAMS)
    faults = []
    for position, room in enumerate((*ROOMS, *PROGRAMS)):
        path = ROOT / "training" / room
        for file in path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            allowed = {*ROOMS[:position], room}
            faults += [f"{file.relative_to(ROOT)} imports {other}" for other in imported_rooms(file) - allowed]
    assert not faults
