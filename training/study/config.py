"""The configuration of a study: regimes of data, ways to train, posteriors, and what is measured.

A study is a product: every regime with every seed is a cell, and a cell has every training with every posterior. Each
record overrides the settings of one base `training.config.Config`, so that two methods differ in what their names say
and in nothing else.
"""

import dataclasses
import json
import re
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from training.config import Config, Count, CountOrZero, Positive, Seed, Text, describe, section
from training.data.shifts import STRENGTHS
from training.errors import UserError
from training.study import method_names


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _items(least: int = 0) -> Any:
    return Field(min_length=least), BeforeValidator(_as_tuple)


MOST_SHOWN = 6  # methods in a figure: as many as there are colours

_LONGEST = 60  # characters of a name

# Settings that AdamW with a decoupled decay of the weights does not have.
_OF_THE_LOOP = ("prior.", "optimizer.polish_learning_rate", "optimizer.second_moment_decay")


def _as_name(value: str) -> str:
    """Return a name, if a folder can have it on every system."""
    if not re.fullmatch(r"[a-z0-9][a-z0-9_-]*", value) or len(value) > _LONGEST:
        rule = (
            f"begin with a letter from a to z or a digit, have only these, - and _, and at most {_LONGEST} characters"
        )
        raise PydanticCustomError("name", f"Input should {rule}")
    return value


def _without_seed(value: dict[str, Any]) -> dict[str, Any]:
    if "seed" in value:
        raise PydanticCustomError("seed", "Input should leave out seed, which `study.seeds` has")
    if "init_from" in value:
        raise PydanticCustomError("weights", _FROM_RANDOM)
    return value


def _from_random_weights(value: Config) -> Config:
    if value.init_from is not None:
        raise PydanticCustomError("weights", _FROM_RANDOM)
    return value


# Seeds, ensembles and networks of folds differ by their first weights.
_FROM_RANDOM = "Input should leave out init_from: networks of a study start from random weights"

Name = Annotated[str, AfterValidator(_as_name)]
Names = Annotated[tuple[Name, ...], *_items()]
Settings = Annotated[dict[str, Any], AfterValidator(_without_seed)]

record = partial(section, remedy="change it in the config file")


@record
class Regime:
    """The data of some cells."""

    name: Name
    settings: Settings = dataclasses.field(default_factory=dict)
    """Settings of the run by their dotted names, such as {"data.train_examples": 100}."""


@record
class Training:
    """How weights are trained."""

    name: Name
    settings: Settings = dataclasses.field(default_factory=dict)
    """Settings of the run by their dotted names, such as {"prior.update": "joint"}."""
    weight_decay: Positive | None = None
    """AdamW with this decoupled decay of all kernels, for the epochs of both phases, without a prior: `settings` may
    have none of the prior or of the phase of polishing beside it. None: the loop of the program, which trains to a mode
    of the log joint, with its prior."""
    ensemble: CountOrZero = 0
    """Networks of a deep ensemble: those of the cell's seed and of the seeds that follow it. 0: no ensemble."""
    folds: CountOrZero = 5
    """Further networks, each of which does not see another share of the training images. What they predict for it
    chooses a temperature. One share of a few images, all of them right, would make the network as confident as can be.
    0: no such networks."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """The share that each of them does not see."""

    @field_validator("weight_decay")
    @classmethod
    def _without_a_prior(cls, value: float | None, info: ValidationInfo) -> float | None:
        ignored = [name for name in info.data.get("settings", ()) if name.startswith(_OF_THE_LOOP)]
        if value is not None and ignored:
            rule = f"Input should be None beside {', '.join(ignored)}, which AdamW with a decoupled decay does not have"
            raise PydanticCustomError("owner", rule)
        return value

    @field_validator("ensemble")
    @classmethod
    def _of_several(cls, value: int) -> int:
        if value == 1:
            raise PydanticCustomError("ensemble", "Input should be 0, or at least 2")
        return value

    @field_validator("held_out")
    @classmethod
    def _in_folds(cls, value: float, info: ValidationInfo) -> float:
        if value * info.data.get("folds", 0) > 1 + 1e-9:
            raise PydanticCustomError("folds", "Input should be at most 1 / `training.folds`")
        return value


@record
class Posterior:
    """A Gaussian posterior of the weights of a trained network, and one switch each for its variants."""

    structure: Literal["diag", "kron", "full", "lanczos"]
    approximation: Literal["laplace", "variational"] = "variational"
    weights: Literal["all", "last_layer", "without_normalisation"] = "all"
    """Which weights have a posterior. without_normalisation: all but scales and biases of normalisation layers."""
    prior: Literal["training", "scalar", "layerwise", "g"] = "training"
    """What the evidence chooses. training: a common factor of the precisions of training. scalar: one precision.
    layerwise: one precision for each layer. g: a factor of the diagonal of the GGN, bounded below (the g-prior)."""
    chosen_by: Literal["evidence", "folds"] = "evidence"
    """What chooses the prior precision. evidence: the evidence, or its lower bound. folds: held-out shares of the
    training images, which choose a temperature in the same way; see `training.study.held_out`."""
    fixed_mean: bool = False
    """A variational posterior whose mean stays at the weights of the network."""
    folded: bool = False
    """Batch normalisation is folded into kernels before the posterior is fitted; see `training.study.fold`."""
    trainings: Names = ()
    """The trainings that have this posterior; none are named: all."""

    @property
    def name(self) -> str:
        """Its name in files and tables."""
        subset = {"all": "", "last_layer": "last-layer-", "without_normalisation": "without-norms-"}[self.weights]
        prior = "" if self.prior == "training" else f"-{self.prior}"
        switches = {"-folded": self.folded, "-fixed-mean": self.fixed_mean, "-by-folds": self.chosen_by == "folds"}
        return f"{subset}{self.structure}-{self.approximation}{prior}" + "".join(
            name for name, is_on in switches.items() if is_on
        )

    @field_validator("folded")
    @classmethod
    def _of_all(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("weights") != "all":
            raise PydanticCustomError("folded", "Input should be False unless `weights` is all")
        return value

    @field_validator("chosen_by")
    @classmethod
    def _of_one_precision(cls, value: str, info: ValidationInfo) -> str:
        if value == "folds" and info.data.get("prior") == "layerwise":
            raise PydanticCustomError("chosen_by", "Input should be evidence where `prior` is layerwise")
        return value

    @field_validator("fixed_mean")
    @classmethod
    def _of_variational(cls, value: bool, info: ValidationInfo) -> bool:
        if value and info.data.get("approximation") != "variational":
            raise PydanticCustomError("fixed_mean", "Input should be False unless `approximation` is variational")
        return value


@record
class Measures:
    """What methods are measured on."""

    shifts: Annotated[tuple[Literal[tuple(STRENGTHS)], ...], *_items()] = tuple(STRENGTHS)
    """Shifts of test images, each at severities 1 to 5."""
    shift_examples: Count = 200
    """Test images that are shifted: the same ones for all shifts, severities, methods and seeds."""
    foreign: Annotated[tuple[Text, ...], *_items()] = ("inverted", "noise")
    """Sets of foreign images, as `training.data.foreign` names them."""
    test_examples: Count | None = None
    """Use only this many test images, and as many of each foreign set (stratified, the same ones in every cell);
    default: all."""
    samples: Annotated[int, Field(ge=2)] = 100
    """Samples of the Monte Carlo predictive; "lanczos" has one for each probe."""
    splits: Count = 5
    """Divisions of the test images for the calibrated log likelihood."""
    max_iterations: Count = 20
    """Iterations of a variational fit."""
    max_refits: Count = 4
    """Fits after the first, in the search for the best prior precision of a variational posterior."""


@record
class Study:
    """One study."""

    config: Annotated[Config, AfterValidator(_from_random_weights)]
    """The base of all runs. Its seed is not used. `evaluation.bins` and the grid of precisions are."""
    regimes: Annotated[tuple[Regime, ...], *_items(1)]
    seeds: Annotated[tuple[Seed, ...], *_items(1)]
    trainings: Annotated[tuple[Training, ...], *_items(1)]
    posteriors: Annotated[tuple[Posterior, ...], *_items()] = ()
    measures: Measures = dataclasses.field(default_factory=Measures)
    reference: Name | None = None
    """The training whose MAP, and MAP with a temperature, all methods are compared with; default: the first."""

    shown: Annotated[tuple[Text, ...], Field(max_length=MOST_SHOWN), *_items()] = ()
    """The methods of the figures, as TRAINING.METHOD, at most six; default: the reference, and some posteriors. METHOD
    is the name of a posterior, or one of `training.study.method_names`. A posterior is shown at the prior of its own
    choice, evidence or folds, through the probit link."""

    @field_validator("regimes", "seeds", "trainings", "posteriors", "shown")
    @classmethod
    def _each_once(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        names = [getattr(entry, "name", entry) for entry in value]
        if len(set(names)) < len(names):
            raise PydanticCustomError("twice", "Input should have each name once")
        return value

    @field_validator("posteriors")
    @classmethod
    def _of_trainings(cls, value: tuple[Posterior, ...], info: ValidationInfo) -> tuple[Posterior, ...]:
        known = {training.name for training in info.data.get("trainings", ())}
        named = {name for posterior in value for name in posterior.trainings}
        if unknown := sorted(named - known):
            raise PydanticCustomError("unknown", f"Input should name trainings of the study, not {', '.join(unknown)}")
        without = {training.name for training in info.data.get("trainings", ()) if not training.folds}
        for posterior in value:
            lacking = sorted(without & set(posterior.trainings or without))
            if posterior.chosen_by == "folds" and lacking:
                rule = f"Input should name trainings with folds for {posterior.name}, not {', '.join(lacking)}"
                raise PydanticCustomError("folds", rule)
        return value

    @field_validator("reference")
    @classmethod
    def _one_of_them(cls, value: str | None, info: ValidationInfo) -> str | None:
        known = [training.name for training in info.data.get("trainings", ())]
        if value is not None and value not in known:
            raise PydanticCustomError("unknown", f"Input should be one of {', '.join(known)}")
        return value

    @field_validator("shown")
    @classmethod
    def _of_methods(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        trainings = {training.name: training for training in info.data.get("trainings", ())}
        for shown in value if {"trainings", "posteriors"} <= info.data.keys() else ():
            name, _, method = shown.partition(".")
            if name not in trainings:
                rule = f"Input should be TRAINING.METHOD, of the trainings {', '.join(trainings)}, which {shown} is not"
                raise PydanticCustomError("unknown", rule)
            training = trainings[name]
            known = method_names.names_of(training.folds, training.ensemble)
            known += [each.name for each in info.data["posteriors"] if name in (each.trainings or (name,))]
            if method not in known:
                rule = f"Input should name methods that the study has, of {name} {', '.join(known)}, not {shown}"
                raise PydanticCustomError("unknown", rule)
        return value

    @property
    def reference_name(self) -> str:
        """The training that all methods are compared with."""
        return self.reference or self.trainings[0].name

    def posteriors_of(self, training: Training) -> tuple[Posterior, ...]:
        """The posteriors of one training."""
        return tuple(each for each in self.posteriors if not each.trainings or training.name in each.trainings)


def applied(config: Config, *settings: Settings) -> Config:
    """Return a config with some settings changed.

    Raises
    ------
    UserError
        A name is no setting, or a value is not one that it can have. The message names it.
    """
    for name, value in (entry for each in settings for entry in each.items()):
        part, _, entry = name.rpartition(".")
        of = getattr(config, part, None) if part else config
        if not dataclasses.is_dataclass(of) or entry not in {each.name for each in dataclasses.fields(of)}:
            raise UserError(f"the settings of a regime or training must be those of a run; got {name!r}; see --help of "
                            "training.fit_van")  # fmt: skip
        changed = dataclasses.replace(of, **{entry: value})
        config = dataclasses.replace(config, **{part: changed}) if part else changed
    return config


def to_document(entry: Any) -> dict[str, Any]:
    """Return a record of a study as values that JSON has."""
    return TypeAdapter(type(entry)).dump_python(entry, mode="json")


def from_document(document: Any) -> Study:
    """Read what `to_document` returned of a study; a field that is not there takes its default.

    Raises
    ------
    UserError
        It is not that of a study. The message names the field.
    """
    try:
        study = TypeAdapter(Study).validate_json(json.dumps(document), strict=True)
    except ValidationError as error:
        raise UserError(describe(error)) from None
    for regime in study.regimes:
        for training in study.trainings:
            applied(study.config, regime.settings, training.settings)
    return study
