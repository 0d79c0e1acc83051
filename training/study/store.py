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
from training.errors import UserError
from training.study.config import Study, from_document, to_document
from training.study.scores import Method
from training.workdir import write_atomically

STUDY_FILE, CELLS, SUMMARY = "study.json", "cells", "summary"

POINTS = "points"
"""The unit of the methods without a posterior."""

# What a study may change and keep its results: it may have more of these.
_MAY_GROW = ("regimes", "seeds", "trainings", "posteriors")


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
    if settings is not None and (differences := list(_differences(record["settings"], settings))):
        raise UserError(
            f"{path} must be of the settings of this study; got {'; '.join(differences)}; remove it, or use another "
            "--workdir"
        )
    return result


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
    """Save the study in its work directory, or compare it with the one that is there.

    A study that is resumed may have more regimes, seeds, trainings and posteriors. Other changes are left to the units,
    each of which records its settings.

    Raises
    ------
    UserError
        The directory holds a study and it is not to be resumed, or something else.
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
        _require_kept(load_study(root), study)
    write_atomically(path, sealed.dump(to_document(study), indent=2))


def load_study(root: Path) -> Study:
    """Read the study that a work directory holds.

    Raises
    ------
    UserError
        There is none, or it was changed after it was saved.
    """
    path = root / STUDY_FILE
    try:
        return from_document(sealed.load(path)[0])
    except FileNotFoundError:
        raise UserError(f"`--workdir` must hold a study; {root} has no {STUDY_FILE}; check the path") from None
    except UserError as error:
        raise UserError(f"{path} must be a study as it was saved; {error}; restore it") from None


def _require_kept(there: Study, here: Study) -> None:
    """Refuse a study that lacks what the saved one has; it would be out of its summary without a word."""
    for name in _MAY_GROW:
        names = [[getattr(entry, "name", entry) for entry in getattr(each, name)] for each in (there, here)]
        if missing := [str(entry) for entry in names[0] if entry not in names[1]]:
            raise UserError(
                f"a study that goes on must have the {name} that it had; the config lacks {', '.join(missing)}; put "
                "them back, or use another --workdir"
            )


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
