"""The configuration of a run: frozen dataclasses that a config file fills in and the command line overrides.

Every field's docstring is its `--help` text. A resolved `Config` is saved beside the run as `config.json`, so that
`training.evaluate` and `--resume` need nothing but the work directory. A value that no run could use is refused at
construction, whether it comes from a config file, the command line or a saved run.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from training.errors import UserError


def _require(record: Any, rule: str, holds: Any, *names: str) -> None:
    """Refuse the first named field whose value does not satisfy the rule; fields that are None are left alone."""
    for name in names:
        value = getattr(record, name)
        if value is not None and not holds(value):
            section = type(record).__name__.lower()
            option = name if section == "config" else f"{section}.{name}"
            raise UserError(f"`{option}` must be {rule}; got {value!r}; change it in the config file or by an option")


def _positive(value: float) -> bool:
    return math.isfinite(value) and value > 0


def _at_least(least: int) -> Any:
    return lambda value: value >= least


@dataclass(frozen=True)
class Data:
    """Which images, and how they are prepared."""

    name: str = "digits"
    """A TFDS image-classification set. `digits` is embedded; others must be prepared in `array_record` format."""
    dir: Path | None = None
    """The TFDS data directory; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    mean: tuple[float, ...] | None = None
    """Per-channel mean of the pixels scaled to [0, 1]; default: measured on the training images and recorded."""
    std: tuple[float, ...] | None = None
    """Per-channel standard deviation of the pixels scaled to [0, 1]; default: measured and recorded."""
    train_examples: int | None = None
    """Use only this many training images (stratified by class); default: all."""
    validation_examples: int | None = None
    """Where the set has no validation split: how many training images to hold out (stratified); default: a tenth."""
    augment: bool = False
    """Random pad-crop and horizontal flip, on training images only. For natural colour images."""

    def __post_init__(self) -> None:
        _require(self, "finite numbers", lambda mean: all(map(math.isfinite, mean)), "mean")
        _require(self, "positive and finite", lambda std: all(map(_positive, std)), "std")
        _require(self, "at least 1", _at_least(1), "train_examples", "validation_examples")


@dataclass(frozen=True)
class Model:
    """Which Visual Attention Network."""

    variant: str = "digits"
    """b0 to b6 (the official sizes), cifar (32x32 images) or digits (8x8 images)."""
    stem_kernel: int | None = None
    """Kernel size of the first patch embedding; default: the variant's."""
    stem_stride: int | None = None
    """Stride of the first patch embedding; default: the variant's."""
    drop_path: float = 0.0
    """Largest probability of dropping a residual branch during training, reached linearly with depth."""

    def __post_init__(self) -> None:
        _require(self, "at least 1", _at_least(1), "stem_kernel", "stem_stride")
        _require(self, "at least 0 and below 1", lambda rate: 0 <= rate < 1, "drop_path")


@dataclass(frozen=True)
class Optimizer:
    """Adam on the negative log joint, cosine schedule with warm-up, then a polishing phase towards the mode."""

    learning_rate: float = 1e-2
    """Peak learning rate."""
    batch_size: int = 32
    """Images per step."""
    epochs: int = 40
    """Epochs with batch statistics and drop-path live."""
    warmup_epochs: int = 3
    """Epochs of linear warm-up within `epochs`."""
    polish_epochs: int = 45
    """Further epochs with batch statistics frozen and drop-path and augmentation off: there the loss is exactly the
    negative log joint that the Laplace approximation expands, and the learning rate decays to zero at its mode."""
    polish_learning_rate: float = 1e-2
    """Learning rate at the start of the polishing phase."""
    second_moment_decay: float = 0.9
    """Adam's decay per step of the mean squared gradient. At the usual 0.999 one spike slows a weight down for a
    thousand steps, and the weights that only the prior moves never arrive at the mode."""
    clip_norm: float = 10.0
    """Gradients of a larger global norm are scaled down to it."""

    def __post_init__(self) -> None:
        _require(self, "positive and finite", _positive, "learning_rate", "polish_learning_rate", "clip_norm")
        _require(self, "at least 1", _at_least(1), "batch_size", "epochs")
        _require(self, "at least 0", _at_least(0), "warmup_epochs", "polish_epochs")
        _require(self, "at least 0 and below 1", lambda decay: 0 <= decay < 1, "second_moment_decay")
        _require(self, f"at most `optimizer.epochs`, {self.epochs}", lambda n: n <= self.epochs, "warmup_epochs")


@dataclass(frozen=True)
class Prior:
    """The isotropic Gaussian prior N(0, 1/precision) on all trained weights."""

    precision: float = 1.0
    """Prior precision at the start of training, and throughout it where `update` is fixed."""
    update: Literal["fixed", "online"] = "fixed"
    """online: replace the precision by the maximiser of the Lanczos evidence every few epochs of training."""
    every_epochs: int = 10
    """Epochs between online updates."""
    examples: int = 256
    """Training images per online update; the curvature is scaled by (all images) / (these images)."""

    def __post_init__(self) -> None:
        _require(self, "positive and finite", _positive, "precision")
        _require(self, "fixed or online", {"fixed", "online"}.__contains__, "update")
        _require(self, "at least 1", _at_least(1), "every_epochs", "examples")


@dataclass(frozen=True)
class Curvature:
    """The GGN and its block Krylov decomposition."""

    num_probes: int = 48
    """Normal probes, decomposed together as one block; also the number of posterior samples of every predictive."""
    max_vectors: int = 512
    """Largest number of basis vectors kept (each as long as the weights); it bounds time and memory."""
    tolerance: float = 0.1
    """The decomposition grows until the bound on the relative error of a posterior sample (in the metric of the
    posterior precision, against the effective number of parameters) falls below this, or `max_vectors` is reached."""
    microbatch: int = 64
    """Images linearised at a time; bounds the memory of one product."""

    def __post_init__(self) -> None:
        _require(self, "at least 2", _at_least(2), "num_probes")
        _require(self, "at least 1", _at_least(1), "max_vectors", "microbatch")
        _require(self, f"at least `curvature.num_probes`, {self.num_probes}", _at_least(self.num_probes), "max_vectors")
        _require(self, "positive and finite", _positive, "tolerance")


@dataclass(frozen=True)
class Evaluation:
    """Held-out evaluation."""

    split: Literal["test", "validation"] = "test"
    """The split to evaluate on."""
    ood: str = "inverted"
    """Out-of-distribution images: inverted (the split's own images, intensities reversed), noise, or the name of a
    prepared TFDS set (resized and converted to the model's image shape)."""
    grid_size: int = 29
    """Prior precisions on the curves of evidence, validation NLL and ECE."""
    grid_low: float = 1e-2
    """Smallest prior precision of the curves."""
    grid_high: float = 1e5
    """Largest prior precision of the curves."""
    bins: int = 15
    """Bins of the calibration error."""
    resamples: int = 1000
    """Bootstrap resamples behind every interval."""

    def __post_init__(self) -> None:
        _require(self, "at least 1", _at_least(1), "bins", "resamples")
        _require(self, "at least 2", _at_least(2), "grid_size")
        _require(self, "positive and finite", _positive, "grid_low", "grid_high")
        _require(self, f"above `evaluation.grid_low`, {self.grid_low}", lambda high: high > self.grid_low, "grid_high")


@dataclass(frozen=True)
class Config:
    """One experiment."""

    seed: int = 0
    """Seeds initialisation, batch order, augmentation, drop-path, probes and bootstrap, each by its own stream."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    prior: Prior = field(default_factory=Prior)
    curvature: Curvature = field(default_factory=Curvature)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self) -> None:
        _require(self, "from 0 to 2**31 - 1", lambda seed: 0 <= seed < 2**31, "seed")
