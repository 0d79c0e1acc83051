"""A prior precision chosen by images that networks of folds have not seen."""

from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from bnnlaplace import Laplace, Network, calibration
from training.config import Config, Evaluation
from training.data.reading import Split
from training.study import held_out
from training.study.config import Measures, Posterior

RATIOS = {"w": 2.0, "b": 0.5}
WEIGHTS = np.random.default_rng(0).normal(size=(4, 3))


def split(count, seed):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(count, 4)).astype(np.float32)
    return Split(images, (images @ WEIGHTS + rng.normal(size=(count, 3))).argmax(axis=1))


@pytest.mark.filterwarnings("ignore:the weights are not at a mode")
@pytest.mark.parametrize("approximation", ["laplace", "variational"])
def test_the_lowest_nll_chooses_a_factor_and_the_ratios_of_precisions_stay(monkeypatch, approximation):
    params = {"w": jnp.asarray(1.8 * WEIGHTS, jnp.float32), "b": jnp.zeros(3)}
    network = Network.from_function(lambda params, x: x @ params["w"] + params["b"], params)
    fits = []

    def fitting(posterior, trained, config, train, measures):
        def fit(la):
            fits.append(la)
            return la.fit(tuple(train))

        return fit

    la = Laplace(network, hessian_structure="diag", prior_precision=RATIOS)
    monkeypatch.setattr(held_out, "unfitted", lambda *_: la)
    monkeypatch.setattr(held_out, "fitting", fitting)
    config = Config(evaluation=Evaluation(grid_size=9, grid_low=1e-5, grid_high=1e3))
    train, validation, fold = split(30, 5), split(40, 6), held_out.Fold(None, split(25, 3), split(20, 4))
    of = SimpleNamespace(data=SimpleNamespace(train=train, validation=validation))
    posterior = Posterior("diag", approximation, chosen_by="folds")
    found = list(held_out.fit_by_folds(posterior, None, [fold], config, of, Measures()))
    # Those of the fold and of the network; a walk ends after some precisions without a lower NLL.
    numbers = [int(np.log10(1e3 / next(iter(fit.choices.values()))).round()) for fit in found]
    walked = max(numbers) + 1 + held_out.PATIENCE
    assert walked < 9
    assert len(fits) == 2 * (1 if approximation == "laplace" else walked)

    # Each choice against the curve of a posterior that was fitted to the same images.
    chosen = {name: (fit.la, precision) for fit in found for name, precision in fit.choices.items()}
    for name, fitted_to, (images, labels) in (
        (held_out.FOLDS, fold.train, fold.held_out),
        (held_out.VALIDATION, train, validation),
    ):
        grid = np.geomspace(1e-5, 1e3, 9)
        curve = la.fit(tuple(fitted_to))
        factor = grid / float(la.prior.precision)
        nll = [
            calibration.negative_log_likelihood(
                curve.with_prior_precision({key: each * ratio for key, ratio in RATIOS.items()}).predictive(images),
                labels,
            )
            for each in factor
        ]
        best, precision = chosen[name]
        assert precision == pytest.approx(grid[int(np.argmin(nll))])
        assert float(best.prior.precision) == pytest.approx(precision)
        np.testing.assert_allclose(best.prior.relative, la.prior.relative, rtol=1e-6)
