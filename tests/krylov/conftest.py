"""Fixtures of the tests of Krylov methods."""

import pytest

from bnnlaplace.krylov import gram_schmidt


@pytest.fixture
def blocks(monkeypatch):
    """The basis in several blocks, as it is for large problems."""
    monkeypatch.setattr(gram_schmidt, "WHOLE_BYTES", 0)
