"""Fixtures of the tests of Krylov methods."""

import jaxtyping
import pytest


@pytest.fixture
def types_unchecked(monkeypatch):
    """Calls with wrong types reach the package's own checks, also where annotations are checked at run time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
