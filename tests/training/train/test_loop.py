"""Training: the right objective, a real mode, and the same numbers however often the run is interrupted."""

import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from cases import usual
from jax.experimental.compilation_cache import compilation_cache
from rich.console import Console

from bnnlaplace.checkpoint.pytree import load_pytree
from bnnlaplace.core.types import Estimate
from bnnlaplace.marglik.objective import half_log_determinant
from training.config import Config, Optimizer, Prior
from training.data.load import ImageData, epoch_order
from training.data.reading import Split
from training.data.shuffle import stratified_indices
from training.errors import Interrupted, UserError
from training.models.van import Normalise
from training.train import checkpoints, evidence, loop
from training.train.batch_statistics import make_moments, population_statistics
from training.train.batches import Plan, fixed_order, weighted_batches
from training.train.checkpoints import TrainResult, load_trained
from training.train.evidence import EvidenceSteps
from training.train.loop import train
from training.train.objective import make_passes
from training.train.step import initial_state, make_steps

# 26 images in batches of 8: no epoch ends with a batch. Steps end epochs at 4, 7, 10 (train), 14, 17 (polish).
CONFIG = Config(
    seed=3,
    optimizer=Optimizer(
        learning_rate=0.02, batch_size=8, epochs=3, warmup_epochs=1, polish_epochs=2, polish_learning_rate=0.01
    ),
)
TRACES = {"live": 0, "frozen": 0}
NEVER = 0
MEAN, STD = 0.45, 0.2


class Network(nn.Module):
    """Two normalised layers and a random residual branch; counts how often it is traced."""

    momentum: float = 0.9

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        TRACES["live" if train else "frozen"] += 1
        x = nn.Dense(5)(Normalise((MEAN,), (STD,))(x))
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x))
        branch = nn.Dense(5)(x)
        if train:
            kept = jax.random.bernoulli(self.make_rng("drop_path"), 0.8, (len(x), 1, 1, 1))
            branch = jnp.where(kept, branch / 0.8, 0.0)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x + branch)
        return nn.Dense(3)(x.reshape(len(x), -1))


class Logistic(nn.Module):
    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        x = Normalise((MEAN,), (STD,))(x)
        return nn.Dense(3)(x.reshape(len(x), -1))


def split(rng: np.random.Generator, count: int) -> Split:
    labels = np.arange(count, dtype=np.int32) % 3
    images = rng.integers(0, 150, (count, 2, 2, 1)) + 50 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels)


def make_data() -> ImageData:
    rng = np.random.default_rng(0)
    return ImageData("toy", ("a", "b", "c"), split(rng, 26), split(rng, 10), split(rng, 10))


DATA = make_data()


def run(
    workdir: Path,
    config: Config = CONFIG,
    *,
    module: nn.Module | None = None,
    resume: bool = False,
    output: io.StringIO | None = None,
    **kwargs: Any,
) -> TrainResult:
    module = Network() if module is None else module
    console = Console(file=output or io.StringIO(), width=200)
    return train(config, DATA, module, workdir=workdir, resume=resume, console=console, **kwargs)


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Every run compiles the same few functions: let the later ones read what the first has compiled."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainResult, Path]:
    workdir = tmp_path_factory.mktemp("finished")
    return run(workdir), workdir


@pytest.fixture
def signal_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Arrange for a signal to come while the images of a step are being chosen."""
    original = Plan.indices

    def arrange(step: int, number: int = signal.SIGINT) -> None:
        def indices(plan: Plan, seed: int, now: int) -> np.ndarray:
            if now == step - 1:
                signal.raise_signal(number)
            return original(plan, seed, now)

        monkeypatch.setattr(Plan, "indices", indices)

    return arrange


def without_seconds(history: list[dict]) -> list[dict]:
    return [{name: value for name, value in record.items() if "seconds" not in name} for record in history]


def assert_same_result(actual: TrainResult, expected: TrainResult) -> None:
    for one, other in zip(jax.tree.leaves(actual[:2]), jax.tree.leaves(expected[:2]), strict=True):
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()
    assert without_seconds(actual.history) == without_seconds(expected.history)
    assert (actual.prior_precision, *actual[4:]) == (expected.prior_precision, *expected[4:])


# --- interruption and resumption ------------------------------------------------------------------------------------


def test_interrupted_anywhere_and_resumed_gives_the_same_bits(finished, signal_at, tmp_path: Path) -> None:
    # Within an epoch, at the end of one, at the change of phase, twice within polishing, and at the very end.
    for count, step in enumerate([2, 4, 10, 12, 13, 17]):
        signal_at(step, signal.SIGTERM if count == 1 else signal.SIGINT)
        with pytest.raises(Interrupted, match=rf"stopped after step {step}; saved as .*step_{step:08d}"):
            run(tmp_path, resume=count > 0)
    assert_same_result(run(tmp_path, resume=True), finished[0])
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert without_seconds(log) == without_seconds(finished[0].history)


def test_records_after_the_checkpoint_are_cut_from_the_log(finished, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(finished[1], tmp_path / "copy"))
    with (workdir / "log.jsonl").open("a") as log:
        log.write('{"epoch": 6}\n{"epo')
    run(workdir, resume=True)
    assert (workdir / "log.jsonl").read_bytes() == (finished[1] / "log.jsonl").read_bytes()


@pytest.fixture
def two_checkpoints(signal_at, tmp_path: Path) -> Path:
    for step in (3, 5):
        signal_at(step)
        with pytest.raises(Interrupted):
            run(tmp_path, resume=step == 5)
    signal_at(NEVER)
    assert [path.name for path in checkpoints.list_steps(tmp_path / "train")] == ["step_00000003", "step_00000005"]
    return tmp_path


def damage(checkpoint: Path) -> Path:
    file = max((checkpoint / "arrays").rglob("*"), key=lambda path: path.stat().st_size * path.is_file())
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(bytes(content))
    return file


def test_a_damaged_newest_step_falls_back_to_the_last_good_one(finished, two_checkpoints: Path) -> None:
    file = damage(two_checkpoints / "train" / "step_00000005")
    killed = two_checkpoints / "train" / ".step_00000008.writing"
    killed.mkdir()
    (killed / "half").write_bytes(b"x")
    output = io.StringIO()
    assert_same_result(run(two_checkpoints, resume=True, output=output), finished[0])
    assert f"damaged checkpoint: {file} has other contents" in output.getvalue()
    assert "falling back to step_00000003" in output.getvalue()
    assert "resuming after step 3 of 17" in output.getvalue()
    kept = sorted(path.name for path in (two_checkpoints / "train").iterdir())
    assert kept == ["step_00000003", "step_00000005.damaged", "step_00000017"]


def crafted(checkpoint: Path, change: Callable[[dict], Any]) -> None:
    """Save the checkpoint anew, manifest and all, with other metadata."""
    tree, metadata = load_pytree(checkpoint)
    change(metadata)
    shutil.rmtree(checkpoint)
    checkpoints.save_pytree(checkpoint, tree, metadata)


def replaced(make: Callable[[Path], Any], name: str) -> Callable[[Path], None]:
    """Put something else in the place of a file of a checkpoint."""

    def replace_file(checkpoint: Path) -> None:
        (checkpoint / name).unlink()
        make(checkpoint / name)

    return replace_file


def replace_all(make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def replace_checkpoint(checkpoint: Path) -> None:
        shutil.rmtree(checkpoint)
        make(checkpoint)

    return replace_checkpoint


DAMAGES = {
    "manifest is a directory": replaced(Path.mkdir, "manifest.json"),
    "manifest is a pipe": replaced(os.mkfifo, "manifest.json"),
    "manifest cannot be read": lambda checkpoint: (checkpoint / "manifest.json").chmod(0),
    "manifest is nested deeply": lambda checkpoint: (checkpoint / "manifest.json").write_text("[" * 100_000),
    "manifest is empty": lambda checkpoint: (checkpoint / "manifest.json").write_text(""),
    "manifest is missing": lambda checkpoint: (checkpoint / "manifest.json").unlink(),
    "metadata are missing": lambda checkpoint: (checkpoint / "metadata.json").unlink(),
    "arrays are missing": lambda checkpoint: shutil.rmtree(checkpoint / "arrays"),
    "an empty directory": replace_all(Path.mkdir),
    "a file": replace_all(lambda path: path.write_text("x")),
    "a pipe": replace_all(os.mkfifo),
    "a link to nothing": replace_all(lambda path: path.symlink_to("nowhere")),
    "no journal": lambda checkpoint: crafted(checkpoint, lambda metadata: metadata.pop("journal")),
    "a journal of text": lambda checkpoint: crafted(checkpoint, lambda metadata: metadata.update(journal="x")),
    "another step": lambda checkpoint: crafted(checkpoint, lambda metadata: metadata["journal"].update(step=4)),
    "no end": lambda checkpoint: crafted(checkpoint, lambda metadata: metadata.update(finished=None)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_whatever_the_damage_the_last_good_step_is_used(damage: str, small_checkpoints: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(small_checkpoints, tmp_path / "train", symlinks=True))
    newest = directory / "step_00000005"
    DAMAGES[damage](newest)
    if damage == "manifest cannot be read" and os.access(newest / "manifest.json", os.R_OK):
        pytest.skip("this user reads every file")
    said: list[str] = []
    path, tree, metadata = checkpoints.load_newest(directory, LIKE, report=said.append)
    assert (path.name, metadata["journal"]["step"], float(tree["w"][1])) == ("step_00000003", 3, 3.0)
    assert len(said) == 1 and said[0].startswith("damaged checkpoint: ") and "\n" not in said[0]
    assert "set aside as step_00000005.damaged); falling back to step_00000003" in said[0]
    assert sorted(entry.name for entry in directory.iterdir()) == ["step_00000003", "step_00000005.damaged"]


LIKE = {"w": np.zeros(2, np.float32)}


@pytest.fixture(scope="module")
def small_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two checkpoints of one small array, whose second number is the step."""
    directory = tmp_path_factory.mktemp("small") / "train"
    for step in (3, 5):
        metadata = {"finished": False, "journal": {"step": step, "history": []}}
        checkpoints.save_step(directory, step, {"w": np.array([1, step], np.float32)}, metadata)
    return directory


def test_a_checkpoint_is_set_aside_beside_an_earlier_one(small_checkpoints: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(small_checkpoints, tmp_path / "train"))
    (directory / "step_00000005.damaged").write_text("another")
    (directory / "step_00000005" / "manifest.json").unlink()
    checkpoints.load_newest(directory, LIKE, report=lambda message: None)
    names = ["step_00000003", "step_00000005.damaged", "step_00000005.damaged2"]
    assert sorted(entry.name for entry in directory.iterdir()) == names


def test_checkpoints_of_other_settings_are_refused(finished, tmp_path: Path) -> None:
    workdir = Path(shutil.copytree(finished[1], tmp_path / "copy"))
    named = "step_00000017 must have been computed with the settings of config.json; got seed: 3 there, 4 in config.js"
    with pytest.raises(UserError, match=named):
        run(workdir, replace(CONFIG, seed=4), resume=True)
    with pytest.raises(UserError, match=named):
        load_trained(workdir, replace(CONFIG, seed=4))
    assert_same_result(load_trained(workdir, CONFIG), finished[0])


def test_checkpoints_without_settings_are_unverified(finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints.settings, "record", lambda config: None)  # as in earlier releases
    run(tmp_path)
    said: list[str] = []
    assert_same_result(load_trained(tmp_path, CONFIG, said.append), finished[0])
    assert len(said) == 1 and "has no record of its settings" in said[0]
    output = io.StringIO()
    assert_same_result(run(tmp_path, resume=True, output=output), finished[0])
    assert "has no record of its settings" in output.getvalue()


def test_no_good_checkpoint_at_all_is_an_error(two_checkpoints: Path) -> None:
    damage(two_checkpoints / "train" / "step_00000003")
    file = damage(two_checkpoints / "train" / "step_00000005")
    with pytest.raises(UserError, match="must hold a good checkpoint") as caught:
        run(two_checkpoints, resume=True)
    assert str(file) in str(caught.value)


def test_checkpoint_of_another_network_names_the_leaf(two_checkpoints: Path) -> None:
    with pytest.raises(UserError, match=r"step_00000005 holds .* where .* is expected"):
        run(two_checkpoints, resume=True, module=Logistic())


def test_resume_without_a_checkpoint_starts_and_says_so(finished, tmp_path: Path) -> None:
    output = io.StringIO()
    assert_same_result(run(tmp_path / "new", resume=True, output=output), finished[0])
    assert "starting at the beginning" in output.getvalue()


def test_a_finished_run_is_returned_without_training(finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_run_epoch", None)
    output = io.StringIO()
    assert_same_result(run(finished[1], resume=True, output=output), finished[0])
    assert "training is finished: 17 steps, 5 epochs" in output.getvalue()


def test_regular_checkpoints_keep_the_newest_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    save_step = checkpoints.save_step
    monkeypatch.setattr(checkpoints, "save_step", lambda *args: saved.append(args[1]) or save_step(*args))
    run(tmp_path)
    assert saved == [4, 7, 10, 14, 17]
    assert [path.name for path in checkpoints.list_steps(tmp_path / "train")] == ["step_00000014", "step_00000017"]


def test_a_checkpoint_of_an_earlier_release_is_read(finished, tmp_path: Path) -> None:
    tree, metadata = load_pytree(checkpoints.list_steps(finished[1] / "train")[-1])
    metadata["journal"]["initial_gradient_norm"] = 2.0
    checkpoints.save_step(tmp_path / "train", 17, tree, metadata)
    assert_same_result(load_trained(tmp_path), finished[0])


# --- the finished run -----------------------------------------------------------------------------------------------


def test_trained_network_is_read_back(finished) -> None:
    assert_same_result(load_trained(finished[1]), finished[0])


def test_reading_what_is_missing_unfinished_or_damaged(finished, two_checkpoints: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it holds none"):
        load_trained(tmp_path / "nowhere")
    with pytest.raises(UserError, match="must be finished"):
        load_trained(two_checkpoints)
    workdir = Path(shutil.copytree(finished[1], tmp_path / "copy"))
    file = damage(workdir / "train" / "step_00000017")
    shutil.copytree(two_checkpoints / "train" / "step_00000005", workdir / "train" / "step_00000005")
    with pytest.raises(UserError, match="must be as it was saved") as caught:
        load_trained(workdir)
    assert str(file) in str(caught.value)
    assert (workdir / "train" / "step_00000017").exists(), "reading must change nothing"


def test_history_describes_every_epoch(finished) -> None:
    result, _ = finished
    assert [record["epoch"] for record in result.history] == [1, 2, 3, 4, 5]
    assert [record["phase"] for record in result.history] == ["train"] * 3 + ["polish"] * 2
    assert [record["gradient_norm"] is None for record in result.history] == [True, True, False, True, False]
    assert result.history[-1]["gradient_norm"] == result.joint_gradient_norm
    rates = [record["learning_rate"] for record in result.history]
    assert rates[0] == pytest.approx(0.02) and rates[3] > rates[4] and rates[2] < rates[1]
    images = 8 * np.array([4, 3, 3, 4, 3])
    correct = images * [record["accuracy"] for record in result.history]
    np.testing.assert_allclose(correct, np.round(correct), atol=1e-9)


def apply(module: nn.Module, result: TrainResult, images: np.ndarray) -> Any:
    variables = {"params": result.params, "batch_stats": result.batch_stats}
    return jax.jit(module.apply)(variables, images)


def normalised(images: np.ndarray) -> np.ndarray:
    """The images as the networks should see them, by the definition."""
    return (images / 255 - MEAN) / STD


def log_joint_terms(module: nn.Module, result: TrainResult, data: Split) -> tuple[float, float]:
    """Log-likelihood and |theta|^2, from the definition, in float64."""
    logits = np.asarray(apply(module, result, data.images), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    squares = sum(np.sum(np.asarray(leaf, np.float64) ** 2) for leaf in jax.tree.leaves(result.params))
    return log_probs[np.arange(len(data.labels)), data.labels].sum(), squares


def test_validation_numbers_are_those_of_the_final_network(finished) -> None:
    result, _ = finished
    log_likelihood, _ = log_joint_terms(Network(), result, DATA.validation)
    predicted = apply(Network(), result, DATA.validation.images).argmax(-1)
    assert result.history[-1]["validation_nll"] == pytest.approx(-log_likelihood / 10, rel=1e-5)
    assert result.history[-1]["validation_accuracy"] == np.mean(predicted == DATA.validation.labels)


def test_weighted_batches_add_up_to_the_images() -> None:
    batches = list(weighted_batches(DATA.train.images, 8))
    assert [weight for _, weight in batches] == [1.0, 1.0, 1.0, 1.0, -0.75]
    assert {images.shape for images, _ in batches} == {(8, 2, 2, 1)}
    total = sum(weight * images.sum(dtype=np.float64) for images, weight in batches)
    assert total == DATA.train.images.sum(dtype=np.float64)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> TrainResult:
    """A run whose polishing moves nothing, on full batches: its last record belongs to its final weights."""
    optimizer = replace(CONFIG.optimizer, batch_size=26, polish_epochs=1, polish_learning_rate=1e-30)
    config = replace(CONFIG, optimizer=optimizer, prior=Prior(precision=2.5))
    return run(tmp_path_factory.mktemp("standing"), config)


def test_the_loss_is_the_negative_log_joint_over_the_number_of_images(standing: TrainResult) -> None:
    log_likelihood, squares = log_joint_terms(Network(), standing, DATA.train)
    assert standing.history[-1]["loss"] == pytest.approx((-log_likelihood + 0.5 * 2.5 * squares) / 26, rel=1e-6)


def test_the_joint_gradient_is_that_of_the_log_joint(standing: TrainResult) -> None:
    @jax.jit
    @jax.grad
    def gradient(params: Any) -> jax.Array:
        logits = apply(Network(), standing._replace(params=params), DATA.train.images)
        log_likelihood = jax.nn.log_softmax(logits)[jnp.arange(26), DATA.train.labels].sum()
        return log_likelihood - 1.25 * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))

    squares = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient(standing.params)))
    _, weights = log_joint_terms(Network(), standing, DATA.train)
    assert standing.joint_gradient_norm == pytest.approx(squares**0.5, rel=1e-5)
    assert standing.joint_gradient_to_prior == pytest.approx(squares**0.5 / (2.5 * weights**0.5), rel=1e-5)


def exact_statistics(params: Any) -> Any:
    """Mean and variance of both layers' inputs over all images, layer by layer in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def dense(name: str, inputs: np.ndarray) -> np.ndarray:
        return inputs @ params[name]["kernel"] + params[name]["bias"]

    def statistics(inputs: np.ndarray) -> dict[str, np.ndarray]:
        return {"mean": inputs.mean((0, 1, 2)), "var": inputs.var((0, 1, 2))}

    first_input = dense("Dense_0", normalised(DATA.train.images))
    first = statistics(first_input)
    x = (first_input - first["mean"]) / np.sqrt(first["var"] + 1e-5)
    x = np.maximum(x * params["BatchNorm_0"]["scale"] + params["BatchNorm_0"]["bias"], 0.0)
    return {"BatchNorm_0": first, "BatchNorm_1": statistics(x + dense("Dense_1", x))}


def assert_close(actual: Any, expected: Any) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_frozen_statistics_are_those_of_the_whole_training_set(standing: TrainResult) -> None:
    assert_close(standing.batch_stats, exact_statistics(standing.params))


@pytest.mark.parametrize("batch_first", [True, False])
def test_population_statistics_in_small_batches_and_any_layout(batch_first: bool, standing: TrainResult) -> None:
    class Transposed(Network):
        """A network with the same function, with channels first and images last."""

        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            def normalised(x: jax.Array) -> jax.Array:
                layer = nn.BatchNorm(use_running_average=True, axis=0)
                return jnp.moveaxis(layer(jnp.moveaxis(x, (0, 3), (3, 0))), (3, 0), (0, 3))

            x = nn.relu(normalised(nn.Dense(5)(Normalise((MEAN,), (STD,))(x))))
            return normalised(x + nn.Dense(5)(x))

    module = Network() if batch_first else Transposed()
    moments = make_moments(module)
    start = jax.tree.map(lambda leaf: np.full_like(leaf, 0.7), standing.batch_stats)
    batches = lambda: weighted_batches(DATA.train.images, 8)  # noqa: E731
    assert_close(population_statistics(moments, standing.params, start, batches), exact_statistics(standing.params))


def test_batch_statistics_of_another_layer_are_refused(tmp_path: Path) -> None:
    class Odd(nn.Module):
        @nn.compact
        def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
            self.variable("batch_stats", "mean", lambda: jnp.zeros(1))
            self.variable("batch_stats", "var", lambda: jnp.ones(1))
            return Logistic()(x)

    with pytest.raises(TypeError, match="must belong to flax.linen.BatchNorm layers"):
        run(tmp_path, module=Odd())


def test_logistic_regression_ends_at_its_mode(tmp_path: Path) -> None:
    optimizer = Optimizer(learning_rate=0.05, batch_size=26, epochs=100, warmup_epochs=0, polish_epochs=300)
    config = Config(optimizer=replace(optimizer, polish_learning_rate=0.02), prior=Prior(precision=0.7))
    result = run(tmp_path, config, module=Logistic())
    x = normalised(DATA.train.images).reshape(26, -1)
    x = np.concatenate([x, np.ones((26, 1))], 1)

    def objective(flat: np.ndarray) -> float:
        logits = x @ flat.reshape(5, 3)
        log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -log_probs[np.arange(26), DATA.train.labels].sum() + 0.35 * flat @ flat

    mode = scipy.optimize.minimize(objective, np.zeros(15), options={"gtol": 1e-8}).x.reshape(5, 3)
    dense = result.params["Dense_0"]
    np.testing.assert_allclose(np.vstack([dense["kernel"], dense["bias"]]), mode, atol=1e-4)
    assert result.batch_stats == {}
    assert result.joint_gradient_norm < 1e-3
    assert result.joint_gradient_to_prior < 1e-3


# --- prior, compilation, faults -------------------------------------------------------------------------------------


ONLINE = replace(CONFIG, prior=Prior(precision=2.0, update="online", every_epochs=1))
# After one epoch, before steps 5, 7, 9, ... and until the end of the fourth epoch, step 14.
JOINT = replace(
    CONFIG,
    prior=Prior(update="joint", structure="layerwise", burn_in=1, every_steps=2, examples=6, matvecs=3),
)


@pytest.fixture
def updates_by(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], float]], list[int]]:
    """Arrange for online updates that multiply the precision by a function of the epoch."""

    def arrange(factor: Callable[[int], float]) -> list[int]:
        epochs: list[int] = []

        def online(state: Any, epoch: int) -> tuple[Any, Estimate, float]:
            epochs.append(epoch)
            changed = state._replace(prior_precision=jnp.float32(state.prior_precision * factor(epoch)))
            return changed, Estimate(jnp.float32(-10.0 * epoch), jnp.float32(0.5)), -12.0 * epoch

        monkeypatch.setattr(loop, "make_evidence_steps", lambda *arguments: EvidenceSteps(None, online))
        return epochs

    return arrange


def test_online_prior_updates_end_half_way_through_polishing_and_compile_nothing(updates_by, tmp_path: Path) -> None:
    epochs = updates_by(lambda epoch: 0.5)
    TRACES.update(live=0, frozen=0)
    result = run(tmp_path, ONLINE)
    assert epochs == [1, 2, 3, 4]
    assert [record["prior_precision"] for record in result.history] == [2.0, 1.0, 0.5, 0.25, 0.125]
    assert [record["log_evidence"] for record in result.history] == [-10.0, -20.0, -30.0, -40.0, None]
    assert (result.prior_precision, result.prior_precision_by_layer) == (0.125, None)
    # One live step; initialisation, gradient, evaluation and statistics.
    assert TRACES == {"live": 1, "frozen": 4}


def test_a_loss_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(
    updates_by, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    updates_by(lambda epoch: 1.0 if epoch == 1 else 1e38)
    # The second epoch ends with step 7; from there on the gradient overflows.
    with pytest.raises(UserError, match="did not at step 8 of 17.*last good checkpoint is .*step_00000007"):
        run(tmp_path, ONLINE)
    kept = [path.name for path in checkpoints.list_steps(tmp_path / "train")]
    assert kept == ["step_00000004", "step_00000007"]


@pytest.mark.parametrize("poisoned", usual(["gradient"], ["evidence", "gradient"]))
def test_an_evidence_that_is_not_finite_names_the_step_and_keeps_the_checkpoint(
    poisoned: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)

    def spoiled(params: Any, logs: Any, *arguments: Any, **options: Any) -> Any:
        half, terms = half_log_determinant(params, logs, *arguments, **options)
        if poisoned == "gradient":  # the value stays
            return half + jnp.sqrt(jnp.square(logs - logs)), terms
        return half, terms._replace(log_likelihood=jnp.float32(jnp.inf))

    monkeypatch.setattr(evidence, "half_log_determinant", spoiled)
    prior = Prior(update="joint", burn_in=1, every_steps=2, examples=6, matvecs=3)
    with pytest.raises(UserError, match="evidence and gradients must stay finite; they did not at step 5 of 17.*00004"):
        run(tmp_path, replace(CONFIG, prior=prior), module=Logistic())
    assert [path.name for path in checkpoints.list_steps(tmp_path / "train")] == ["step_00000004"]


@pytest.mark.exhaustive  # as above with another objective, whose state is continued in `tests/marglik`, too
def test_joint_training_interrupted_anywhere_and_resumed_gives_the_same_bits(signal_at, tmp_path: Path) -> None:
    whole = run(tmp_path / "whole", JOINT)
    # Between two evidence steps, and at the change of phase.
    for count, step in enumerate([6, 10]):
        signal_at(step)
        with pytest.raises(Interrupted):
            run(tmp_path / "parts", JOINT, resume=count > 0)
    signal_at(NEVER)
    resumed = run(tmp_path / "parts", JOINT, resume=True)
    assert_same_result(resumed, whole)
    layers = {"Dense_0", "Dense_1", "Dense_2", "BatchNorm_0", "BatchNorm_1"}
    assert set(resumed.prior) == layers and len(set(resumed.prior.values())) > 1
    assert load_trained(tmp_path / "parts", JOINT).prior == resumed.prior
    history = resumed.history
    assert [record["log_evidence"] is None for record in history] == [True, False, False, False, True]
    assert history[1]["log_evidence_sem"] > 0
    # While batch statistics are live, the log-determinant moves the prior alone.
    assert [record["log_determinant_gradient_norm"] > 0 for record in history] == [False, False, False, True, False]
    assert history[1]["prior_precision"] != 1.0
    assert all(record["step_gradient_norm"] > 0 for record in history)
    # Half way through polishing the prior stays.
    assert history[4]["prior_precision_by_layer"] == resumed.prior


def test_the_held_gradient_moves_weights_and_precisions_unless_it_is_at_rest() -> None:
    """Adam's first step goes against the sign of the gradient, by the learning rate."""
    passes, plan = make_passes(Logistic()), Plan(26, 26, 1, 1)
    prior = Prior(update="joint", learning_rate=0.1)
    optimizer = replace(CONFIG.optimizer, epochs=1, warmup_epochs=0, clip_norm=1e9)
    steps = make_steps(passes, optimizer, plan, prior)
    params, _ = passes.initialise(jax.random.key(0), DATA.train.images[:1])
    state = initial_state(params, {}, optimizer, prior)
    signs = jax.tree.map(lambda leaf: jnp.where(jnp.arange(leaf.size).reshape(leaf.shape) % 2, 1.0, -1.0), params)
    held = jax.tree.map(lambda sign: 1e6 * sign, signs), jnp.float32(-1e6)
    state = state._replace(evidence=state.evidence._replace(held=held, active=jnp.bool(True)))
    after = steps.polish(state, DATA.train.images, DATA.train.labels, None)
    jax.tree.map(
        lambda new, old, sign: np.testing.assert_allclose(new, old - 0.02 * sign, rtol=1e-4),
        after.params,
        params,
        signs,
    )
    assert after.prior_precision == pytest.approx(np.exp(0.1), rel=1e-5)
    rested = steps.polish(
        state._replace(evidence=evidence.at_rest(state.evidence)), DATA.train.images, DATA.train.labels, None
    )
    without = steps.polish(state._replace(evidence=()), DATA.train.images, DATA.train.labels, None)
    assert rested.prior_precision == 1.0
    assert all(map(np.array_equal, jax.tree.leaves(rested.params), jax.tree.leaves(without.params)))


@pytest.mark.parametrize("curvature", ["lanczos", "diagonal"])
def test_an_online_update_maximises_the_scaled_evidence_of_its_subset(curvature: str) -> None:
    options = {"matvecs": 15, "probes": 400} if curvature == "lanczos" else {}
    config = replace(CONFIG, prior=Prior(update="online", curvature=curvature, examples=12, **options))
    passes = make_passes(Logistic())
    params, _ = passes.initialise(jax.random.key(0), DATA.train.images[:1])
    params = jax.tree.map(lambda leaf: leaf + 0.3, params)
    state = initial_state(params, {}, config.optimizer, config.prior)
    online = evidence.make_evidence_steps(config, DATA, Logistic()).online
    (state, found, of_diagonal), again = online(state, 4), online(state, 4)
    chosen = np.sort(stratified_indices(DATA.train.labels, 12, config.seed + 102))
    x = np.concatenate([normalised(DATA.train.images[chosen]).reshape(12, -1), np.ones((12, 1))], 1)
    weights = np.vstack([params["Dense_0"]["kernel"], params["Dense_0"]["bias"]]).astype(np.float64)
    logits = x @ weights
    probs = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    curvatures = np.einsum("nc,cd->ncd", probs, np.eye(3)) - np.einsum("nc,nd->ncd", probs, probs)
    ggn = 26 / 12 * np.einsum("ni,nj,ncd->icjd", x, x, curvatures).reshape(15, 15)
    diagonal = np.diag(np.diag(ggn))
    ggn = ggn if curvature == "lanczos" else diagonal
    log_likelihood = 26 / 12 * np.log(probs[np.arange(12), DATA.train.labels[chosen]]).sum()

    def log_evidence(delta: float, ggn: np.ndarray = ggn) -> float:
        return log_likelihood - 0.5 * delta * np.sum(weights**2) - 0.5 * np.linalg.slogdet(np.eye(15) + ggn / delta)[1]

    grid = np.geomspace(0.01, 100, 4000)
    best = grid[np.argmax([log_evidence(delta) for delta in grid])]
    if curvature == "lanczos":  # the diagonal is compared at its own best precision
        assert float(of_diagonal) == pytest.approx(max(log_evidence(delta, diagonal) for delta in grid), abs=1e-2)
    else:
        assert of_diagonal is None
    assert float(state.prior_precision) == pytest.approx(best, rel=0.05 if curvature == "lanczos" else 5e-3)
    assert abs(float(found.mean) - log_evidence(float(state.prior_precision))) < 4 * float(found.sem) + 1e-2
    assert float(again[1].mean) == pytest.approx(float(found.mean), abs=1e-2)  # the same images and probes


def test_a_loss_that_is_not_finite_is_never_saved(signal_at, tmp_path: Path) -> None:
    config = replace(CONFIG, optimizer=replace(CONFIG.optimizer, learning_rate=1e37))
    signal_at(3)
    with pytest.raises(UserError, match=r"did not at step 2 of 17.*no checkpoint had been written yet"):
        run(tmp_path, config)
    assert not (tmp_path / "train").exists()


def test_a_batch_larger_than_the_training_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most the number of training images, 26; got 64"):
        run(tmp_path, replace(CONFIG, optimizer=Optimizer(batch_size=64)))


@pytest.mark.parametrize(
    ("prior", "epochs", "polish_epochs", "message"),
    [
        ({"update": "joint"}, 3, 0, "`prior.burn_in` 5, `prior.every_steps` 20, `optimizer.epochs` 3 and .* 6 to 3"),
        ({"update": "joint"}, 4, 3, "`optimizer.polish_epochs` 3.* lower --prior.burn-in, or raise --optimizer.epochs"),
        ({"update": "online"}, 3, 0, "`prior.every_epochs` 10.* after each multiple of 10 from epoch 1 to 2"),
        ({"update": "online"}, 5, 5, "lower --prior.burn-in or --prior.every-epochs, or raise --optimizer.epochs"),
        ({"update": "online", "burn_in": 4, "every_epochs": 2}, 3, 3, "`prior.burn_in` 4, `prior.every_epochs` 2"),
        ({"update": "joint"}, 5, 2, None),
        ({"update": "joint", "burn_in": 0}, 1, 0, None),
        ({"update": "online"}, 6, 8, None),
        ({"update": "online", "every_epochs": 1}, 2, 0, None),
        ({}, 1, 0, None),
    ],
)
def test_training_by_the_evidence_computes_it_or_is_refused(
    prior: dict[str, Any], epochs: int, polish_epochs: int, message: str | None, tmp_path: Path
) -> None:
    """With too few epochs the run would be that of posthoc."""
    optimizer = replace(CONFIG.optimizer, epochs=epochs, polish_epochs=polish_epochs, warmup_epochs=0)
    config = replace(CONFIG, prior=Prior(**prior), optimizer=optimizer)
    if message is None:
        evidence.check_window(config)
        return
    with pytest.raises(UserError, match=f"must compute the evidence in at least one epoch; got .*{message}"):
        run(tmp_path, config, module=Logistic())
    assert not list(tmp_path.iterdir())


def test_a_finished_run_without_evidence_of_an_earlier_release_is_still_read(monkeypatch, tmp_path: Path) -> None:
    config = replace(CONFIG, prior=Prior(update="joint"), optimizer=replace(CONFIG.optimizer, polish_epochs=0))
    with monkeypatch.context() as earlier:
        earlier.setattr(loop, "check_window", lambda config: None)
        finished = run(tmp_path, config, module=Logistic())
    assert_same_result(run(tmp_path, config, module=Logistic(), resume=True), finished)


# --- batches and display --------------------------------------------------------------------------------------------


def test_steps_follow_the_permutations_without_gap() -> None:
    plan = Plan(num_examples=26, batch_size=8, epochs=3, polish_epochs=2)
    assert (plan.train_steps, plan.total_steps) == (10, 17)
    assert [plan.end_of_epoch(epoch) for epoch in range(6)] == [0, 4, 7, 10, 14, 17]
    seen = np.concatenate([plan.indices(5, step) for step in range(17)])
    training = np.concatenate([epoch_order(5, epoch, 26) for epoch in range(4)])
    polishing = np.concatenate([epoch_order(5, epoch, 26) for epoch in range(4, 7)])
    np.testing.assert_array_equal(seen[:80], training[:80])
    np.testing.assert_array_equal(seen[80:], polishing[:56])


def test_fixed_order_pads_under_a_mask() -> None:
    batches = list(fixed_order(DATA.train, 8))
    assert {images.shape for images, _, _ in batches} == {(8, 2, 2, 1)}
    images, labels, mask = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    np.testing.assert_array_equal(images[mask], DATA.train.images)
    np.testing.assert_array_equal(labels[mask], DATA.train.labels)
    assert mask.sum() == 26 and images[~mask].sum() == 0


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_shows_loss_and_accuracy(terminal: bool, tmp_path: Path) -> None:
    output = io.StringIO()
    optimizer = replace(CONFIG.optimizer, batch_size=26, epochs=25)
    console = Console(file=output, width=160, force_terminal=terminal)
    train(replace(CONFIG, optimizer=optimizer), DATA, Logistic(), workdir=tmp_path, resume=False, console=console)
    assert "loss" in output.getvalue() and "accuracy" in output.getvalue()
    if not terminal:
        assert len(output.getvalue().splitlines()) == 9
        assert "epoch 27/27 (polish)" in output.getvalue()
