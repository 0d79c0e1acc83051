"""The scripts of the documentation run as they stand, and find what their text says."""

import dataclasses
import os
import runpy
import sys
import warnings
from pathlib import Path

import jax.numpy as jnp
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"

# A line that each script prints: the point of it.
STATED = {
    "tutorials/linen.py": "largest difference between predictions before and after: 0.0",
    "tutorials/nnx.py": "refused: a network must give the same outputs at every call",
    "tutorials/regression.py": "the evidence prefers a noise of 0.2; the data were made with 0.2",
    "tutorials/last_layer.py": "650 of 8,970 weights: ['head/bias', 'head/kernel']",
    "tutorials/training_loop.py": "the data were made with 0.3",
    "tutorials/marglik_training.py": "continued after epoch 2: the same weights: True",
    "tutorials/continual.py": "mean accuracy after the last task: fine-tuned",
    "how_to/likelihood.py": "31 weights, squared distance to the mode",
    "how_to/prior.py": "NotAModeWarning: ",
    "how_to/gridsearch.py": "prior precision by the validation NLL",
    "how_to/variational.py": "SaturatedPosteriorWarning: the posterior does not fit",
    "how_to/data.py": "largest difference to the evidence from one array",
    "how_to/errors.py": "with 32 basis vectors: the Krylov decomposition has not converged",
    "how_to/krylov.py": "exact log det 615.58",
    "how_to/functions.py": "by draws at single inputs 0.18",
}


def test_every_script_is_run():
    scripts = {f"{folder}/{path.name}" for folder in ("tutorials", "how_to") for path in (DOCS / folder).glob("*.py")}
    assert scripts == set(STATED)


@pytest.mark.parametrize("script", STATED)
def test_script(script, capsys):
    """The asserts at its end are part of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(DOCS / script), run_name="__main__")
    assert STATED[script] in capsys.readouterr().out


def test_the_picture_of_the_readme_is_drawn(tmp_path):
    names = runpy.run_path(str(DOCS / "readme_figure.py"))
    names["main"].__globals__.update(OUTPUT=tmp_path / "images" / "readme.png", STEPS=2000)
    names["main"]()
    assert 0 < (tmp_path / "images" / "readme.png").stat().st_size < 200_000


@pytest.mark.parametrize("field", ["hessian_mv", "factor_mv", "factor_transpose_mv"])
def test_the_check_of_a_likelihood_finds_what_is_wrong(field):
    names = {}
    source, _, _ = (DOCS / "how_to" / "likelihood.py").read_text(encoding="utf-8").partition("# %% Use it")
    exec(compile(source, "likelihood.py", "exec"), names)
    right = names["poisson"]()
    wrong = dataclasses.replace(right, **{field: lambda f, v: 2 * getattr(right, field)(f, v)})
    with pytest.raises(AssertionError):
        names["check"](wrong, jnp.array([0.3, -1.2]), jnp.array([1, 4]))


def test_a_page_shows_what_its_script_prints_and_draws_and_a_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(DOCS), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    import tutorial_pages

    script = tmp_path / "tutorials" / "example.py"
    script.parent.mkdir()
    source = '''"""A title.

An introduction.
"""

from matplotlib.figure import Figure

# %% First
# A formula $x^2$.

figure = Figure()
print("drawn")

# %% Second

print(1 / 0)
assert figure
'''
    script.write_text(source, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    cells, figures, error = tutorial_pages.run_in_a_process(script, tmp_path)
    page = tutorial_pages.markdown(script.relative_to(tmp_path), source, cells)
    assert list(figures) == ["example_1_0.svg"] and b"<svg" in figures["example_1_0.svg"]
    assert "# A title\n\nAn introduction." in page and "## First\n\nA formula $x^2$." in page
    assert "```{.text .output}\ndrawn\n```\n\n![What this block drew](example_1_0.svg)" in page
    assert "assert" not in page
    assert "ZeroDivisionError" in error and 'example.py", line 16' in error
