"""The reference shows what the packages export, the old import paths work, and docstrings explain their arguments."""

import importlib
import inspect
import pkgutil
import re
from pathlib import Path

import bnnlaplace

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"

# Paths that users of earlier versions import. What each of them names must stay importable from there.
OLD_PATHS = {
    "bnnlaplace.calibration": "ReliabilityBins accuracy bootstrap brier_score calibration_gaps evaluate "
    "expected_calibration_error mean_confidence negative_log_likelihood reliability_bins",
    "bnnlaplace.checkpoint": "CheckpointError find_damage load_pytree restructure save_pytree",
    "bnnlaplace.curvature.dense": "ggn",
    "bnnlaplace.curvature.diagonal": "ggn_diagonal",
    "bnnlaplace.curvature.ggn": "block_product dual_operator dual_pullback ggn_operator",
    "bnnlaplace.curvature.kronecker": "factors",
    "bnnlaplace.curvature.linearisation": "Linearisation linearise",
    "bnnlaplace.curvature.streamed": "operator",
    "bnnlaplace.evidence": "EvidenceCurve IsotropicEvidence curve isotropic log_marginal_likelihood",
    "bnnlaplace.krylov": "Arnoldi BlockDecomposition Eigenpairs Lanczos MatrixFunction Ritz TraceEstimate arnoldi "
    "block_golub_kahan block_lanczos check_symmetric gauss_radau inverse_sqrt_coefficients inverse_sqrt_error lanczos "
    "leading_eigenpairs matfun_arnoldi matfun_lanczos normal_probes rademacher_probes ritz "
    "stochastic_lanczos_quadrature summed_exactly trace_forms tridiagonal_matrix",
    "bnnlaplace.plots": "PrecisionCurve evidence_curve reliability_diagram spectrum training_curve",
    "bnnlaplace.predictive": "predictions",
    "bnnlaplace.prior": "GroupedOptimum Prior PriorOptimum accelerated bracket by_layer fixed_point_step group_names "
    "group_numbers grouped_optimum maximiser optimum resolve",
    "bnnlaplace.structure": "BY_NAME CovarianceStructure DenseStructure DiagonalStructure KroneckerStructure "
    "KrylovError KrylovStructure OutputCovariance SampleStructure SpectralStructure Structure",
}
OLD_MODULES = {  # from bnnlaplace import detection
    "detection": "auroc fpr_at_95_tpr weighted_detection",
    "link": "bridge monte_carlo probit",
    "temperature": "Temperature fit_temperature",
    "validation": "ValidationCurve validation_curve",
}


def exported() -> dict[str, object]:
    """Return what the package and its folders name in `__all__`, by full name; modules are looked at on their own."""
    folders = [module.name for module in pkgutil.iter_modules(bnnlaplace.__path__, "bnnlaplace.") if module.ispkg]
    names = {}
    for folder in (bnnlaplace, *map(importlib.import_module, folders)):
        for name in folder.__all__:
            value = getattr(folder, name)
            if not inspect.ismodule(value):
                names[f"{folder.__name__}.{name}"] = value
    return names


def imported(path: str) -> object:
    """Return the module, or the attribute of a module, that a dotted path names."""
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        parent, _, name = path.rpartition(".")
        return getattr(imported(parent), name)


def section(documented: object, title: str) -> set[str]:
    """Return the names that one section of a numpy docstring explains."""
    docstring = inspect.getdoc(documented) or ""
    match = re.search(rf"^{title}\n-+\n(.*?)(?=\n\n\S[^\n]*\n---|\Z)", docstring, re.DOTALL | re.MULTILINE)
    heads = re.findall(r"^(\S.*)$", match.group(1), re.MULTILINE) if match else []
    return {name.lstrip("*") for head in heads for name in head.split(", ")}


def public_methods(cls: type) -> dict[str, object]:
    """Return the documented methods and properties that a class defines itself."""
    members = {name: value for name, value in vars(cls).items() if not name.startswith("_")}
    kinds = {name: value for name, value in members.items() if inspect.isroutine(value) or isinstance(value, property)}
    return {f"{cls.__qualname__}.{name}": getattr(cls, name) for name in kinds}


EXPORTED = exported()
CALLABLES = {name: value for name, value in EXPORTED.items() if inspect.isclass(value) or inspect.isfunction(value)}


def on_pages() -> dict[str, Path]:
    """Return the names that the reference pages show, and the page of each."""
    pages = sorted((DOCS / "reference").glob("*.md"))
    shown = re.compile(r"^::: (\S+)$", re.MULTILINE)
    return {name: page for page in pages for name in shown.findall(page.read_text(encoding="utf-8"))}


def test_every_exported_name_is_on_a_reference_page_and_every_name_on_a_page_imports():
    shown, broken = [], []
    for name, page in on_pages().items():
        try:
            shown.append(imported(name))
        except (ImportError, AttributeError) as error:
            broken.append(f"{page.name} shows {name}: {error}")
    missing = [name for name, value in EXPORTED.items() if not any(value is other for other in shown)]
    assert not broken and not missing, f"broken: {broken}; not on a page in docs/reference: {missing}"


def test_the_import_paths_of_earlier_versions_work():
    modules = {path: (importlib.import_module(path), names) for path, names in OLD_PATHS.items()}
    modules |= {f"bnnlaplace.{name}": (getattr(bnnlaplace, name), names) for name, names in OLD_MODULES.items()}
    broken = [
        f"{path}.{name}"
        for path, (module, names) in modules.items()
        for name in names.split()
        if inspect.ismodule(getattr(module, name, module))  # absent, or a file of that name in place of its function
    ]
    assert not broken


def test_every_page_is_in_the_navigation_and_nothing_else_is():
    pages = [*DOCS.rglob("*.md"), *(DOCS / "tutorials").glob("*.py"), *(DOCS / "how_to").glob("*.py")]
    expected = {page.relative_to(DOCS).with_suffix(".md").as_posix() for page in pages}
    _, _, navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")
    assert set(re.findall(r"\S+\.md", navigation)) == expected


def test_the_readme_is_one_screen_and_links_of_the_guides_lead_somewhere():
    guides = [ROOT / name for name in ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md")]
    targets = {target for guide in guides for target in re.findall(r"\]\(([^)#]+)", guide.read_text(encoding="utf-8"))}
    assert [target for target in sorted(targets) if "://" not in target and not (ROOT / target).exists()] == []
    lengths = [len(guide.read_text(encoding="utf-8").splitlines()) for guide in guides]
    assert lengths[0] <= 100 and lengths[1] <= 80
    assert (DOCS / "images" / "readme.png").stat().st_size < 200_000


def test_docstrings_begin_with_a_sentence_and_explain_every_parameter_and_attribute():
    faults = []
    for name, value in CALLABLES.items():
        documented = {name: value} | (public_methods(value) if inspect.isclass(value) else {})
        for where, member in documented.items():
            summary = (inspect.getdoc(member) or "").partition("\n\n")[0]
            if not re.search(r"[.:]$", summary):
                faults.append(f"{where} begins with {summary!r}")
        if inspect.isfunction(value):
            faults += difference(name, section(value, "Parameters"), set(inspect.signature(value).parameters))
        elif hasattr(value, "_fields") or hasattr(value, "__dataclass_fields__"):
            if value is bnnlaplace.Laplace:  # built by its constructor, whose parameters are its attributes
                faults += difference(
                    name, section(value, "Parameters") - set(inspect.signature(value).parameters), set()
                )
                continue
            fields = getattr(value, "_fields", None) or tuple(value.__dataclass_fields__)
            faults += difference(name, section(value, "Attributes"), set(fields))
    for name, method in public_methods(bnnlaplace.Laplace).items():
        if inspect.isroutine(method) and section(method, "Parameters"):  # all of them or none
            faults += difference(
                name, section(method, "Parameters"), set(inspect.signature(method).parameters) - {"self"}
            )
    assert not faults, "\n".join(faults)


def difference(where: str, explained: set[str], expected: set[str]) -> list[str]:
    """Return one line if a docstring explains other names than it should."""
    if explained == expected:
        return []
    return [f"{where} lacks {sorted(expected - explained)} and explains {sorted(explained - expected)}"]
