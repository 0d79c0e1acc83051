"""The trained networks of a study, each in a directory of its own, which several cells may share.

::

    WORKDIR/networks/REGIME/TRAINING/seed_S        trained on all training images of the regime
    WORKDIR/networks/REGIME/TRAINING/seed_S_fold_F the same without a share that is held out, for a temperature

The cells of other seeds take the members of their ensembles from here. A training that was stopped goes on.
"""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.console import Console

from bnnlaplace import Network
from training.cli import program
from training.config import Config
from training.data.load import ImageData, load, with_statistics
from training.data.reading import Split
from training.data.shuffle import stratified_indices
from training.errors import UserError
from training.models import van
from training.posteriors import make_network
from training.study.config import Regime, Study, Training, applied
from training.study.decoupled import train_decoupled
from training.study.store import NETWORKS
from training.train import loop
from training.train.checkpoints import seconds_of
from training.train.evidence import check_window
from training.workdir import claimed

# The same shares are held out in every cell.
_PART_SEED = 2**63 + 4


class Trained(NamedTuple):
    """A trained network."""

    params: Any
    batch_stats: Any
    prior: float | dict[str, float]
    """The prior precision of training, or of each layer; 1 if there was none."""
    seconds: float


class RegimeData(NamedTuple):
    """What all cells of a regime share."""

    regime: Regime
    data: ImageData
    pixels: dict[str, Any]
    """The measured statistics of the pixels, as settings."""
    data_dir: Path | None


def load_regime(study: Study, regime: Regime, data_dir: Path | None) -> RegimeData:
    """Load the images of a regime.

    Raises
    ------
    UserError
        See `training.data.load.load`.
    """
    section = applied(study.config, regime.settings).data
    section = dataclasses.replace(section, dir=data_dir or section.dir)
    data = load(section)
    measured = with_statistics(section, data.train.images)
    # Where the images come from changes no network, so that it is not among the settings of a run.
    pixels = {"data.mean": measured.mean, "data.std": measured.std, "data.dir": None}
    return RegimeData(regime, data, pixels, section.dir)


def run_config(study: Study, of: RegimeData, training: Training, seed: int) -> Config:
    """Return the complete settings of one run."""
    return applied(study.config, of.regime.settings, training.settings, of.pixels, {"seed": seed})


def check_trainings(study: Study, regimes: Sequence[str] = ()) -> None:
    """Raise a UserError if a training by the evidence would never compute it, in some regimes or, by default, any."""
    for regime in study.regimes:
        for training in study.trainings if not regimes or regime.name in regimes else ():
            try:
                if training.weight_decay is None:  # AdamW has no prior
                    check_window(applied(study.config, regime.settings, training.settings))
            except UserError as error:
                raise UserError(f"training {training.name} of regime {regime.name}: {error}") from None


def make_module(config: Config, data: ImageData) -> van.VAN:
    """Make the network of a run."""
    return van.from_config(config, len(data.class_names))


def network_of(config: Config, data: ImageData, trained: Trained) -> Network:
    """Make the network in inference mode."""
    return make_network(make_module(config, data), trained.params, trained.batch_stats)


def held_out_part(data: ImageData, training: Training, fold: int) -> tuple[ImageData, Split]:
    """Divide the training images into those to train on and the stratified share that one fold holds out."""
    train, rest = data.train, np.arange(len(data.train.labels))
    count = max(1, int(training.held_out * len(rest)))
    for _ in range(fold + 1):  # the shares of different folds have no image in common
        part = rest[stratified_indices(train.labels[rest], count, _PART_SEED)]
        rest = np.setdiff1d(rest, part)
    rest = np.setdiff1d(np.arange(len(train.labels)), part)
    return data._replace(train=train.take(rest)), train.take(part)


def train_network(
    study: Study,
    of: RegimeData,
    training: Training,
    seed: int,
    *,
    root: Path,
    console: Console,
    fold: int | None = None,
) -> Trained:
    """Train a network, finish its training, or load it.

    Parameters
    ----------
    study, of, training, seed
        Which network.
    root
        The work directory of the study.
    console
        Told of each training in a line.
    fold
        Leave out the share of the training images that this fold holds out.

    Raises
    ------
    FloatingPointError
        Its loss is not finite.
    UserError
        The directory holds another run.
    Interrupted
        Ctrl-C or SIGTERM came. The training was saved, and goes on at the next call.
    """
    name = f"seed_{seed}" if fold is None else f"seed_{seed}_fold_{fold}"
    workdir = root / NETWORKS / of.regime.name / training.name / name
    config = run_config(study, of, training, seed)
    data = of.data if fold is None else held_out_part(of.data, training, fold)[0]
    module = make_module(config, data)
    # The loop refuses a batch larger than the set; of a part, the batch shrinks with the set.
    if config.optimizer.batch_size > len(data.train.labels):
        config = applied(config, {"optimizer.batch_size": len(data.train.labels)})
    with claimed(workdir, config, True, program.reporter(console)) as config:
        is_new = not any(entry.is_dir() for entry in workdir.iterdir())
        if training.weight_decay is None:
            quiet = Console(quiet=True)
            result = _finite(partial(loop.train, config, data, module, workdir=workdir, resume=True, console=quiet))
            trained = Trained(result.params, result.batch_stats, result.prior, seconds_of(result))
        else:
            decay = training.weight_decay
            weights = train_decoupled(config, data, module, weight_decay=decay, workdir=workdir)
            trained = Trained(*weights[:2], 1.0, weights[2])
    if is_new:
        console.print(f"  trained {training.name}, {name}: {trained.seconds:.1f} s", highlight=False, markup=False)
    arrays = jax.tree.map(np.asarray, (trained.params, trained.batch_stats))
    return trained._replace(params=arrays[0], batch_stats=arrays[1])


def _finite(train: Callable[[], Any]) -> Any:
    """Train, and tell a loss that is not finite, a result, from files that cannot be used."""
    try:
        return train()
    except UserError as error:
        if "finite" in str(error):
            raise FloatingPointError(str(error)) from None
        raise
