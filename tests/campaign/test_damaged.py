"""Damaged and forged checkpoints: a load gives exactly the numbers that were saved, or one sentence."""

import resource
import shutil
import signal
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from campaign import damage

import bnnlaplace
from bnnlaplace.checkpoint import CheckpointError

SEEDS = 2
SECONDS, STILL = 10, 60
MEGABYTES = 600
STRUCTURES = ("diag", "kron", "full", "lanczos", "spectral")


def outputs(params, x):
    return jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b2"]


def fit(structure: str) -> bnnlaplace.Laplace:
    """A posterior of each structure. They differ in likelihood and prior, so that files hold all that they can hold."""
    rng = np.random.default_rng(1)
    shapes = {"w1": (3, 4), "w2": (4, 2), "b2": (2,)}
    params = {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    network = bnnlaplace.Network.from_function(outputs, params)
    x = rng.normal(size=(40, 3)).astype(np.float32)
    labels = rng.integers(0, 2, size=40)
    by_group = {"w1": 1.0, "w2": 2.0, "b2": 0.5}
    each = np.linspace(0.5, 2, 22)
    options = {
        "diag": {"likelihood": "regression", "prior_precision": by_group, "prior_mean": params, "sigma_noise": 0.7},
        "kron": {"prior_precision": by_group},
        "full": {"prior_precision": each, "likelihood": "binary"},
        "lanczos": {"likelihood": "regression"},
        "spectral": {"prior_precision": each},
    }[structure]
    name = "lanczos" if structure == "spectral" else structure
    la = bnnlaplace.Laplace(network, hessian_structure=name, **options)
    is_label = la.likelihood.name == "classification"
    y = labels if is_label else np.eye(2, dtype=np.float32)[labels]
    krylov = {"key": jax.random.key(1), "num_probes": 4, "max_vectors": 500 if structure == "spectral" else 12}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it has not converged, and need not
        return la.fit((x, y), **(krylov if name == "lanczos" else {}))


@pytest.fixture(scope="module", params=STRUCTURES)
def saved(request, tmp_path_factory):
    la = fit(request.param)
    path = tmp_path_factory.mktemp(request.param) / "posterior"
    la.save(path)
    return la, path


@contextmanager
def bounded():
    """Fail if the block takes too long or too much memory."""

    def too_long(number, frame):
        raise TimeoutError(f"loading stood still for {STILL} seconds")

    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    handler = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(STILL)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
    # In the time of the process, because others may use the machine as well.
    assert time.process_time() - start < SECONDS, "loading took too long"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < MEGABYTES, f"loading took {grown:.0f} MB"


def is_same(one: bnnlaplace.Laplace, other: bnnlaplace.Laplace) -> bool:
    """Whether two posteriors agree in every number and, to rounding, in the evidence."""
    left, right = jax.tree.leaves(one.fitted), jax.tree.leaves(other.fitted)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evidence = [la.log_marginal_likelihood().mean for la in (one, other)]
    return (
        jax.tree.structure(one.fitted) == jax.tree.structure(other.fitted)
        and all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(left, right, strict=True))
        and np.isclose(*evidence, rtol=1e-9)
        and one.settings.described_precision() == other.settings.described_precision()
    )


def outcome_of(path: Path, la: bnnlaplace.Laplace) -> tuple[str, str]:
    """What becomes of a load, and its message."""
    network = la.network.with_params(jax.tree.map(jnp.zeros_like, la.network.params))
    try:
        with bounded():
            again = bnnlaplace.Laplace.load(path, network)
    except CheckpointError as error:
        message = str(error)
        is_sentence = message.isprintable() and len(message) < 700 and "Traceback" not in message
        return ("error" if is_sentence else "raw"), message
    except Exception as error:
        return "raw", f"{type(error).__name__}: {error}"
    return ("same" if is_same(la, again) else "silent"), ""


@pytest.mark.parametrize("kind", damage.KINDS)
def test_a_load_gives_what_was_saved_or_one_sentence(saved, kind, tmp_path, tally, unchecked_annotations):
    la, path = saved
    for seed in range(SEEDS):
        copy = Path(shutil.copytree(path, tmp_path / str(seed) / "posterior"))
        try:
            damage.KINDS[kind](copy, np.random.default_rng(seed))
        except damage.NotPossible:
            continue
        outcome, message = outcome_of(copy, la)
        tally(kind.partition(":")[0], outcome)
        expected = "same" if kind in damage.UNCHANGED else "error"
        assert outcome == expected, f"{outcome}: {message}"


def test_the_kinds_are_enough():
    assert len(damage.KINDS) * SEEDS >= 100
