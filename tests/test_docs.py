"""Every public name stands on a page of the reference, and its docstring names what it takes."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import bnnlaplace
from bnnlaplace import checkpoint, plots

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs" / "reference").glob("*.md"))

# No page shows what only other parts of the package ask: how a network computes, and whether arguments are good.
BEHIND = {
    "bnnlaplace.curvature": {"layers", "layout", "tapped"},
    "bnnlaplace.prior.gaussian": {"is_scalar", "is_by_group", "check"},
    "bnnlaplace.prior.scalar": {"checked_grid", "lowest"},
}


def members(module: ModuleType) -> list[object]:
    """The public functions, classes and modules of a module: what it lists or, without a list, what it defines."""
    if hasattr(module, "__all__"):
        listed = [getattr(module, name) for name in module.__all__]
        return [found for found in listed if inspect.ismodule(found) or hasattr(found, "__qualname__")]
    if hasattr(module, "__path__"):
        parts = [
            importlib.import_module(f"{module.__name__}.{part.name}") for part in pkgutil.iter_modules(module.__path__)
        ]
        return [member for part in parts for member in members(part)]
    defined = {name: found for name, found in vars(module).items() if not name.startswith("_")}
    return [found for found in defined.values() if getattr(found, "__module__", None) == module.__name__]


def public() -> dict[str, object]:
    """Everything public by its full name."""
    found = {}
    for module in (bnnlaplace, checkpoint, plots):
        for member in members(module):
            for one in members(member) if inspect.ismodule(member) else [member]:
                if inspect.isclass(one) or inspect.isfunction(one):
                    found[full_name(one)] = one
    return found


def full_name(found: object) -> str:
    return found.__name__ if inspect.ismodule(found) else f"{found.__module__}.{found.__qualname__}"


def resolved(name: str) -> object:
    """What a page names: a module, or something in one."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        module, _, attribute = name.rpartition(".")
        return getattr(resolved(module), attribute)


def on_pages() -> set[str]:
    """The full names of what the reference pages show; a module is shown with all that it defines."""
    shown = set()
    for page in PAGES:
        for name in re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            found = resolved(name)
            shown |= {full_name(one) for one in members(found)} if inspect.ismodule(found) else {full_name(found)}
    return shown


def section(found: object, title: str) -> set[str]:
    """The names that a section of a docstring explains."""
    match = re.search(
        rf"^{title}\n-+\n(.*?)(?=\n\n\S[^\n]*\n---|\Z)", inspect.getdoc(found) or "", re.DOTALL | re.MULTILINE
    )
    heads = re.findall(r"^(\S.*)$", match.group(1), re.MULTILINE) if match else []
    return {name.lstrip("*") for head in heads for name in head.split(", ")}


PUBLIC = public()
FUNCTIONS = [name for name, found in PUBLIC.items() if inspect.isfunction(found)]
RECORDS = [
    name for name, found in PUBLIC.items() if hasattr(found, "_fields") or hasattr(found, "__dataclass_fields__")
]


def test_every_public_name_is_on_a_page():
    hidden = {f"{module}.{name}" for module, names in BEHIND.items() for name in names}
    readers = {name for name in PUBLIC if not hidden & {name, name.rpartition(".")[0]}}
    missing = readers - on_pages()
    assert not missing, f"name them on a page in docs/reference: {sorted(missing)}"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in [*PAGES, *(ROOT / "docs" / "tutorials").glob("*.py"), *(ROOT / "docs" / "how_to").glob("*.*")]:
        assert f"{page.parent.name}/{page.stem}.md" in navigation, page


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_begins_with_a_sentence(name):
    found = PUBLIC[name]
    documented = [found]
    if inspect.isclass(found):
        documented += [
            getattr(found, method)
            for method, value in vars(found).items()
            if not method.startswith("_") and (inspect.isroutine(value) or isinstance(value, property))
        ]
    for one in documented:
        summary = (inspect.getdoc(one) or "").partition("\n\n")[0]
        assert re.search(r"[.:]$", summary), f"{one} begins with {summary!r}"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_docstring_names_all_parameters(name):
    found = PUBLIC[name]
    assert section(found, "Parameters") == set(inspect.signature(found).parameters)


@pytest.mark.parametrize("name", [name for name, found in vars(bnnlaplace.Laplace).items() if inspect.isroutine(found)])
def test_a_method_of_laplace_names_all_parameters_or_none(name):
    found = getattr(bnnlaplace.Laplace, name)
    assert section(found, "Parameters") in (set(), set(inspect.signature(found).parameters) - {"self"})


@pytest.mark.parametrize("name", RECORDS)
def test_a_docstring_names_all_attributes(name):
    found = PUBLIC[name]
    if found is bnnlaplace.Laplace:  # built by its constructor, whose parameters are its attributes
        assert section(found, "Parameters") <= set(inspect.signature(found).parameters)
        return
    fields = getattr(found, "_fields", None) or tuple(found.__dataclass_fields__)
    assert section(found, "Attributes") == set(fields)
