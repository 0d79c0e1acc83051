"""Shared fixtures, and how programs are compiled in tests: fast to compile rather than fast to run."""

import os
import subprocess
import sys

# Compile time dominates the tests. The expensive passes of LLVM and the fusion emitters take most of it. Without them
# the numbers differ by rounding alone. The variable is set before JAX is imported, and inherited by the workers and by
# the programs that tests start.
_QUICK_COMPILATION = (
    "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)


def _compile_quickly() -> None:
    """Set the flags if this XLA knows them all: it ends the process at one that it does not know."""
    if "XLA_FLAGS" in os.environ:
        return
    environment = {**os.environ, "XLA_FLAGS": _QUICK_COMPILATION}
    probe = [sys.executable, "-c", "import jax; jax.devices()"]
    known = subprocess.run(probe, env=environment, capture_output=True, timeout=120).returncode == 0
    os.environ["XLA_FLAGS"] = _QUICK_COMPILATION if known else ""


_compile_quickly()

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
from cases import Problem, random_problem  # noqa: E402
from trained import diagonal, full, lanczos, trained, unconverged  # noqa: E402, F401

import bnnlaplace  # noqa: E402


def pytest_configure(config: pytest.Config) -> None:
    # Most tests expand where random weights are. Named in pyproject.toml, the category would be imported before the
    # package is instrumented to check annotations.
    config.addinivalue_line("filterwarnings", "ignore::bnnlaplace.NotAModeWarning")


@pytest.fixture(scope="module", autouse=True)
def programs_are_freed():
    """What one module compiled serves no other one, and thousands of programs take gigabytes."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Double precision inside the test alone."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def x64_module():
    """Double precision in all tests of a module, and in the fixtures that they share."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def classification(x64) -> Problem:
    """Eleven examples of three classes, in double precision."""
    return random_problem(bnnlaplace.categorical(), np.random.default_rng(1).integers(0, 3, size=11))


@pytest.fixture
def unchecked_annotations():
    """For tests of bad input: a run that checks annotations would refuse it before the code under test can."""
    before = jaxtyping.config.jaxtyping_disable
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", before)
