"""The scripts of the documentation run as they stand, and find what their text says."""

import dataclasses
import runpy
import warnings
from pathlib import Path

import jax.numpy as jnp
import pytest

DOCS = Path(__file__).resolve().parents[1] / "docs"

# A line that each script prints: the point of it.
STATED = {
    "tutorials/linen.py": "largest difference between predictions before and after: 0.0",
    "tutorials/nnx.py": "refused: a network must give the same outputs at every call",
    "tutorials/regression.py": "the evidence prefers a noise of 0.2; the data were made with 0.2",
    "tutorials/last_layer.py": "650 of 8,970 weights: ['head/bias', 'head/kernel']",
    "tutorials/training_loop.py": "the data were made with 0.3",
    "how_to/likelihood.py": "31 weights, squared distance to the mode",
    "how_to/prior.py": "NotAModeWarning: the weights are no mode of the log joint at prior precision 1",
    "how_to/data.py": "largest difference to the evidence from one array",
    "how_to/errors.py": "with 32 basis vectors: the Krylov decomposition has not converged",
}


def test_every_script_is_run():
    found = {f"{folder}/{path.name}" for folder in ("tutorials", "how_to") for path in (DOCS / folder).glob("*.py")}
    assert found == set(STATED)


@pytest.mark.parametrize("script", STATED)
def test_script(script, capsys):
    """The asserts at its end are part of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        runpy.run_path(str(DOCS / script), run_name="__main__")
    assert STATED[script] in capsys.readouterr().out


@pytest.mark.parametrize("field", ["hessian_mv", "factor_mv", "factor_transpose_mv"])
def test_the_check_of_a_likelihood_finds_what_is_wrong(field):
    names = {}
    source, _, _ = (DOCS / "how_to" / "likelihood.py").read_text(encoding="utf-8").partition("# %% Use it")
    exec(compile(source, "likelihood.py", "exec"), names)
    right = names["poisson"]()
    wrong = dataclasses.replace(right, **{field: lambda f, v: 2 * getattr(right, field)(f, v)})
    with pytest.raises(AssertionError):
        names["check"](wrong, jnp.array([0.3, -1.2]), jnp.array([1, 4]))
