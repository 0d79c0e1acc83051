"""The examples in the docstrings run. Those of `krylov` run in `tests/krylov`, which tests that folder alone."""

import doctest
import importlib
import pkgutil

import bnnlaplace


def test_docstring_examples():
    names = [module.name for module in pkgutil.walk_packages(bnnlaplace.__path__, "bnnlaplace.")]
    names = [name for name in names if not name.startswith(("bnnlaplace.krylov", "bnnlaplace.plots"))]
    results = {name: doctest.testmod(importlib.import_module(name)) for name in names}
    assert {name: result.failed for name, result in results.items() if result.failed} == {}
    with_examples = {name for name, result in results.items() if result.attempted}
    assert with_examples >= {"bnnlaplace.laplace", "bnnlaplace.model.network", "bnnlaplace.calibration.metrics"}
