"""The posteriors of a run, Laplace and variational, with the diagonal GGN and with Lanczos, on its training images."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from rich.console import Console

from bnnlaplace import Laplace, Network, Variational
from bnnlaplace.checkpoint import CheckpointError
from bnnlaplace.structure import KrylovError, KrylovStructure
from bnnlaplace.variational import Progress
from training import sealed, settings
from training.cli import interruption, program
from training.config import Config
from training.data.load import ImageData
from training.data.reading import Split
from training.errors import UserError
from training.workdir import POSTERIORS, continue_command, write_atomically

# From the name that tables show to the hessian_structure of Laplace, in the order of the tables.
STRUCTURES = {"diagonal": "diag", "Lanczos": "lanczos"}
VARIATIONAL = {"diagonal, variational": "diagonal", "Lanczos, variational": "Lanczos"}
"""The Laplace posterior with which the iteration of each variational one begins."""

_SECONDS_FILE, _SETTINGS_FILE = "seconds.json", "settings.json"
_STOPPED = "stopped while fitting the posteriors; the trained network is kept"
_PROBE_STREAM = 101
# The same part of the images in every run, whose posteriors then differ by their weights alone.
_CURVATURE_SEED = 2**63 + 7
# Nats: the noise of a decomposition in the bound is about one.
_TOLERANCE = 5.0


def make_network(module: nn.Module, params: Any, batch_stats: Any) -> Network:
    """Make the network of the trained module in inference mode: batch statistics are frozen, drop-path is off."""
    return Network.from_linen(module, {"params": params, "batch_stats": batch_stats}, train=False)


def fit(
    config: Config, data: ImageData, network: Network, prior_precision: float | dict[str, float], console: Console
) -> dict[str, Laplace]:
    """Fit all posteriors on all training images or on a part of them, unaugmented and in fixed order.

    Each has the prior precision of training: one number, or one for each layer. If training did not choose that by the
    evidence, the lower bound chooses the one of the variational posteriors.

    Raises
    ------
    Interrupted
        Ctrl-C or SIGTERM came, and nothing is kept. If a block of the decomposition takes longer than
        `interruption.SECONDS_TO_UNWIND`, the process ends.
    """
    posteriors, curvature, images = {}, config.curvature, curvature_images(config, data.train)
    chosen = Variational(
        prior_structure="scalar" if config.prior.update == "posthoc" else None,
        max_iterations=max(1, curvature.variational_iterations),
        tolerance=_TOLERANCE,
        on_iteration=lambda progress: _report_iteration(console, progress),
    )
    for name in names(config):
        console.print(f"  {name}", highlight=False)
        if name in STRUCTURES:
            state = Laplace(network, hessian_structure=STRUCTURES[name], prior_precision=prior_precision)
            how = {"on_block": lambda structure, error: _report_block(console, config, structure, error)}
        else:
            state = posteriors[VARIATIONAL[name]]
            how = {"on_block": lambda *_: interruption.stop_if_requested(_STOPPED), "approximation": chosen}
        with interruption.promptly(_STOPPED), _warnings_on(console):
            interruption.stop_if_requested(_STOPPED)
            posteriors[name] = state.fit(
                tuple(images),
                num_data=len(data.train.labels),
                key=probe_key(config),
                num_probes=curvature.num_probes,
                max_vectors=curvature.max_vectors,
                tolerance=curvature.tolerance,
                microbatch=curvature.microbatch,
                **how,
            )
        program.return_memory()  # that the next posterior needs
    return posteriors


def curvature_images(config: Config, train: Split) -> Split:
    """Return the training images that posteriors are fitted on: `curvature.examples` of them, or all."""
    return train.stratified(config.curvature.examples, _CURVATURE_SEED)


def names(config: Config) -> list[str]:
    """The posteriors of a run, in the order of the tables."""
    return [*STRUCTURES, *(VARIATIONAL if config.curvature.variational_iterations else ())]


@contextmanager
def _warnings_on(console: Console) -> Iterator[None]:
    """Print each warning of the library, for example of a decomposition that has not converged, as one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        warnings.filterwarnings("ignore", program.CACHE_WARNING)
        yield
    for warning in caught:
        console.print(f"warning: {warning.message}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def probe_key(config: Config) -> jax.Array:
    """Return the key of the probes of the decomposition."""
    return jax.random.fold_in(jax.random.key(config.seed), _PROBE_STREAM)


def save(workdir: Path, posteriors: dict[str, Laplace], config: Config, seconds: float) -> None:
    """Write each posterior under `workdir/laplace`, the settings of all, and how many seconds it took to fit them."""
    directory = workdir / POSTERIORS
    # Before the posteriors, so that there is none whose settings are not recorded.
    write_atomically(directory / _SETTINGS_FILE, json.dumps(settings.record(config), indent=2) + "\n")
    for name, la in posteriors.items():
        la.save(directory / _folder(name))
    write_atomically(directory / _SECONDS_FILE, json.dumps({"fit": seconds}) + "\n")


def seconds_to_fit(workdir: Path) -> float | None:
    """Read how many seconds it took to fit the posteriors. If that was not saved, or the file is damaged: None."""
    try:
        return float(sealed.read_json(workdir / POSTERIORS / _SECONDS_FILE)["fit"])
    except (UserError, OSError, ValueError, TypeError, KeyError):
        return None


def are_kept(workdir: Path) -> bool:
    """Say whether the posteriors of a run were saved, damaged or not."""
    return (workdir / POSTERIORS).exists()


def load(
    workdir: Path,
    network: Network,
    config: Config | None = None,
    report: Callable[[str], None] = lambda message: None,
) -> dict[str, Laplace]:
    """Read and verify the posteriors that `save` wrote.

    If a config is given, all posteriors that it asks for are read, and the settings that they were fitted with are
    compared with it. Without a config those that were saved are read. If there is no record of the settings, `report`
    is told so in one line.

    Raises
    ------
    UserError
        There are none, a file is damaged, or they were fitted with other settings. The message names the file.
    """
    directory = workdir / POSTERIORS
    expected = names(config) if config is not None else [*STRUCTURES, *_variational_in(directory)]
    try:
        posteriors = {name: Laplace.load(directory / _folder(name), network) for name in expected}
    except (CheckpointError, OSError) as error:
        raise UserError(
            f"the posteriors in {workdir} must be whole: {error}; to have them fitted again: "
            f"{continue_command(workdir)}"
        ) from None
    if config is None:
        return posteriors
    try:
        recorded = sealed.read_json(directory / _SETTINGS_FILE)
    except FileNotFoundError:  # as in earlier releases
        recorded = None
    except UserError as error:
        raise UserError(f"{directory / _SETTINGS_FILE} must be as it was written; {error}; restore it") from None
    settings.require_recorded(recorded, config, directory, curvature=True, report=report)
    return posteriors


def _variational_in(directory: Path) -> list[str]:
    return [name for name in VARIATIONAL if (directory / _folder(name)).exists()]


def _folder(name: str) -> str:
    return name.replace(", ", "-")


def _report_iteration(console: Console, progress: Progress) -> None:
    interruption.stop_if_requested(_STOPPED)
    program.return_memory()  # of the programs that were compiled meanwhile
    console.print(
        f"  iteration {progress.iteration:2d}: lower bound {progress.elbo:.1f} nats at precision "
        f"{progress.prior_precision:.3g}, {progress.newton_steps} Newton steps, {progress.products} products",
        style="dim",
        highlight=False,
    )


def _report_block(console: Console, config: Config, structure: KrylovStructure, error: KrylovError) -> None:
    interruption.stop_if_requested(_STOPPED)
    done = "; converged" if structure.has_converged(error) else ""
    console.print(
        f"  {len(structure.ritz.values):4d} vectors; error at precision {error.prior_precision:.3g}: samples "
        f"{error.sample:.2g}, log-determinant {error.log_determinant:.2g}{done}",
        style="dim",
        highlight=False,
    )
