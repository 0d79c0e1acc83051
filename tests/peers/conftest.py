"""Without the peer nothing here is collected: `make test-peers` installs it."""

import importlib.util
import warnings

import pytest

missing = [name for name in ("torch", "laplace") if importlib.util.find_spec(name) is None]
collect_ignore_glob = ["test_*.py"] if missing else []

if not missing:
    with warnings.catch_warnings():  # Their deprecations are not ours to mend.
        warnings.simplefilter("ignore")
        import laplace  # noqa: F401
        import torch


@pytest.fixture
def double(x64):
    """Double precision as the default of both packages, inside the test alone."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
