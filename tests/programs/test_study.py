"""A whole study of two seeds with a network of a few hundred weights: stopped, continued, and summarised again."""

import json
import shutil

import jax
import numpy as np
import pytest

from bnnlaplace.checkpoint import load_pytree
from training.cli import interruption
from training.cli import program as programs
from training.errors import Interrupted
from training.models import van
from training.study import __main__ as program
from training.study import cell, fits, method_names, store

TINY = """
from training.config import Config, Curvature, Data, Evaluation, Model, Optimizer
from training.study.config import Measures, Posterior, Regime, Study, Training

study = Study(
    config=Config(
        data=Data(name="digits", train_examples=60),
        model=Model(variant="tiny"),
        optimizer=Optimizer(batch_size=30, epochs=3, warmup_epochs=1, polish_epochs=3),
        curvature=Curvature(num_probes=4, max_vectors=8, microbatch=60),
        evaluation=Evaluation(grid_size=3, grid_low=0.1, grid_high=1000.0),
    ),
    regimes=(Regime("clean"),),
    seeds=(0, 1),
    trainings=(
        Training("adamw", weight_decay=0.05, ensemble=2, folds=1),
        Training("posthoc", {"prior.precision": 0.1}, folds=0),
    ),
    posteriors=(
        Posterior("full", weights="last_layer", trainings=("posthoc",)),
        Posterior("diag", "laplace", folded=True, trainings=("posthoc",)),
        Posterior("full", weights="last_layer", fixed_mean=True, chosen_by="folds", trainings=("adamw",)),
    ),
    measures=Measures(shifts=("noise",), shift_examples=20, foreign=("inverted",), test_examples=60, samples=24,
                      max_iterations=2),
)
"""


@pytest.fixture(scope="module", autouse=True)
def small_network(tmp_path_factory):
    """One stage of four channels, so that nothing takes long to compile, and each program is compiled once."""
    home = tmp_path_factory.mktemp("home")
    options = {"jax_compilation_cache_dir": str(home / "xla"), "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(van.VARIANTS, "tiny", van.VANVariant((4,), (1,), (1,), 3, 2, (8, 8, 1)))
        patch.setenv("TFDS_DATA_DIR", str(home / "tfds"))
        patch.setattr(interruption, "SECONDS_TO_UNWIND", 600.0)
        patch.setattr(programs, "use_compilation_cache", lambda: None)
        for name, value in options.items():
            jax.config.update(name, value)
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def units(root):
    """Arrays and record of each unit, without its seconds."""
    found = {}
    for path in sorted((root / store.CELLS).glob("*/seed_*/*")):
        arrays, record = load_pytree(path)
        del record["seconds"]
        for method in record["methods"]:
            method["description"].pop("seconds", None)
        found["/".join(path.parts[-2:])] = arrays, record
    return found


def test_a_study_that_is_stopped_goes_on_to_the_same_numbers(tmp_path, monkeypatch, capsys):
    config, root, again = tmp_path / "tiny_study.py", tmp_path / "study", tmp_path / "again"
    config.write_text(TINY)

    def run(root, *options):
        status = program.main(["--config", str(config), "--workdir", str(root), *options])
        return status, capsys.readouterr()

    # Stopped in the second posterior: the units before it are kept.
    fit_posterior, calls = fits.fit_posterior, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise Interrupted("stopped")
        return fit_posterior(*arguments)

    monkeypatch.setattr(fits, "fit_posterior", interrupted)
    status, said = run(root)
    assert status == interruption.EXIT_STATUS and "--resume" in said.err
    assert len(units(root)) == 4
    status, said = run(root)
    assert status == 2 and "continue it with --resume" in said.err
    assert run(root, "--resume", "--seeds", "0")[0] == 0
    assert {name.split("/")[0] for name in units(root)} == {"seed_0"}
    assert run(root, "--resume")[0] == 0
    assert not any(record["failed"] for _, record in units(root).values())

    # Killed anywhere, what is missing comes out the same: a network, and the units that it makes.
    shutil.copytree(root, again)
    shutil.rmtree(again / "networks" / "clean" / "posthoc" / "seed_1")
    for name in ("points", "last-layer-full-variational"):
        shutil.rmtree(again / store.CELLS / "clean" / "seed_1" / f"posthoc.{name}")
    assert run(again, "--resume")[0] == 0
    jax.tree.map(np.testing.assert_array_equal, units(again), units(root))

    # Nothing is computed again by a summary, which names what it has.
    monkeypatch.setattr(cell, "train_network", None)
    status, said = run(root, "--summary-only")
    assert status == 0 and "posthoc: last-layer-full-variational (evidence, MC)" in said.out
    document = json.loads((root / "summary" / "summary.json").read_text())
    rows = {(row["training"], row["method"]): row for row in document["regimes"]["clean"]["methods"]}
    assert document["regimes"]["clean"]["missing"] == 0
    of_points = {"adamw": method_names.names_of(folds=1, ensemble=2), "posthoc": method_names.names_of(0, 0)}
    measured = {key for key in rows if "full" not in key[1] and "diag" not in key[1]}
    assert measured == {(training, name) for training, names in of_points.items() for name in names}
    assert rows["posthoc", "last-layer-full-variational"]["seeds"] == [0, 1]
    by_folds = [row for row in document["regimes"]["clean"]["methods"] if row["method"].endswith("fixed-mean-by-folds")]
    assert sorted((row["prior"], row["link"]) for row in by_folds) == [
        (prior, link) for prior in ("folds", "validation NLL") for link in ("MC", "probit")
    ]
    assert rows["posthoc", "diag-laplace-folded"]["differences"]["MAP + T"]["shift_nll"]["low"] is not None


def test_a_method_that_fails_is_recorded_and_the_study_goes_on(tmp_path, monkeypatch, capsys):
    config = tmp_path / "tiny_study.py"
    small = TINY.replace("seeds=(0, 1)", "seeds=(0,)").replace("ensemble=2, folds=1", "folds=0")
    config.write_text(small.replace('chosen_by="folds", ', ""))

    def no_memory(posterior, *rest):
        raise MemoryError(f"{posterior.structure} is too large")

    monkeypatch.setattr(fits, "fit_posterior", no_memory)
    assert program.main(["--config", str(config), "--workdir", str(tmp_path / "study")]) == 0
    assert "failed: posthoc, diag-laplace-folded, seed 0: MemoryError: diag is too large" in capsys.readouterr().out
    assert len(units(tmp_path / "study")) == 5
