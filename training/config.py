"""The configuration of a run: frozen records that a config file fills in and the command line overrides.

The docstring of a field is its `--help` text, and its type holds the range of its values. Pydantic refuses at
construction a value of another type or out of range, and reads and writes the records as JSON. Types are strict, as on
the command line: "3" and True are not counts. Only a list may stand for a tuple, and a string for a path. The complete
`Config` is saved beside the run as `config.json`, so that `training.evaluate` and `--resume` need nothing but the work
directory.
"""

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from training.errors import UserError

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _as_path(value: Any, info: ValidationInfo) -> Any:
    # Read from JSON, a strict path is a string.
    return Path(value) if isinstance(value, str) and info.mode == "python" else value


def _as_text(value: Any) -> Any:
    """Return a text or a path, unless no file could hold it or none could have it as its name."""
    try:
        holds = "\0" not in str(value) and str(value).encode() != b""
    except UnicodeEncodeError:
        holds = False
    if not holds:
        raise PydanticCustomError("text", "Input should be text in UTF-8, of at least one character")
    return value


Text = Annotated[str, AfterValidator(_as_text)]
Directory = Annotated[Path, BeforeValidator(_as_path), AfterValidator(_as_text)]
Means = Annotated[tuple[Finite, ...], Field(min_length=1), BeforeValidator(_as_tuple)]
Deviations = Annotated[tuple[Positive, ...], Field(min_length=1), BeforeValidator(_as_tuple)]

Section = TypeVar("Section")


def section(record: type[Section], remedy: str = "change it in the config file or by an option") -> type[Section]:
    """Make a class a frozen dataclass that checks its values and names a bad one in a `UserError` of one line."""
    # A field that does not exist is refused. Defaults are checked too, because some ranges depend on other fields.
    settings = ConfigDict(extra="forbid", validate_default=True, strict=True)
    record = dataclass(frozen=True, config=settings)(record)
    construct = record.__init__

    @functools.wraps(construct)
    def construct_or_explain(self: Section, *args: Any, **kwargs: Any) -> None:
        try:
            construct(self, *args, **kwargs)
        except ValidationError as error:
            # Not a `ValueError`, which tyro would print in its own words.
            raise UserError(f"{describe(error, [each.name for each in fields(record)])}; {remedy}") from None

    record.__init__ = construct_or_explain
    return record


def describe(error: ValidationError, names: Sequence[str] = ()) -> str:
    """Say in one line which setting is at fault, what it must be, and what it is.

    Names are those of the fields of a record in their order, of which some may have been given without their names.
    """
    fault = error.errors()[0]
    first, *rest = fault["loc"] or ("",)
    if isinstance(first, int) and first < len(names):
        first = names[first]
    section = [] if error.title == Config.__name__ else [error.title.lower()]
    option = ".".join([*section, *(key for key in (first, *rest) if key and isinstance(key, str))])
    if fault["type"] == "missing":
        return f"`{option}` must be given; got nothing"
    if fault["type"] == "unexpected_keyword_argument":
        return f"every setting must be a known one; got `{option}`"
    rule = re.sub(r" after validation, not \d+$", "", fault["msg"].replace("greater than or equal to", "at least"))
    for subject in ("Input should", "Tuple should"):
        rule = rule.replace(subject, "must")
    name = f"`{option}`" if option else "the file"
    return f"{name} {rule}; got {fault['input']!r:.200}"


def _ordered(value: float, info: ValidationInfo, holds: bool, rule: str, other: str) -> float:
    """Return the value of a field if it has the right order to an earlier field."""
    if not holds:
        context = {"rule": rule, "other": other, "limit": info.data[other.split(".")[1]]}
        raise PydanticCustomError("order", "Input should be {rule} `{other}`, {limit}", context)
    return value


@section
class Data:
    """The images, and how they are prepared."""

    name: Text = "digits"
    """A TFDS image-classification set. `digits` is embedded; others must be prepared in `array_record` format."""
    dir: Directory | None = None
    """The TFDS data directory; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets."""
    mean: Means | None = None
    """Mean of each channel, for pixels scaled to [0, 1]; default: measured on the training images and recorded."""
    std: Deviations | None = None
    """Standard deviation of each channel, for pixels scaled to [0, 1]; default: measured and recorded."""
    train_examples: Count | None = None
    """Use only this many training images (stratified by class); default: all."""
    validation_examples: Count | None = None
    """If the set has no validation split: how many training images to hold out (stratified); default: a tenth."""
    wrong_labels: Fraction = 0.0
    """Replace this fraction of the training labels by other classes, at random but alike in every run. Labels for
    validation and test stay as they are. An experiment: how does a method do when some labels are wrong?"""
    augment: bool = False
    """Random pad-crop and horizontal flip of the training images. For natural colour images."""


@section
class Model:
    """The Visual Attention Network."""

    variant: Text = "digits"
    """b0 to b6 (the official sizes), cifar (32x32 images) or digits (8x8 images)."""
    stem_kernel: Count | None = None
    """Kernel size of the first patch embedding; default: the variant's."""
    stem_stride: Count | None = None
    """Stride of the first patch embedding; default: the variant's."""
    drop_path: Fraction = 0.0
    """Probability of dropping the last residual branch during training; it grows linearly from 0 at the first."""


@section
class Optimizer:
    """Adam on the negative log joint, cosine schedule with warm-up, then a polishing phase towards the mode."""

    learning_rate: Positive = 1e-2
    """Peak learning rate."""
    batch_size: Count = 32
    """Images per step."""
    epochs: CountOrZero = 40
    """Epochs of training, in which batch statistics and drop-path are live. May be 0 only if --init-from is given."""
    warmup_epochs: CountOrZero = 3
    """Epochs of linear warm-up within `epochs`."""
    polish_epochs: CountOrZero = 45
    """Epochs of polishing after `epochs`. Batch statistics are frozen, drop-path and augmentation are off: the loss is
    then exactly the negative log joint that the Laplace approximation expands. The learning rate decays to zero at its
    mode."""
    polish_learning_rate: Positive = 1e-2
    """Learning rate at the start of the polishing phase."""
    second_moment_decay: Fraction = 0.9
    """Adam's decay per step of the mean squared gradient. At the usual 0.999 one spike slows a weight down for a
    thousand steps, and the weights that only the prior moves never arrive at the mode."""
    clip_norm: Positive = 10.0
    """Gradients of a larger global norm are scaled down to it."""

    @field_validator("warmup_epochs")
    @classmethod
    def _within_training(cls, value: int, info: ValidationInfo) -> int:
        return _ordered(value, info, value <= info.data.get("epochs", value), "at most", "optimizer.epochs")


# The options of each update, beside `precision`. Those that are left out take the defaults of the update.
PRIOR_OPTIONS = {
    "posthoc": (),
    "online": ("curvature", "burn_in", "every_epochs", "examples", "matvecs", "probes"),
    "joint": ("curvature", "burn_in", "every_steps", "examples", "matvecs", "probes", "learning_rate"),
}
PRIOR_DEFAULTS = {
    "online": {"curvature": "lanczos", "burn_in": 0, "every_epochs": 10, "examples": 256, "matvecs": 20, "probes": 4},
    "joint": {"curvature": "lanczos", "burn_in": 5, "every_steps": 20, "examples": 64, "matvecs": 10, "probes": 1}
    | {"learning_rate": 0.03},
}
_OF_LANCZOS = ("matvecs", "probes")


@section
class Prior:
    """The Gaussian prior N(0, 1/precision) on all trained weights, and how its precision is found."""

    precision: Positive = 1.0
    """Prior precision at the start of training."""
    update: Literal["posthoc", "online", "joint"] = "posthoc"
    """posthoc: training keeps the precision, and that of the posterior is chosen afterwards. online: every few epochs
    the precision is set to where the evidence prefers it. joint: weights and precision follow the gradient of the
    evidence, that of its log-determinant included. The curvature is that of the network as it predicts, with batch
    statistics frozen at their running values; while they are live, the log-determinant moves the precision alone."""
    structure: Literal["scalar", "layerwise"] = "scalar"
    """One precision for all weights, or one for each layer (online, joint)."""
    curvature: Literal["lanczos", "diagonal"] | None = None
    """The GGN of the log-determinant: the whole one by products, or its diagonal (online, joint); default: lanczos."""
    burn_in: CountOrZero | None = None
    """Epochs before the evidence counts (online, joint); default: 0 for online, 5 for joint."""
    every_epochs: Count | None = None
    """Epochs between two updates (online); default: 10."""
    every_steps: Count | None = None
    """Steps for which a gradient of the log-determinant is held (joint); default: 20."""
    examples: Count | None = None
    """Training images of the curvature, which is scaled by (all images) / (these images) (online, joint); default: 256
    for online, 64 for joint. Few images leave directions out, so that the log-determinant is too low; few products make
    it too high."""
    matvecs: Count | None = None
    """Products for each probe (online, joint, with lanczos); default: 20 for online, 10 for joint."""
    probes: Count | None = None
    """Probes of the log-determinant (online, joint, with lanczos); default: 4 for online, 1 for joint."""
    learning_rate: Positive | None = None
    """Adam's learning rate for the logarithm of the precision (joint); default: 0.03."""

    @field_validator("structure")
    @classmethod
    def _trained_by_the_evidence(cls, value: str, info: ValidationInfo) -> str:
        if value == "layerwise" and info.data.get("update") == "posthoc":
            raise PydanticCustomError("owner", "Input should be scalar where `prior.update` is posthoc")
        return value

    @field_validator("curvature", "burn_in", "every_epochs", "every_steps", "examples", *_OF_LANCZOS, "learning_rate")
    @classmethod
    def _of_this_update(cls, value: Any, info: ValidationInfo) -> Any:
        update, name = info.data.get("update"), info.field_name
        if value is None or update is None:
            return value
        if name not in PRIOR_OPTIONS[update]:
            owners = " or ".join(owner for owner, names in PRIOR_OPTIONS.items() if name in names)
            rule = "Input should be left out where `prior.update` is {update}: it belongs to {owners}"
            raise PydanticCustomError("owner", rule, {"update": update, "owners": owners})
        if name in _OF_LANCZOS and info.data.get("curvature") == "diagonal":
            raise PydanticCustomError("owner", "Input should be left out where `prior.curvature` is diagonal")
        return value

    def option(self, name: str) -> Any:
        """An option as it was given, or the default of this update."""
        value = getattr(self, name)
        return PRIOR_DEFAULTS.get(self.update, {}).get(name) if value is None else value


@section
class Curvature:
    """The GGN and its block Krylov decomposition."""

    num_probes: Annotated[int, Field(ge=2)] = 48
    """Normal probes, decomposed together as one block; also the number of posterior samples of every predictive."""
    max_vectors: Count = 512
    """Largest number of basis vectors kept (each as long as the weights); it bounds time and memory."""
    tolerance: Positive = 0.1
    """The decomposition stops growing when the bound on the relative error of a posterior sample falls below this
    (in the metric of the posterior precision, against the effective number of parameters), or at `max_vectors`."""
    microbatch: Count = 64
    """Images linearised at a time; bounds the memory of one product."""
    examples: Count | None = None
    """Estimate likelihood and curvature of the posteriors from at most this many training images (stratified by class),
    scaled up to all of them; default: all."""
    variational_iterations: CountOrZero = 0
    """Fit variational posteriors, too, in at most this many iterations; 0: those of Laplace alone. An iteration takes
    about as long as a Laplace fit."""

    @field_validator("max_vectors")
    @classmethod
    def _room_for_a_block(cls, value: int, info: ValidationInfo) -> int:
        return _ordered(value, info, value >= info.data.get("num_probes", value), "at least", "curvature.num_probes")


@section
class Evaluation:
    """Held-out evaluation."""

    split: Literal["test", "validation"] = "test"
    """The split to evaluate on."""
    ood: Text = "inverted"
    """Out-of-distribution images: inverted (the split's own images, intensities reversed), noise, or the name of a
    prepared TFDS set (resized and converted to the model's image shape)."""
    examples: Count | None = None
    """Evaluate on at most this many images of the split (stratified by class), and as many out-of-distribution ones,
    the same for every method; default: all. `data.validation_examples` bounds the validation images."""
    grid_size: Annotated[int, Field(ge=2)] = 29
    """Prior precisions on the curves of evidence, validation NLL and ECE."""
    grid_low: Positive = 1e-2
    """Smallest prior precision of the curves."""
    grid_high: Positive = 1e5
    """Largest prior precision of the curves."""
    bins: Count = 15
    """Bins of the calibration error."""
    resamples: Count = 1000
    """Bootstrap resamples behind every interval."""

    @field_validator("grid_high")
    @classmethod
    def _above_low(cls, value: float, info: ValidationInfo) -> float:
        return _ordered(value, info, value > info.data.get("grid_low", 0.0), "above", "evaluation.grid_low")


@section
class Config:
    """One experiment."""

    seed: Seed = 0
    """Seeds initialisation, batch order, augmentation, drop-path, probes and bootstrap, each by its own stream."""
    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optimizer: Optimizer = field(default_factory=Optimizer)
    prior: Prior = field(default_factory=Prior)
    curvature: Curvature = field(default_factory=Curvature)
    evaluation: Evaluation = field(default_factory=Evaluation)
    init_from: Directory | None = None
    """Start from weights that training.import_weights wrote to this directory; default: random ones. Their head is kept
    if it has as many outputs as there are classes. With --optimizer.epochs 0 --optimizer.warmup-epochs 0
    --optimizer.polish-epochs 0 --prior.update posthoc they are not trained: posteriors are fitted to them as they are.
    """

    @field_validator("init_from")
    @classmethod
    def _weights_to_begin_with(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        optimizer = info.data.get("optimizer")
        if value is None and optimizer is not None and optimizer.epochs == 0:
            raise PydanticCustomError("weights", "Input should be given where `optimizer.epochs` is 0")
        return value


def checked(config: Config) -> Config:
    """Return a config that was constructed anew from the values that this one has now.

    A config file is code, and code can put a value into a record without constructing it.

    Raises
    ------
    UserError
        A value has another type, or is out of its range.
    """
    values = _values(config)
    for entry in fields(Config):
        section = entry.default_factory
        if is_dataclass(section) and isinstance(values[entry.name], section):
            values[entry.name] = section(**_values(values[entry.name]))
    return Config(**values)


def _values(record: Any) -> dict[str, Any]:
    return {entry.name: getattr(record, entry.name) for entry in fields(record)}


def to_document(config: Config) -> dict[str, Any]:
    """Return a config as values that JSON has."""
    return TypeAdapter(Config).dump_python(config, mode="json")


def from_document(document: Any) -> Config:
    """Read what `to_document` returned. A field that is not there takes its default, as one that came later.

    Raises
    ------
    UserError
        It is not an object, or a field is unknown, has another type, or is out of its range.
    """
    document = with_present_names(document)
    try:
        return TypeAdapter(Config).validate_json(json.dumps(document), strict=True)  # "3" in quotes is not a number
    except ValidationError as error:
        raise UserError(describe(error)) from None


def with_present_names(document: Any) -> Any:
    """Return a document of an earlier release in the words of this one; any other is returned as it is.

    `prior.update` had a value "fixed", which is "posthoc" now. There `prior.every_epochs` and `prior.examples` had
    values that nothing used.
    """
    prior = document.get("prior") if isinstance(document, dict) else None
    if not isinstance(prior, dict) or prior.get("update") != "fixed":
        return document
    unused = ("every_epochs", "examples")
    return document | {
        "prior": {key: value for key, value in prior.items() if key not in unused} | {"update": "posthoc"}
    }
