"""A hook of MkDocs: scripts become pages that show what they print and draw, and formulas become MathML.

Every script in `tutorials` and `how_to` is run while the site is built, in a process of its own. Its docstring is the
title and the introduction of the page. A comment block that starts with `# %%` is text under that heading, everything
else is code. Below each block of code the page shows what the block printed, and the matplotlib figures that it made.
A script that fails is a warning, so it fails a build with `--strict`.

Formulas between dollar signs are converted while the site is built. The pages need no script and no network for them.
"""

import ast
import contextlib
import html
import io
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

FOLDERS = ("tutorials", "how_to")
log = logging.getLogger("mkdocs.hooks.tutorial_pages")


@dataclass
class Cell:
    """A heading, its text, the code below it, and what that code printed and drew."""

    heading: str = ""
    text: list[str] = field(default_factory=list)
    code: list[str] = field(default_factory=list)
    first_line: int = 1
    output: str = ""
    figures: list[str] = field(default_factory=list)


# --- the hook -------------------------------------------------------------------------------------------------------


def on_files(files, config):
    """Run every script and add its page and its figures."""
    from mkdocs.structure.files import File

    root = Path(config.docs_dir).parent
    scripts = [path for folder in FOLDERS for path in sorted(Path(config.docs_dir, folder).glob("*.py"))]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        runs = list(pool.map(lambda script: run_in_a_process(script, root), scripts))
    for script, (cells, figures, error) in zip(scripts, runs, strict=True):
        if error:
            log.warning(f"{script.relative_to(root)} must run for its page to show what it prints; it failed:\n{error}")
        name = f"{script.parent.name}/{script.stem}"
        page = markdown(script.relative_to(root), script.read_text(encoding="utf-8"), cells)
        files.append(File.generated(config, f"{name}.md", content=page))
        for figure, content in figures.items():
            files.append(File.generated(config, f"{script.parent.name}/{figure}", content=content))
    return files


def on_page_content(page_html, **_):
    """Set the formulas that `pymdownx.arithmatex` has marked."""
    from latex2mathml.converter import convert

    def mathml(match):
        tag, formula = match["tag"], html.unescape(match["formula"]).strip()
        # A converter that knows no operators sets log p as logp.
        formula = re.sub(r"\\(log|exp|sin|det)\s+(?=[a-zA-Z])", r"\\\1\\,", formula)
        display = "block" if tag == "div" else "inline"
        return f'<{tag} class="arithmatex">{convert(formula, display=display)}</{tag}>'

    pattern = r'<(?P<tag>span|div) class="arithmatex">\\[(\[](?P<formula>.*?)\\[)\]]</(?P=tag)>'
    return re.sub(pattern, mathml, page_html, flags=re.DOTALL)


# --- from a script to a page ----------------------------------------------------------------------------------------


def split(source: str) -> list[Cell]:
    """Split a script, without its docstring, into cells; the first has no heading."""
    first = ast.parse(source).body[0]
    cells = [Cell(first_line=first.end_lineno + 1)]
    in_text = False
    for number, line in enumerate(source.splitlines()[first.end_lineno :], first.end_lineno + 1):
        if line.startswith("# %%"):
            cells.append(Cell(heading=line.removeprefix("# %%").strip()))
            in_text = True
        elif in_text and line.startswith("#"):
            cells[-1].text.append(line.removeprefix("#").removeprefix(" "))
        else:
            if in_text:
                cells[-1].first_line = number
            in_text = False
            cells[-1].code.append(line)
    return cells


def markdown(path: Path, source: str, cells: list[Cell]) -> str:
    """Write the page of one script."""
    title, _, introduction = ast.get_docstring(ast.parse(source)).partition("\n")
    note = (
        f"*This page is one script, [`{path.name}`]({path.name}). `python {path.as_posix()}` runs it. The output is "
        "that of the run which built this page.*"
    )
    parts = [f"# {title.removesuffix('.')}", introduction.strip(), note]
    for cell in cells:
        if cell.heading:
            parts.append(f"## {cell.heading}")
        code = cell.code if cell is not cells[-1] else without_asserts(cell.code)
        parts += ["\n".join(cell.text), fenced(code, "python"), fenced(cell.output.splitlines(), "text .output")]
        parts += [f"![What this block drew]({figure}){{ .figure }}" for figure in cell.figures]
    return "\n\n".join(part for part in parts if part) + "\n"


def without_asserts(lines: list[str]) -> list[str]:
    """Leave out the asserts at the end of a script: they are for the tests, not for the reader."""
    statements = ast.parse("\n".join(lines)).body
    while statements and isinstance(statements[-1], ast.Assert):
        lines = lines[: statements.pop().lineno - 1]
    return lines


def fenced(lines: list[str], classes: str) -> str:
    """Return a block of code, or nothing if the lines are empty."""
    code = "\n".join(lines).strip("\n")
    return f"```{{.{classes}}}\n{code}\n```" if code else ""


# --- running a script -----------------------------------------------------------------------------------------------


def run_in_a_process(script: Path, root: Path) -> tuple[list[Cell], dict[str, bytes], str]:
    """Run one script; return its cells with their output, its figures by file name, and the error if it failed."""
    cells = split(script.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "MPLBACKEND": "agg", "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        done = subprocess.run(
            [sys.executable, __file__, script, folder], env=environment, capture_output=True, text=True, cwd=folder
        )
        written = Path(folder, "cells.json")
        outputs = json.loads(written.read_text(encoding="utf-8")) if written.exists() else []
        for cell, (output, figures) in zip(cells, outputs, strict=False):
            cell.output, cell.figures = output, figures
        figures = {name: Path(folder, name).read_bytes() for cell in cells for name in cell.figures}
    return cells, figures, done.stderr if done.returncode else ""


def run(script: Path, folder: Path) -> None:
    """Run the cells of one script in turn and write what each of them printed and drew to `folder`."""
    names = {"__name__": "__main__", "__file__": str(script)}
    seen: set[int] = set()
    outputs = []
    for number, cell in enumerate(split(script.read_text(encoding="utf-8"))):
        printed = io.StringIO()
        code = "\n" * (cell.first_line - 1) + "\n".join(cell.code)  # so that a traceback names the right line
        try:
            with contextlib.redirect_stdout(printed):
                exec(compile(code, str(script), "exec"), names)
        finally:
            figures = save_new_figures(names, seen, folder, f"{script.stem}_{number}")
            outputs.append((printed.getvalue(), figures))
            (folder / "cells.json").write_text(json.dumps(outputs), encoding="utf-8")


def save_new_figures(names: dict[str, object], seen: set[int], folder: Path, stem: str) -> list[str]:
    """Save the matplotlib figures that a variable holds and that were not there before; return the file names."""
    if "matplotlib" not in sys.modules:
        return []
    from matplotlib.figure import Figure

    saved = []
    for value in list(names.values()):
        if isinstance(value, Figure) and id(value) not in seen:
            seen.add(id(value))
            saved.append(f"{stem}_{len(saved)}.svg")
            value.savefig(folder / saved[-1], bbox_inches="tight")
    return saved


if __name__ == "__main__":
    run(Path(sys.argv[1]), Path(sys.argv[2]))
