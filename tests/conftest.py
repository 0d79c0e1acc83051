"""Shared fixtures: memory of compiled programs, double precision on request, and a small problem with its exact GGN."""

import jax
import jaxtyping
import numpy as np
import pytest
from problems import Problem, random_problem

import bnnlaplace


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
