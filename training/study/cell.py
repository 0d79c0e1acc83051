"""The cells of a study: one regime with one seed, all its trainings, and all posteriors of each."""

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import jax
from rich.console import Console

from training import faults
from training.cli import interruption
from training.errors import one_line
from training.study import fits, store
from training.study.config import Study, Training
from training.study.held_out import Fold, fit_by_folds
from training.study.inputs import HeldOut, held_out_images
from training.study.networks import (
    RegimeData,
    Trained,
    held_out_part,
    load_regime,
    network_of,
    run_config,
    train_network,
)
from training.study.points import PointMethods
from training.study.scores import Method
from training.study.store import POINTS, Result, Unit

_STOPPED = "stopped; the units that were finished are kept"
_VERSIONS = ("bnnlaplace", "jax", "flax", "optax", "numpy")

# What ends one method and not the study. Files that cannot be used, and a full disk, end the study.
FAILURES = (MemoryError, ArithmeticError, ValueError, jax.errors.JaxRuntimeError)


class Cell:
    """One cell. Networks and images are loaded when a unit first needs them."""

    def __init__(
        self, study: Study, of: RegimeData, held_out: HeldOut, seed: int, *, root: Path, console: Console
    ) -> None:
        self.study, self.of, self.held_out, self.seed = study, of, held_out, seed
        self.root, self.console = root, console
        self._networks: dict[tuple[str, int, int | None], Trained] = {}

    def methods(self, training: Training, name: str) -> list[Method]:
        """Compute one unit: train or load its network, and measure its methods."""
        config = run_config(self.study, self.of, training, self.seed)
        if name == POINTS:
            return list(self._points(training))
        posterior = next(each for each in self.study.posteriors if each.name == name)
        trained = self._trained(training, self.seed)
        with interruption.promptly(_STOPPED):
            given = config, self.of, self.study.measures
            rest = (training.name, self.held_out, config, self.study.measures)
            if posterior.chosen_by == "folds":
                found = fit_by_folds(posterior, trained, self._folds(training), *given)
            else:
                found = [fits.fit_posterior(posterior, trained, *given)]
            methods = [method for fit in found for method in fits.methods_of(fit, posterior, *rest)]
        for method in methods:
            method.description["seconds"]["training"] = trained.seconds
        return methods

    def _points(self, training: Training) -> Iterator[Method]:
        config = run_config(self.study, self.of, training, self.seed)
        points = PointMethods(training.name, self.held_out, config, self.study.measures.splits)
        network = self._network(training, self.seed)
        yield from points.of_map(network, self.of.data.validation)
        if training.folds:
            folds = self._folds(training)
            networks = [network_of(config, self.of.data, fold.trained) for fold in folds]
            yield from points.of_folds(network, networks, [fold.held_out for fold in folds])
        if training.ensemble:
            seeds = [self.seed + offset for offset in range(training.ensemble)]
            members = [self._network(training, seed) for seed in seeds]
            seconds = sum(self._trained(training, seed).seconds for seed in seeds)
            yield from points.of_ensemble(members, seconds)

    def _folds(self, training: Training) -> list[Fold]:
        divided = (held_out_part(self.of.data, training, fold) for fold in range(training.folds))
        return [
            Fold(self._trained(training, self.seed, fold), data.train, part)
            for fold, (data, part) in enumerate(divided)
        ]

    def _network(self, training: Training, seed: int) -> Any:
        config = run_config(self.study, self.of, training, seed)
        return network_of(config, self.of.data, self._trained(training, seed))

    def _trained(self, training: Training, seed: int, fold: int | None = None) -> Trained:
        key = training.name, seed, fold
        if key not in self._networks:
            options = {"root": self.root, "console": self.console, "fold": fold}
            self._networks[key] = train_network(self.study, self.of, training, seed, **options)
        return self._networks[key]


def run_cells(study: Study, units: Sequence[Unit], *, root: Path, data_dir: Path | None, console: Console) -> None:
    """Compute those of some units that are missing.

    Raises
    ------
    UserError
        Data are missing, or a unit that is there is damaged or of other settings.
    Interrupted
        Ctrl-C or SIGTERM came.
    """
    regime_of = cache(lambda name: _loaded(study, name, data_dir))
    cell_of: dict[tuple[str, int], Cell] = {}
    for unit in units:
        interruption.stop_if_requested(_STOPPED)
        if store.load_unit(root, unit, store.settings_of(study, unit)) is not None:
            continue
        if (unit.regime, unit.seed) not in cell_of:
            cell_of.clear()  # a cell that is finished
            of, held_out = regime_of(unit.regime)
            cell_of[unit.regime, unit.seed] = Cell(study, of, held_out, unit.seed, root=root, console=console)
            console.print(f"[bold]{unit.regime}, seed {unit.seed}[/bold]")
        result = _result(cell_of[unit.regime, unit.seed], unit)
        store.save_unit(root, unit, result, store.settings_of(study, unit))
        _say(console, unit, result)


def _loaded(study: Study, name: str, data_dir: Path | None) -> tuple[RegimeData, HeldOut]:
    """Load what the cells of a regime share."""
    regime = next(each for each in study.regimes if each.name == name)
    with interruption.promptly("stopped while loading images; the units that were finished are kept"):
        of = load_regime(study, regime, data_dir)
        return of, held_out_images(of.data, study.measures, of.data_dir)


def _result(cell: Cell, unit: Unit) -> Result:
    """Compute a unit. A failure of its own is its result."""
    training = next(each for each in cell.study.trainings if each.name == unit.training)
    started, failed, methods = perf_counter(), None, []
    try:
        methods = cell.methods(training, unit.name)
    except FAILURES as error:
        if _is_of_disk(error):
            raise
        failed = one_line(error)
    sizes = {name: len(getattr(cell.of.data, name).labels) for name in ("train", "validation")}
    about = {
        "images": sizes | {"test": cell.held_out.num_test, "shifted": len(cell.held_out.shift_labels)},
        "versions": {name: version(name) for name in _VERSIONS},
        "device": jax.devices()[0].device_kind,
    }
    return Result(methods, failed, perf_counter() - started, about)


def _is_of_disk(error: BaseException) -> bool:
    """Say whether an exception comes from a full disk or the like, which no other method would survive either."""
    fault = faults.describe(error)
    return fault is not None and "memory" not in fault


def _say(console: Console, unit: Unit, result: Result) -> None:
    words = result.failed and f"failed: {result.failed}"
    if words is None:
        nll = "; ".join(
            f"{method.description['prior'] or method.description['method']}"
            f"{', ' + method.description['link'] if method.description['link'] else ''} {method.numbers['nll']:.4g}"
            for method in result.methods
            if method.numbers["nll"] is not None
        )
        words = f"test NLL: {nll}"
    line = f"  {unit.training}, {unit.name} ({result.seconds:.0f} s): {words}"
    console.print(line, highlight=False, markup=False, soft_wrap=True)
