"""The examples in the docstrings run."""

import doctest
import importlib
import pkgutil

import bnnlaplace


def test_docstring_examples():
    modules = [
        importlib.import_module(module.name) for module in pkgutil.walk_packages(bnnlaplace.__path__, "bnnlaplace.")
    ]
    found = {module.__name__: doctest.testmod(module) for module in modules}
    assert {name: result.failed for name, result in found.items() if result.failed} == {}
    with_examples = {name for name, result in found.items() if result.attempted}
    assert with_examples >= {"bnnlaplace.laplace", "bnnlaplace.model.network", "bnnlaplace.calibration.metrics"}
