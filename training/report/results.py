"""The results of a run in one typed record, and `metrics.json`, their form on disk."""

import dataclasses
import importlib.metadata
import math
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from bnnlaplace.calibration import Bootstrap, Interval, ReliabilityBins, intervals, paired_differences
from bnnlaplace.calibration.rejection import RejectionCurve
from bnnlaplace.variational.saturation import TrainingFit
from training import sealed
from training.workdir import write_atomically

if TYPE_CHECKING:
    from bnnlaplace.plots import PrecisionCurve

FORMAT_VERSION = 2
"""2 tells Laplace from variational posteriors by `approximation`, and in labels."""

EVIDENCE, TRAINING, PROBIT = "evidence", "training", "probit"
"""The choice of the prior precision and the link with which a posterior is in the short table."""


class Predictions(NamedTuple):
    """What a method predicts for each image. `metrics.json` leaves these arrays out."""

    classes: np.ndarray
    """The predicted class of each image, (N,)."""
    confidence: np.ndarray
    """Its probability, (N,)."""
    foreign_confidence: np.ndarray
    """The largest probability on each out-of-distribution image, (M,)."""
    rejection: RejectionCurve
    """Accuracy if the least confident images are rejected."""


@dataclass(frozen=True)
class MethodResult:
    """One way to predict, evaluated on the held-out images."""

    structure: str
    """MAP, diagonal or Lanczos."""
    bootstrap: Bootstrap
    """Metrics and their resamples, from `bnnlaplace.calibration.bootstrap` with the run's seed for every method."""
    reliability: ReliabilityBins
    predictions: Predictions
    approximation: str | None = None
    """Laplace or variational. None without a posterior."""
    prior_choice: str | None = None
    """What chose the prior precision: evidence, training or validation NLL. None without a posterior."""
    prior_precision: float | None = None
    link: str | None = None
    """MC or probit. None without a posterior."""
    temperature: float | None = None
    """The fitted temperature. None if the method has no temperature."""
    temperature_at_bound: bool = False
    """Whether the temperature is at an end of its search range."""

    @property
    def name(self) -> str:
        """Name without the choices of precision and link: `MAP + temperature`, `Lanczos variational`."""
        if self.temperature is not None:
            return f"{self.structure} + temperature"
        return " ".join(part for part in (self.structure, self.approximation) if part)

    @property
    def label(self) -> str:
        """Name of the method, unique in a run: `MAP + temperature`, `Lanczos variational (evidence, MC)`."""
        choices = ", ".join(part for part in (self.prior_choice, self.link) if part)
        return f"{self.name} ({choices})" if choices else self.name

    @property
    def is_in_short_table(self) -> bool:
        """Whether it uses nothing but the training data, or is a point prediction: one row a method."""
        return self.prior_choice in (None, EVIDENCE, TRAINING) and self.link in (None, PROBIT)

    @property
    def curve(self) -> str | None:
        """Name of its posterior among the curves of a run: `Lanczos`, `Lanczos, variational`; None without one."""
        if self.approximation is None:
            return None
        return self.structure if self.approximation == "Laplace" else f"{self.structure}, {self.approximation}"

    @property
    def metrics(self) -> dict[str, Interval]:
        """All metrics with their 95 % intervals."""
        return intervals(self.bootstrap)


@dataclass(frozen=True)
class KrylovResult:
    """The block Krylov decomposition of the GGN behind the Lanczos results, and its errors."""

    depth: int
    """Block steps."""
    num_vectors: int
    """Basis vectors kept, each as long as the weights."""
    num_probes: int
    converged: bool
    """Whether the bound on the sample error fell below the tolerance."""
    sample_error_bound: float
    """Bound on the relative error of a posterior sample, at the prior precision of the evidence."""
    log_det_low: float
    """Lower end of the bracket of log det(I + GGN / prior precision), nats, for what truncation may have added."""
    log_det_high: float
    """Upper end of that bracket, for the curvature that rounding may hide."""
    effective_parameters: float
    """tr G (G + delta I)^-1 at the prior precision of the evidence: how many directions the data determine."""
    ritz_values: np.ndarray
    residual_norms: np.ndarray
    """One for each Ritz value: an eigenvalue of the GGN is that near."""


class ModeDistance(NamedTuple):
    """How far the trained weights are from the mode of the log joint at one prior precision."""

    prior_precision: float
    decrement: float
    """Squared distance in standard deviations of the Lanczos posterior, which is twice the nats that a Gauss-Newton
    step promises."""
    effective_parameters: float
    """Mean squared distance of a posterior sample, in the directions that the data determine."""


class Example(NamedTuple):
    """One evaluated image that the report shows."""

    index: int
    """Its position among the evaluated images."""
    image: np.ndarray
    """uint8, (H, W, 1) or (H, W, 3)."""
    label: int


@dataclass(frozen=True)
class RunResults:
    """All that the table, `metrics.json` and `report.html` show."""

    data: str
    """Name of the image set."""
    num_images: Mapping[str, int]
    """Number of images by split: train, validation, test."""
    split: str
    """The split that the methods are evaluated on."""
    num_evaluated: int
    """Number of its images that they are evaluated on: all, or `evaluation.examples`."""
    num_foreign: int
    """Number of out-of-distribution images."""
    ood: str | None
    """The out-of-distribution images. None if there are none."""
    num_weights: int
    seed: int
    config: Mapping[str, Any]
    """The resolved configuration, nested by section."""
    seconds: Mapping[str, float]
    """Wall-clock seconds by stage."""
    methods: Sequence[MethodResult]
    """Methods in the order of the table. The first is MAP, with which the others are compared."""
    class_names: Sequence[str]
    examples: Mapping[str, Sequence[Example]]
    """Some evaluated images in groups, by title."""
    curves: Mapping[str, "PrecisionCurve"]
    """Curves by posterior, named as `MethodResult.curve` is. Lanczos is one of them."""
    curve_link: str
    """The predictive behind the validation curves: MC or probit."""
    krylov: KrylovResult
    history: Sequence[Mapping[str, Any]]
    """One record per epoch; see `bnnlaplace.plots.training_curve`."""
    gradient_norm: float
    """Norm of the gradient of the log joint over all training images, at the weights that Laplace expands at."""
    prior_gradient_norm: float
    """Norm of the prior term's gradient there, the scale on which `gradient_norm` is small or not."""
    mode_in_training: ModeDistance
    """Distance to the mode at the prior precision of training, to which training heads."""
    mode_of_evidence: ModeDistance
    """Distance to the mode at the prior precision that maximises the Lanczos evidence, which is a different mode."""
    training_fits: Mapping[str, TrainingFit]
    """For each Laplace posterior, named as in `curves`, at the prior precision that its evidence prefers: NLL of some
    training images beside -log evidence / N."""
    command: Sequence[str]
    """The words to type to have the run again, or the evaluation if it is one of a finished run."""
    chosen_on: str = "validation"
    """The split that the temperature and the second prior precision of each structure were chosen on."""

    def __post_init__(self) -> None:
        labels = [method.label for method in self.methods]
        if not labels or len(set(labels)) < len(labels):
            raise ValueError(f"there must be at least one method, each with a label of its own; got {labels}")
        if "Lanczos" not in self.curves:
            raise ValueError(f"curves must hold Lanczos, whose decomposition is `krylov`; got {list(self.curves)}")
        if not any(method.structure == "Lanczos" and method.is_in_short_table for method in self.methods):
            raise ValueError(f"methods must hold Lanczos by the {EVIDENCE}, through {PROBIT}; got {labels}")

    @property
    def short_table(self) -> list[MethodResult]:
        """The point predictions, and each posterior by the evidence alone through one link."""
        return [method for method in self.methods if method.is_in_short_table]

    @property
    def foremost(self) -> MethodResult:
        """The method whose numbers the report opens with: Lanczos by the evidence alone, variational if there is."""
        return max(
            (method for method in self.short_table if method.structure == "Lanczos"),
            key=lambda method: method.approximation == "variational",
        )

    @property
    def temperature_scaled(self) -> MethodResult | None:
        """MAP with a temperature. None if the run has none."""
        return next((method for method in self.methods if method.temperature is not None), None)

    @property
    def trained_by(self) -> str:
        """Name of the posterior whose evidence training recorded."""
        is_diagonal = self.config.get("prior", {}).get("curvature") == "diagonal"
        return "diagonal Laplace" if is_diagonal else "Lanczos Laplace"

    @property
    def kept_precision(self) -> str | None:
        """The sentence for readers if variational posteriors keep the prior precision of training; None otherwise."""
        if not any(curve.from_training for curve in self.curves.values()):
            return None
        return (
            "Variational posteriors keep the prior precision that training chose by the evidence of "
            f"{self.trained_by}: their own lower bound did not choose it."
        )

    def posterior_name(self, curve: str) -> str:
        """Name of a curve in tables and figures: `Lanczos Laplace` for `Lanczos`."""
        return next((method.name for method in self.methods if method.curve == curve), curve)

    @property
    def held_out(self) -> bool:
        """Whether the images that the methods are evaluated on had no part in choosing temperatures and precisions."""
        return self.split != self.chosen_on


def difference_from_map(results: RunResults, method: MethodResult) -> dict[str, Interval]:
    """Compute the paired 95 % interval of each metric of a method minus that of MAP, the first method."""
    return paired_differences(method.bootstrap, results.methods[0].bootstrap)


def environment() -> dict[str, str | int | None]:
    """Name the versions and the hardware that can change the numbers."""
    versions: dict[str, str | int | None] = {"python": platform.python_version()}
    for package in ("bnnlaplace", "jax", "jaxlib", "flax", "optax", "numpy"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None  # The programs can run from a source tree that is not installed.
    device = jax.devices()[0]
    return versions | {"platform": device.platform, "device": device.device_kind, "cpu_count": os.cpu_count()}


def write_metrics(path: Path, results: RunResults) -> None:
    """Write `metrics.json`, atomically: a file under its final name is complete.

    It is strict JSON: a value that is not finite (the NLL of an impossible label, an empty bin) is null. Intervals are
    objects of value, low and high. The bootstrap replicates, the predictions and the images are left out; the paired
    differences from MAP are in. The entry `sha256` is the digest of all others.

    Raises
    ------
    StorageError
        The file cannot be written.
    """
    content = {
        "format_version": FORMAT_VERSION,
        "environment": environment(),
        **{
            field.name: getattr(results, field.name)
            for field in dataclasses.fields(results)
            if field.name not in ("methods", "krylov", "examples")
        },
        "held_out": results.held_out,
        "methods": [
            {
                "label": method.label,
                "structure": method.structure,
                "approximation": method.approximation,
                "prior_choice": method.prior_choice,
                "prior_precision": method.prior_precision,
                "link": method.link,
                "temperature": method.temperature,
                "temperature_at_bound": method.temperature_at_bound,
                "metrics": method.metrics,
                "difference_from_map": difference_from_map(results, method),
                "reliability": method.reliability,
            }
            for method in results.methods
        ],
        "krylov": dataclasses.asdict(results.krylov),
    }
    write_atomically(path, sealed.dump(_plain(content), indent=1))


def _plain(value: Any) -> Any:
    """Convert a value to the types that JSON has."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)
