"""The files of a study: one checkpoint for each posterior, or set of point methods, of each cell.

::

    WORKDIR/study.json                          the study, with its digest
    WORKDIR/networks/...                        trained networks; see `training.study.networks`
    WORKDIR/cells/REGIME/seed_S/TRAINING.UNIT/  the methods of one unit: their record, and the scores of each image
    WORKDIR/summary/...                         tables, figures and one JSON of everything

A unit is a directory that is written whole or not at all, with a SHA-256 of every file. So a study that is stopped goes
on with the units that are missing.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bnnlaplace.checkpoint import CheckpointError, load_pytree, save_pytree
from training import sealed
from training.config import Config
from training.config import to_document as config_document
from training.errors import UserError
from training.study.config import Study, applied, from_document, to_document
from training.study.scores import Method
from training.workdir import write_atomically

STUDY_FILE, NETWORKS, CELLS, SUMMARY = "study.json", "networks", "cells", "summary"

POINTS = "points"
"""The unit of the methods without a posterior."""

# What a study may change and keep its results: it may have more of these.
_MAY_GROW = ("regimes", "seeds", "trainings", "posteriors")

# Settings that change no number of a unit.
_OF_PLACE = ("dir",)

# Sections of the settings of a run that change no weight of a network.
_AFTER_TRAINING = ("curvature", "evaluation")


class Unit(NamedTuple):
    """The methods of one posterior, or those without, for one training in one cell."""

    regime: str
    seed: int
    training: str
    name: str

    @property
    def place(self) -> Path:
        """Where it is kept, below the work directory."""
        return Path(CELLS) / self.regime / f"seed_{self.seed}" / f"{self.training}.{self.name}"


class Result(NamedTuple):
    """What became of a unit."""

    methods: list[Method]
    failed: str | None
    """Why there are no methods; None if there are."""
    seconds: float
    about: dict[str, Any]
    """Facts of the cell: number of images, versions, device."""


def settings_of(study: Study, unit: Unit) -> dict[str, Any]:
    """Return what a unit is computed with, by the words of the config: a change of any makes it another unit."""
    regime = next(each for each in study.regimes if each.name == unit.regime)
    training = next(each for each in study.trainings if each.name == unit.training)
    settings = {"regime": to_document(regime), "training": to_document(training)}
    settings["measures"] = to_document(study.measures)
    settings["config"] = _anywhere(study.config)
    if unit.name != POINTS:
        posterior = next(each for each in study.posteriors if each.name == unit.name)
        document = to_document(posterior)
        settings["posterior"] = {name: value for name, value in document.items() if name != "trainings"}
        # It has one network, unless folds choose its precision.
        names = ["name", "settings", "weight_decay", *(["folds", "held_out"] if posterior.chosen_by == "folds" else [])]
        settings["training"] = {name: settings["training"][name] for name in names}
    return settings


def _anywhere(config: Config) -> dict[str, Any]:
    """Return the settings of a run without those that say where its data are."""
    document = config_document(config)
    document["data"] = {name: value for name, value in document["data"].items() if name not in _OF_PLACE}
    return document


def save_unit(root: Path, unit: Unit, result: Result, settings: Any) -> None:
    """Write a unit, with the settings that it was computed with."""
    arrays = {str(number): method.arrays for number, method in enumerate(result.methods)}
    record = {
        "unit": unit._asdict(),
        "settings": settings,
        "methods": [{"description": method.description, "numbers": method.numbers} for method in result.methods],
        "failed": result.failed,
        "seconds": result.seconds,
        "about": result.about,
    }
    path = root / unit.place
    path.parent.mkdir(parents=True, exist_ok=True)
    save_pytree(path, {**arrays, "count": np.int64(len(arrays))}, record)


def load_unit(root: Path, unit: Unit, settings: Any = None) -> Result | None:
    """Read a unit and verify it; None if there is none.

    If settings are given, the unit must have been computed with these.

    Raises
    ------
    UserError
        A file is damaged, or the unit was computed with other settings. The message names the directory.
    """
    path = root / unit.place
    if not path.exists():
        return None
    try:
        arrays, record = load_pytree(path)
        described = zip(record["methods"], range(int(arrays["count"])), strict=True)
        methods = [Method(each["description"], each["numbers"], arrays[str(number)]) for each, number in described]
        result = Result(methods, record["failed"], record["seconds"], record["about"])
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} must be as it was written; {error}; remove it to have it computed again") from None
    if settings is not None:
        _require_equal(path, record["settings"], settings)
    return result


def _require_equal(path: Path, there: Any, here: Any) -> None:
    """Refuse what was computed with other settings. The message names the directory and all that differs."""
    if differences := list(_differences(there, here)):
        raise UserError(
            f"{path} must be of the settings of this study; got {'; '.join(differences)}; put back what it was "
            "computed with, or use another --workdir"
        )


def _differences(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Yield what differs between the settings of a unit and those of now. A later release may have more or fewer."""
    if isinstance(there, dict) and isinstance(here, dict):
        # Overrides are open-ended: one that is absent differs.
        names = there.keys() | here.keys() if name.endswith("settings") else there.keys() & here.keys()
        for entry in sorted(names):
            yield from _differences(there.get(entry), here.get(entry), f"{name}.{entry}".lstrip("."))
    elif there != here:
        yield f"{name}: {there} there, {here} now"


def claim_study(root: Path, study: Study, resume: bool) -> None:
    """Save the study in its work directory, if all that is there was computed with its settings.

    A study that is resumed may have more regimes, seeds, trainings and posteriors, and other settings where nothing was
    computed with them. A study that is refused leaves the directory as it was.

    Raises
    ------
    UserError
        The directory holds something else, a study that is not to be resumed, or results of other settings.
    """
    path = root / STUDY_FILE
    others = sorted(entry.name for entry in root.iterdir() if not entry.name.startswith(".")) if root.exists() else []
    if others and STUDY_FILE not in others:
        raise UserError(
            f"`--workdir` must be new, empty, or hold a study; {root} holds {others[0]} and no {STUDY_FILE}; use "
            "another --workdir"
        )
    if others and not resume:
        raise UserError(f"a study must not overwrite another; {root} holds one; continue it with --resume")
    if others:
        _require_kept(root, study)
        for unit in units_of(study):
            load_unit(root, unit, settings_of(study, unit))
    write_atomically(path, sealed.dump(to_document(study), indent=2))


def load_study(root: Path, without: Sequence[str] = ()) -> Study:
    """Read the study that a work directory holds. Fields that are left out take their defaults.

    Raises
    ------
    UserError
        There is none, or it was changed after it was saved.
    """
    require_study(root)
    path = root / STUDY_FILE
    try:
        document = sealed.load(path)[0]
        return from_document({name: value for name, value in document.items() if name not in without})
    except UserError as error:
        raise UserError(f"{path} must be a study as it was saved; {error}; restore it, or pass its --config") from None


def require_study(root: Path) -> None:
    """Refuse a work directory that holds no study."""
    if not (root / STUDY_FILE).exists():
        raise UserError(f"`--workdir` must hold a study; {root} has no {STUDY_FILE}; check the path")


def _require_kept(root: Path, study: Study) -> None:
    """Refuse a study that lacks what the saved one has, or that would train other networks than those that are there.

    What it lacks would be out of its summary without a word.

    Raises
    ------
    UserError
        The study lacks a part of the saved one, it would train other networks, or no study is saved.
    """
    # What figures show decides no result. So a study that names a method wrongly there can be mended.
    there = load_study(root, without=("shown",))
    for name in _MAY_GROW:
        names = [[getattr(entry, "name", entry) for entry in getattr(each, name)] for each in (there, study)]
        if missing := [str(entry) for entry in names[0] if entry not in names[1]]:
            raise UserError(
                f"a study that goes on must have the {name} that it had; the config lacks {', '.join(missing)}; put "
                "them back, or use another --workdir"
            )
    units = set(units_of(study))
    for unit in units_of(there):  # A posterior may be of fewer trainings than it was.
        if unit not in units and (root / unit.place).exists():
            raise UserError(
                f"a study that goes on must have the posteriors of each training that it had; the config has no "
                f"{unit.name} of {unit.training}, and {root / unit.place} does; put it back, or use another --workdir"
            )
    for regime in there.regimes:
        for training in there.trainings:
            # Results have records of their settings, which count more than those of the study.
            has_results = any((root / CELLS / regime.name).glob(f"seed_*/{training.name}.*"))
            path = root / NETWORKS / regime.name / training.name
            if any(path.glob("seed_*")) and not has_results:
                with_folds = any(path.glob("seed_*_fold_*"))
                settings = [_trained_with(each, regime.name, training.name, with_folds) for each in (there, study)]
                _require_equal(path, *settings)


def _trained_with(study: Study, regime: str, training: str, with_folds: bool) -> dict[str, Any]:
    """Return what the networks of a training in a regime depend on, beside their seeds."""
    of = next(each for each in study.regimes if each.name == regime)
    by = next(each for each in study.trainings if each.name == training)
    config = _anywhere(applied(study.config, of.settings, by.settings))
    settings = {name: value for name, value in config.items() if name not in (*_AFTER_TRAINING, "seed")}
    return settings | {"weight_decay": by.weight_decay} | ({"held_out": by.held_out} if with_folds else {})


def units_of(study: Study, regimes: Sequence[str] = (), seeds: Sequence[int] = ()) -> list[Unit]:
    """List the units of some cells, by default of all, in the order in which they are computed."""
    return [
        Unit(regime.name, seed, training.name, name)
        for regime in study.regimes
        if not regimes or regime.name in regimes
        for seed in study.seeds
        if not seeds or seed in seeds
        for training in study.trainings
        for name in (POINTS, *(posterior.name for posterior in study.posteriors_of(training)))
    ]
