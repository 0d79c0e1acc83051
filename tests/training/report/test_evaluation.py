"""The validation NLL chooses among prior precisions whose samples have converged, and says where its choice ends."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from bnnlaplace import Laplace, Network
from training.config import Config, Curvature, Evaluation, Prior
from training.data.load import ImageData
from training.data.reading import Split
from training.errors import UserError
from training.report.evaluation import (
    evaluated_split,
    foreign_images,
    is_from_training,
    lowest_nll,
    precision_curves,
)

GRID = np.array([0.1, 1.0, 10.0, 100.0])
ALL = np.ones(4, bool)


@pytest.mark.parametrize(
    ("nll", "converged", "chosen", "at_bound"),
    [
        ([3.0, 1.0, 2.0, 4.0], [1, 1, 1, 1], 1.0, False),
        ([0.0, 1.0, 2.0, 4.0], [0, 1, 1, 1], 1.0, True),  # the lowest of all has not converged
        ([0.0, 3.0, 2.0, 4.0], [0, 1, 1, 1], 10.0, False),
        ([4.0, 3.0, 2.0, 1.0], [1, 1, 1, 1], 100.0, True),
        ([np.nan, 1.0, np.nan, 2.0], [1, 1, 1, 1], 1.0, True),
        ([np.nan, 3.0, 1.0, np.inf], [1, 1, 1, 1], 10.0, True),
    ],
)
def test_only_converged_and_finite_points_are_chosen(nll, converged, chosen, at_bound):
    assert lowest_nll("Lanczos", GRID, np.array(nll), np.array(converged, bool)) == (chosen, at_bound)


@pytest.mark.parametrize(("nll", "converged"), [(np.full(4, np.nan), ALL), (np.full(4, np.inf), ALL), (GRID, ~ALL)])
def test_nothing_to_choose_from_is_one_clear_line(nll, converged):
    with pytest.raises(
        UserError, match=r"the Lanczos posterior must have .*; got none of 4 from 0.1 to 100; raise"
    ) as e:
        lowest_nll("Lanczos", GRID, nll, converged)
    assert "\n" not in str(e.value)


CONFIG = Config(
    curvature=Curvature(num_probes=2, max_vectors=4),
    evaluation=Evaluation(grid_low=1e-3, grid_high=1e4, grid_size=9, ood="noise"),
)


@pytest.mark.filterwarnings("ignore:the Krylov decomposition has not converged")
def test_curves_say_where_the_samples_have_converged():
    """Two probes and four of twenty vectors: good at large precision, not at small."""
    rng = np.random.default_rng(0)
    x, y = (
        rng.normal(size=(40, 5)).astype(np.float32) * np.array([8, 4, 2, 1, 0.5], np.float32),
        rng.integers(4, size=40),
    )
    network = Network.from_function(lambda w, x: x @ w, 0.1 * jax.random.normal(jax.random.key(0), (5, 4)))
    lanczos = Laplace(network).fit((x, y), key=jax.random.key(1), num_probes=2, max_vectors=4)
    diagonal = Laplace(network, hessian_structure="diag").fit((x, y))
    curves = precision_curves(CONFIG, {"diagonal": diagonal, "Lanczos": lanczos}, x, y)
    curve = curves["Lanczos"]
    structure = lanczos.structure
    expected = [structure.has_converged(structure.error(delta)) for delta in curve.precision]
    assert curve.converged.tolist() == expected
    assert not expected[0] and expected[-1]
    assert curve.nll_optimum in curve.precision[curve.converged]
    assert curves["diagonal"].converged.all()


@pytest.mark.parametrize("update", ["posthoc", "online", "joint"])
def test_a_variational_posterior_keeps_the_precision_that_training_chose(update):
    """Labels, legends and remarks called it the choice of its own bound."""
    config = dataclasses.replace(CONFIG, prior=Prior(update=update))
    laplace, variational = (SimpleNamespace(fitted=SimpleNamespace(bound=bound)) for bound in (None, object()))
    assert not is_from_training(config, laplace)
    assert is_from_training(config, variational) == (update != "posthoc")


def test_foreign_images_are_those_of_the_evaluated_split():
    rng = np.random.default_rng(0)
    splits = [Split(rng.integers(256, size=(n, 4, 4, 1), dtype=np.uint8), np.zeros(n, np.int32)) for n in (5, 3, 2)]
    data = ImageData("digits", ("0",), *splits)
    assert foreign_images(CONFIG, data).shape == (2, 4, 4, 1)
    inverted = dataclasses.replace(CONFIG, evaluation=Evaluation(split="validation", ood="inverted"))
    np.testing.assert_array_equal(foreign_images(inverted, data), 255 - data.validation.images)


def test_a_cap_takes_a_share_of_each_class_and_bounds_foreign_images():
    """The same images for one seed, more of them if the cap is larger, and all if it exceeds the split."""
    labels = np.repeat(np.arange(3, dtype=np.int32), (30, 20, 10))
    test = Split(np.arange(60, dtype=np.uint8).reshape(-1, 1, 1, 1) * np.ones((1, 4, 4, 1), np.uint8), labels)
    data = ImageData("digits", ("0", "1", "2"), test, test, test)

    def capped(count, **options):
        return dataclasses.replace(CONFIG, evaluation=Evaluation(examples=count, **options))

    few, more = (evaluated_split(capped(count), data) for count in (12, 30))
    np.testing.assert_array_equal(np.bincount(few.labels), (6, 4, 2))
    assert {int(image[0, 0, 0]) for image in few.images} < {int(image[0, 0, 0]) for image in more.images}
    np.testing.assert_array_equal(few.labels, labels[few.images[:, 0, 0, 0]])
    other = evaluated_split(dataclasses.replace(capped(12), seed=1), data)
    assert not np.array_equal(other.images, few.images)
    assert evaluated_split(capped(1000), data) is test and evaluated_split(CONFIG, data) is test
    np.testing.assert_array_equal(foreign_images(capped(12, ood="inverted"), data), 255 - few.images)
    assert len(foreign_images(capped(12, ood="noise"), data)) == 12
