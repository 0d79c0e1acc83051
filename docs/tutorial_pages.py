"""A hook of MkDocs: every script in `tutorials` and `how_to` becomes a page, and Pygments gives the colours of code.

The docstring is the title and the introduction. A comment block that starts with `# %%` is text under that heading,
everything else code. The scripts themselves are copied beside the pages.
"""

import ast
from pathlib import Path

from mkdocs.structure.files import File
from pygments.formatters import HtmlFormatter


def on_files(files, config):
    """Add a generated page for each script, and a style sheet."""
    colours = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    files.append(File.generated(config, "css/highlight.css", content=colours))
    for folder in ("tutorials", "how_to"):
        for script in sorted(Path(config.docs_dir, folder).glob("*.py")):
            content = markdown(f"docs/{folder}/{script.name}", script.read_text(encoding="utf-8"))
            files.append(File.generated(config, f"{folder}/{script.stem}.md", content=content))
    return files


def markdown(path: str, source: str) -> str:
    """The page of one script."""
    first = ast.parse(source).body[0]
    title, _, introduction = ast.get_docstring(ast.parse(source)).partition("\n")
    name = path.rpartition("/")[2]
    note = f"The code on this page is one script, [{name}]({name}): `python {path}` runs it."
    parts = [f"# {title.removesuffix('.')}", introduction.strip(), note]
    code: list[str] = []
    lines = iter(source.splitlines()[first.end_lineno :])
    for line in lines:
        if not line.startswith("# %%"):
            code.append(line)
            continue
        parts += fenced(code)
        code = []
        parts.append(f"## {line.removeprefix('# %%').strip()}")
        text = []
        for line in lines:
            if not line.startswith("#"):
                code.append(line)
                break
            text.append(line.removeprefix("#").removeprefix(" "))
        parts.append("\n".join(text))
    return "\n\n".join(parts + fenced(code)) + "\n"


def fenced(lines: list[str]) -> list[str]:
    """A block of code, or nothing where there is none."""
    code = "\n".join(lines).strip("\n")
    return [f"```python\n{code}\n```"] if code else []
