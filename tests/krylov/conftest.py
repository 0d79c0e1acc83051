"""Fixtures of the tests of Krylov methods."""

import jaxtyping
import pytest

from bnnlaplace.krylov import gram_schmidt


@pytest.fixture
def types_unchecked(monkeypatch):
    """Calls with wrong types reach the package's own checks, also where annotations are checked at run time."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def blocks(monkeypatch):
    """The basis in several blocks, as it is for large problems."""
    monkeypatch.setattr(gram_schmidt, "WHOLE_BYTES", 0)
