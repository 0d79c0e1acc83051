"""The posteriors of a run and their evaluation, on a logistic regression whose GGN NumPy can write down."""

import io
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest
from rich.console import Console

from bnnlaplace import Laplace, Variational
from training import posteriors
from training.cli import interruption
from training.config import Config, Curvature, Data, Evaluation, Prior
from training.data.load import ImageData
from training.data.reading import Split
from training.errors import Interrupted, UserError
from training.models.van import Normalise
from training.report.evaluation import _choices, evaluate, foreign_images, mode_distance
from training.report.html import write_results
from training.train.checkpoints import TrainResult
from training.train.prior import geometric_mean

MEAN, STD = 0.45, 0.2
CONFIG = Config(
    data=Data(name="toy", mean=(MEAN,), std=(STD,)),
    prior=Prior(precision=2.0),
    curvature=Curvature(num_probes=5, max_vectors=30, tolerance=1e-4, microbatch=8),
    evaluation=Evaluation(grid_size=3, grid_low=0.1, resamples=20, ood="noise"),
)


class Logistic(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        return nn.Dense(3)(Normalise((MEAN,), (STD,))(images).reshape(len(images), -1))


class TwoLayers(nn.Module):
    @nn.compact
    def __call__(self, images: jax.Array, train: bool = False) -> jax.Array:
        x = Normalise((MEAN,), (STD,))(images).reshape(len(images), -1)
        return nn.Dense(3)(nn.tanh(nn.Dense(2)(x)))


def split(rng: np.random.Generator, count: int) -> Split:
    labels = np.arange(count, dtype=np.int32) % 3
    images = rng.integers(0, 150, (count, 2, 2, 1)) + 50 * labels[:, None, None, None]
    return Split(images.astype(np.uint8), labels)


RNG = np.random.default_rng(0)
DATA = ImageData("toy", ("a", "b", "c"), split(RNG, 26), split(RNG, 10), split(RNG, 12))
PARAMS = {"Dense_0": {"kernel": 0.3 * RNG.normal(size=(4, 3)), "bias": 0.1 * RNG.normal(size=3)}}
PARAMS = jax.tree.map(np.float32, PARAMS)
WEIGHTS = np.concatenate([PARAMS["Dense_0"]["kernel"], PARAMS["Dense_0"]["bias"][None]]).astype(np.float64)


def features(images: np.ndarray) -> np.ndarray:
    """Normalised pixels and a one for the bias, from the definition: (N, 5)."""
    return np.concatenate([((images / 255 - MEAN) / STD).reshape(len(images), -1), np.ones((len(images), 1))], axis=1)


def probabilities(images: np.ndarray) -> np.ndarray:
    exponentials = np.exp(features(images) @ WEIGHTS)
    return exponentials / exponentials.sum(axis=1, keepdims=True)


def ggn(images: np.ndarray) -> np.ndarray:
    """The GGN from its definition: (15, 15), with the weights of one pixel together."""
    total = np.zeros((15, 15))
    for x, p in zip(features(images), probabilities(images), strict=True):
        total += np.kron(np.outer(x, x), np.diag(p) - np.outer(p, p))
    return total


def log_evidence(curvature: np.ndarray, precision: float) -> float:
    """The evidence of the training images. A vector is the diagonal of the curvature."""
    log_likelihood = np.log(probabilities(DATA.train.images)[np.arange(26), DATA.train.labels]).sum()
    matrix = np.diag(curvature) if curvature.ndim == 1 else curvature
    log_determinant = np.linalg.slogdet(np.eye(15) + matrix / precision)[1]
    return log_likelihood - 0.5 * precision * np.sum(WEIGHTS**2) - 0.5 * log_determinant


def console() -> Console:
    return Console(file=io.StringIO(), width=200)


def refuse(message: str) -> None:
    raise AssertionError(message)


NETWORK = posteriors.make_network(Logistic(), PARAMS, {})


@pytest.fixture(scope="module")
def fitted() -> dict[str, Laplace]:
    return posteriors.fit(CONFIG, DATA, NETWORK, 2.0, console())


def test_both_structures_are_fitted_on_all_training_images(fitted):
    assert list(fitted) == ["diagonal", "Lanczos"]
    curvature = ggn(DATA.train.images)
    diagonal, lanczos = (fitted[name].log_marginal_likelihood() for name in fitted)
    np.testing.assert_allclose(diagonal.mean, log_evidence(np.diag(curvature), 2.0), rtol=1e-5)
    assert lanczos.sem < 1e-9  # at full depth
    np.testing.assert_allclose(lanczos.mean, log_evidence(curvature, 2.0), rtol=1e-5)
    assert lanczos.mean > diagonal.mean + 1


def test_a_part_of_the_images_counts_as_all_of_them():
    config = replace(CONFIG, curvature=replace(CONFIG.curvature, examples=13))
    images, labels = posteriors.curvature_images(config, DATA.train)
    assert np.bincount(labels).tolist() == [5, 4, 4]
    fitted = posteriors.fit(config, DATA, NETWORK, 2.0, console())
    whole = ggn(images) * (26 / 13)
    for name, curvature in (("diagonal", np.diag(np.diag(whole))), ("Lanczos", whole)):
        expected = np.linalg.slogdet(np.eye(len(whole)) + curvature / 2.0)[1]
        np.testing.assert_allclose(fitted[name].structure.log_determinant(2.0).mean(), expected, rtol=1e-5)


def test_posteriors_come_back_as_they_were_saved(fitted, tmp_path):
    posteriors.save(tmp_path, fitted, CONFIG, seconds=12.5)
    loaded = posteriors.load(tmp_path, NETWORK, CONFIG, refuse)
    for name, la in fitted.items():
        assert loaded[name].log_marginal_likelihood() == la.log_marginal_likelihood()
    assert posteriors.seconds_to_fit(tmp_path) == 12.5


def test_variational_posteriors_stand_beside_those_of_laplace(fitted, tmp_path):
    """The precision that training chose by the evidence stays; otherwise the lower bound chooses one."""
    curvature = replace(CONFIG.curvature, variational_iterations=30)
    online = replace(CONFIG, curvature=curvature, prior=Prior(precision=2.0, update="online"))
    four = posteriors.fit(online, DATA, NETWORK, 2.0, console())
    assert list(four) == ["diagonal", "Lanczos", "diagonal, variational", "Lanczos, variational"]
    for name in ("diagonal", "Lanczos"):
        assert four[name].log_marginal_likelihood() == fitted[name].log_marginal_likelihood()
        variational = four[f"{name}, variational"]
        assert variational.fitted.bound is not None and variational.prior_precision == 2.0
    posthoc = posteriors.fit(replace(CONFIG, curvature=curvature), DATA, NETWORK, 90.0, console())
    chosen = posthoc["Lanczos, variational"]
    assert chosen.prior_precision < 60.0
    assert 0.5 < chosen.evidence_optimum().prior_precision / chosen.prior_precision < 2
    posteriors.save(tmp_path, four, online, seconds=1.0)
    for loaded in (posteriors.load(tmp_path, NETWORK, online, refuse), posteriors.load(tmp_path, NETWORK)):
        assert list(loaded) == list(four)
        assert (
            loaded["Lanczos, variational"].log_marginal_likelihood()
            == four["Lanczos, variational"].log_marginal_likelihood()
        )


@pytest.mark.parametrize("content", [None, "", "{}", '{"fit": null}'])
def test_seconds_that_were_not_saved_are_none(content, tmp_path):
    (tmp_path / "laplace").mkdir()
    if content is not None:
        (tmp_path / "laplace" / "seconds.json").write_text(content)
    assert posteriors.seconds_to_fit(tmp_path) is None


def test_a_damaged_posterior_is_named(fitted, tmp_path):
    posteriors.save(tmp_path, fitted, CONFIG, seconds=1.0)
    files = [path for path in (tmp_path / "laplace" / "Lanczos").rglob("*") if path.is_file()]
    victim = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(UserError, match=f"must be whole: .*{victim.name}.*fitted again: .* --resume"):
        posteriors.load(tmp_path, NETWORK, CONFIG, refuse)
    with pytest.raises(UserError, match=r"there is none at .*diagonal"):
        posteriors.load(tmp_path / "nowhere", NETWORK, CONFIG, refuse)


def test_a_decomposition_that_has_not_converged_is_one_line_on_the_console():
    few = replace(CONFIG, curvature=Curvature(num_probes=2, max_vectors=4, tolerance=1e-3, microbatch=8))
    printed = console()
    posteriors.fit(few, DATA, NETWORK, 2.0, printed)
    lines = printed.file.getvalue().splitlines()
    assert sum(line.startswith("warning: ") and "converged" in line for line in lines) == 1
    assert any("4 vectors; error at precision" in line for line in lines)


def test_a_signal_between_the_structures_keeps_nothing(monkeypatch):
    calls = []

    def fit(la: Laplace, *arguments: Any, original: Any = Laplace.fit, **options: Any) -> Laplace:
        signal.raise_signal(signal.SIGINT)
        calls.append(la)
        return original(la, *arguments, **options)

    monkeypatch.setattr(Laplace, "fit", fit)
    with interruption.watch(), pytest.raises(Interrupted, match="while fitting the posteriors; the trained network is"):
        posteriors.fit(CONFIG, DATA, NETWORK, 2.0, console())
    assert len(calls) == 1


# --- a prior with one precision for each layer ----------------------------------------------------------------------


def test_precisions_of_layers_reach_both_posteriors_and_the_results():
    module = TwoLayers()
    variables = jax.jit(lambda: module.init(jax.random.key(0), DATA.train.images[:1]))()
    network = posteriors.make_network(module, variables["params"], {})
    by_layer = {"Dense_0": 4.0, "Dense_1": 0.5}
    fitted = posteriors.fit(CONFIG, DATA, network, by_layer, console())
    assert {name: la.prior_precision for name, la in fitted.items()} == dict.fromkeys(fitted, by_layer)
    mean = geometric_mean({name: np.float32(value) for name, value in by_layer.items()}, network.params)
    assert mean == pytest.approx(float(fitted["diagonal"].prior.precision), rel=1e-6)
    trained = TrainResult(network.params, {}, mean, [], 0.5, 0.25, prior_precision_by_layer=by_layer)
    assert trained.prior == by_layer
    # Every number of the evaluation is at a multiple of the trained ratios, so also the distance to the mode.
    distance = mode_distance(fitted["Lanczos"], trained.prior_precision)
    assert distance.decrement == pytest.approx(fitted["Lanczos"].mode_decrement(), rel=1e-4)
    isotropic = fitted["diagonal"].with_prior_precision(mean).log_marginal_likelihood().mean
    assert abs(fitted["diagonal"].evidence_curve([mean]).log_marginal_likelihood.mean[0] - isotropic) > 0.1


# --- evaluation -----------------------------------------------------------------------------------------------------


def results_of(config: Config, fitted: dict[str, Laplace]) -> Any:
    history = [{"epoch": 1, "phase": "polish", "loss": 1.0, "gradient_norm": None}]
    trained = TrainResult(PARAMS, {}, 2.0, history, joint_gradient_norm=0.5, joint_gradient_to_prior=0.25)
    return evaluate(config, DATA, foreign_images(config, DATA), trained, fitted, {"training": 1.0})


@pytest.fixture(scope="module")
def results(fitted):
    return results_of(CONFIG, fitted)


def test_every_method_is_evaluated_on_the_split(results):
    assert [method.label for method in results.methods] == ["MAP", "MAP + temperature"] + [
        f"{structure} Laplace ({choice}, {link})"
        for structure in ("diagonal", "Lanczos")
        for choice in ("evidence", "validation NLL")
        for link in ("MC", "probit")
    ]
    assert results.num_images == {"train": 26, "validation": 10, "test": 12}
    assert (results.num_weights, results.held_out, results.prior_gradient_norm) == (15, True, 2.0)
    probs = probabilities(DATA.test.images)
    values = results.methods[0].bootstrap.values
    assert values["nll"] == pytest.approx(-np.log(probs[np.arange(12), DATA.test.labels]).mean(), rel=1e-5)
    assert values["accuracy"] == np.mean(probs.argmax(axis=1) == DATA.test.labels)


def test_precisions_are_the_optima_of_the_curves(results, fitted):
    for name, curve in results.curves.items():
        assert curve.evidence_optimum == fitted[name].evidence_optimum().prior_precision
        chosen = {m.prior_choice: m.prior_precision for m in results.methods if m.structure == name}
        assert chosen == {"evidence": curve.evidence_optimum, "validation NLL": curve.nll_optimum}
        assert curve.nll_optimum in curve.precision
    diagonal = [log_evidence(np.diag(ggn(DATA.train.images)), delta) for delta in results.curves["diagonal"].precision]
    np.testing.assert_allclose(results.curves["diagonal"].log_evidence, diagonal, rtol=1e-5)


def test_a_variational_posterior_is_evaluated_at_the_precision_of_its_bound(fitted):
    """The curve at its sites as they are has its optimum elsewhere. Only Laplace is checked on training images."""
    data = (DATA.train.images, DATA.train.labels)
    options = {"approximation": Variational(num_samples=32, prior_structure="scalar"), "key": jax.random.key(0)}
    variational = fitted["diagonal"].fit(data, **options)
    again = results_of(CONFIG, fitted | {"diagonal, variational": variational})
    labels = [method.label for method in again.methods]
    assert labels[2:-4] == [method.label for method in results_of(CONFIG, fitted).methods][2:]
    assert labels[-3] == "diagonal variational (evidence, probit)"
    own = float(variational.prior_precision)
    assert again.methods[-3].prior_precision == again.curves["diagonal, variational"].evidence_optimum == own
    assert own != variational.evidence_optimum().prior_precision
    assert list(again.training_fits) == ["diagonal", "Lanczos"]
    assert again.foremost.label == "Lanczos Laplace (evidence, probit)"
    # One that keeps the precision of training is not said to have chosen it.
    curve = again.curves["diagonal, variational"]._replace(from_training=True)
    assert list(_choices(curve)) == ["training", "validation NLL"]


def test_training_images_are_predicted_by_the_posterior_at_its_evidence_optimum(results, fitted):
    optimum = results.curves["diagonal"].evidence_optimum
    at_optimum = fitted["diagonal"].with_prior_precision(optimum)
    found = results.training_fits["diagonal"]
    assert found.evidence == pytest.approx(-at_optimum.log_marginal_likelihood().mean / 26, rel=1e-5)
    probs = np.asarray(
        at_optimum.predictive(DATA.train.images, link_approx="mc", key=jax.random.key(1), num_samples=2000)
    )
    nll = -np.log(probs[np.arange(26), DATA.train.labels]).mean()
    assert found.nll == pytest.approx(nll, abs=0.02)


def test_the_probit_predictive_of_the_diagonal_is_that_of_the_definition(results):
    """Logits divided by sqrt(1 + pi/8 v), v their variances under the diagonal posterior."""
    method = next(m for m in results.methods if m.label == "diagonal Laplace (evidence, probit)")
    variances = 1 / (np.diag(ggn(DATA.train.images)) + method.prior_precision)
    inputs = features(DATA.test.images)
    logits = inputs @ WEIGHTS / np.sqrt(1 + np.pi / 8 * (inputs**2 @ variances.reshape(5, 3)))
    probs = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = -np.log(probs[np.arange(12), DATA.test.labels]).mean()
    assert method.bootstrap.values["nll"] == pytest.approx(expected, rel=1e-4)


def test_distances_from_the_mode_are_those_of_newton_steps(results):
    """Half the decrement is what a Gauss-Newton step promises: g' P^-1 g / 2 with the exact posterior precision."""
    residual = np.eye(3)[DATA.train.labels] - probabilities(DATA.train.images)
    gradient = (features(DATA.train.images).T @ residual - 2.0 * WEIGHTS).ravel()
    decrement = gradient @ np.linalg.solve(ggn(DATA.train.images) + 2.0 * np.eye(15), gradient)
    assert results.mode_in_training.prior_precision == 2.0
    assert results.mode_in_training.decrement == pytest.approx(decrement, rel=1e-3)
    assert results.mode_of_evidence.prior_precision == results.curves["Lanczos"].evidence_optimum


def test_a_run_is_written_whole(results, tmp_path):
    printed = Console(file=io.StringIO(), width=400)
    write_results(tmp_path, results, printed)
    names = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    drawn = ("evidence", "reliability", "detection", "rejection", "images", "training", "spectrum")
    figures = {f"figures/{name}.png" for name in drawn}
    assert names == {"metrics.json", "report.html"} | figures
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["config"]["data"]["mean"] == [MEAN]
    assert printed.file.getvalue().splitlines()[-1] == str(Path(tmp_path) / "report.html")


def test_another_split_is_not_held_out(fitted):
    config = replace(CONFIG, evaluation=replace(CONFIG.evaluation, split="validation"))
    results = results_of(config, fitted)
    assert not results.held_out
    probs = probabilities(DATA.validation.images)
    nll = -np.log(probs[np.arange(10), DATA.validation.labels]).mean()
    assert results.methods[0].bootstrap.values["nll"] == pytest.approx(nll, rel=1e-5)


def test_a_signal_while_evaluating_stops(fitted):
    with interruption.watch():
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped in stage evaluation; nothing of it is written"):
            results_of(CONFIG, fitted)
