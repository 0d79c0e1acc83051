"""The methods without a posterior: MAP, MAP with a temperature, and the deep ensemble."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.special import softmax

from bnnlaplace import Network
from bnnlaplace.calibration import fit_temperature
from bnnlaplace.model.batched import outputs
from training.config import Config
from training.data.reading import Split
from training.study.inputs import HeldOut
from training.study.method_names import ENSEMBLE, MAP, MAP_PART, MAP_T_PART, MAP_T_SPLIT, MAP_T_VALIDATION
from training.study.scores import Method, measured


class PointMethods:
    """Measure point predictions of the networks of one training in one cell."""

    def __init__(self, training: str, held_out: HeldOut, config: Config, splits: int) -> None:
        self.training, self.held_out, self.config, self.splits = training, held_out, config, splits

    def of_map(self, network: Network, validation: Split) -> Iterator[Method]:
        """MAP, and MAP with a temperature fitted on the validation images."""
        logits = self._logits(network, self.held_out.images)
        yield self._measured(MAP, softmax(logits, axis=1))
        fitted = fit_temperature(self._logits(network, validation.images), validation.labels)
        yield self._with_temperature(MAP_T_VALIDATION, logits, fitted)

    def of_folds(self, network: Network, folds: Sequence[Network], parts: Sequence[Split]) -> Iterator[Method]:
        """Fit the temperature on training images that the networks of the folds have not seen.

        The network of all images has the temperature of all folds. The first fold has the temperature of its own share:
        there no number was fitted on images that the network has seen.
        """
        own = [self._logits(fold, part.images) for fold, part in zip(folds, parts, strict=True)]
        logits = self._logits(folds[0], self.held_out.images)
        yield self._measured(MAP_PART, softmax(logits, axis=1))
        yield self._with_temperature(MAP_T_PART, logits, fit_temperature(own[0], parts[0].labels))
        pooled = fit_temperature(np.concatenate(own), np.concatenate([part.labels for part in parts]))
        yield self._with_temperature(MAP_T_SPLIT, self._logits(network, self.held_out.images), pooled)

    def of_ensemble(self, members: Sequence[Network], seconds: float) -> Iterator[Method]:
        """The mean probability of several networks, which were trained in so many seconds."""
        probs = np.mean([softmax(self._logits(member, self.held_out.images), axis=1) for member in members], axis=0)
        yield self._measured(ENSEMBLE, probs, members=len(members), seconds={"training": seconds})

    def _with_temperature(self, name: str, logits: np.ndarray, fitted: Any) -> Method:
        probs = softmax(logits / fitted.temperature, axis=1)
        return self._measured(name, probs, temperature=fitted.temperature, temperature_at_bound=bool(fitted.at_bound))

    def _measured(self, name: str, probs: np.ndarray, **description: Any) -> Method:
        described = {"training": self.training, "method": name, "prior": None, "link": None, "warnings": []}
        return measured(probs, self.held_out, self.config.evaluation.bins, self.splits, **described, **description)

    def _logits(self, network: Network, images: np.ndarray) -> np.ndarray:
        return np.asarray(outputs(network, images, microbatch=self.config.curvature.microbatch), np.float64)
