"""The examples in the docstrings run."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["bnnlaplace.laplace", "bnnlaplace.network", "bnnlaplace.calibration"])
def test_docstring_examples(name):
    results = doctest.testmod(importlib.import_module(name), extraglobs={"np": __import__("numpy")})
    assert results.attempted > 0 and results.failed == 0
