"""The two Laplace posteriors of a run: the diagonal GGN and the Lanczos one, fitted on the training images."""

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from rich.console import Console

from bnnlaplace import Laplace, Network
from bnnlaplace.checkpoint.pytree import CheckpointError
from bnnlaplace.structure import KrylovError, KrylovStructure
from training.cli import interruption
from training.config import Config
from training.data.load import ImageData
from training.data.shuffle import stratified_indices
from training.errors import UserError
from training.workdir import POSTERIORS, write_atomically

# Display name -> hessian_structure of Laplace, in the order of tables.
STRUCTURES = {"diagonal": "diag", "Lanczos": "lanczos"}

# Online updates move the prior precision within these bounds: a layer whose weights have died, or weights hardly
# trained yet, can send the maximiser to zero or infinity.
ONLINE_RANGE = (1e-3, 1e3)
_SECONDS_FILE = "seconds.json"
_STOPPED = "stopped while fitting the posteriors; the trained network is kept; continue with --resume"
_PROBE_STREAM, _SUBSET_STREAM = 101, 102


def make_network(module: nn.Module, params: Any, batch_stats: Any) -> Network:
    """The trained module in inference mode: batch statistics frozen, drop-path off."""
    return Network.from_linen(module, {"params": params, "batch_stats": batch_stats}, train=False)


def fit(
    config: Config, data: ImageData, network: Network, prior_precision: float, console: Console
) -> dict[str, Laplace]:
    """Fit both structures on all training images, unaugmented and in fixed order.

    Each comes back at the prior precision of training; `Laplace.optimize_prior_precision` moves it.

    Raises
    ------
    Interrupted
        Ctrl-C or SIGTERM came; the running block was finished, nothing is kept.
    """
    posteriors = {}
    for name, structure in STRUCTURES.items():
        interruption.stop_if_requested(_STOPPED)
        la = Laplace(network, hessian_structure=structure, prior_precision=prior_precision)
        with _warnings_on(console):
            posteriors[name] = la.fit(
                (data.train.images, data.train.labels),
                key=probe_key(config),
                num_probes=config.curvature.num_probes,
                max_vectors=config.curvature.max_vectors,
                tolerance=config.curvature.tolerance,
                microbatch=config.curvature.microbatch,
                on_block=lambda structure, error: _report_block(console, config, structure, error),
            )
    return posteriors


@contextmanager
def _warnings_on(console: Console) -> Iterator[None]:
    """Print what the library warns of, such as a decomposition that has not converged, as one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for warning in caught:
        console.print(f"warning: {warning.message}", style="yellow", highlight=False, markup=False, soft_wrap=True)


def probe_key(config: Config) -> jax.Array:
    """Seeds the probes of the decomposition."""
    return jax.random.fold_in(jax.random.key(config.seed), _PROBE_STREAM)


def save(workdir: Path, posteriors: dict[str, Laplace], seconds: float) -> None:
    """Write each posterior under `workdir/laplace`, verified on reading, and how long it took to fit them."""
    for name, la in posteriors.items():
        la.save(workdir / POSTERIORS / name)
    write_atomically(workdir / POSTERIORS / _SECONDS_FILE, json.dumps({"fit": seconds}) + "\n")


def seconds_to_fit(workdir: Path) -> float | None:
    """What `save` was told; None where an earlier release saved them, or the file is damaged."""
    try:
        return float(json.loads((workdir / POSTERIORS / _SECONDS_FILE).read_text())["fit"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def load(workdir: Path, network: Network) -> dict[str, Laplace]:
    """Read what `save` wrote.

    Raises
    ------
    UserError
        There is none, or a file is damaged: the message names it.
    """
    try:
        return {name: Laplace.load(workdir / POSTERIORS / name, network) for name in STRUCTURES}
    except CheckpointError as error:
        raise UserError(
            f"the posteriors in {workdir} must be whole: {error}; training.fit_van with --resume fits them again"
        ) from None


def online_update(
    config: Config, data: ImageData, module: nn.Module, console: Console
) -> Callable[[Any, Any, float, int], float]:
    """The `update_prior` of `training.loop.train`: the maximiser of the Lanczos evidence on a subset of the images.

    The subset is stratified, the same in every call; log likelihood and curvature are scaled to all training images.
    """
    count = min(config.prior.examples, len(data.train.labels))
    chosen = np.sort(stratified_indices(data.train.labels, count, (config.seed + _SUBSET_STREAM) % 2**63))
    images, labels = data.train.images[chosen], data.train.labels[chosen]

    def update(params: Any, batch_stats: Any, precision: float, epoch: int) -> float:
        with _warnings_on(console):
            la = Laplace(make_network(module, params, batch_stats), prior_precision=precision).fit(
                (images, labels),
                key=jax.random.fold_in(probe_key(config), epoch),
                num_data=len(data.train.labels),
                num_probes=min(16, config.curvature.num_probes),
                max_vectors=max(config.curvature.num_probes, config.curvature.max_vectors // 2),
                tolerance=4 * config.curvature.tolerance,
                microbatch=config.curvature.microbatch,
            )
        best = la.evidence_optimum().prior_precision
        bounded = float(np.clip(best, *ONLINE_RANGE))
        if bounded != best:
            console.print(
                f"epoch {epoch}: the evidence prefers precision {best:.3g}; bounded to {bounded:g}", highlight=False
            )
        return bounded

    return update


def _report_block(console: Console, config: Config, structure: KrylovStructure, error: KrylovError) -> None:
    interruption.stop_if_requested(_STOPPED)
    done = "; converged" if structure.has_converged(error) else ""
    console.print(
        f"  {len(structure.ritz.values):4d} vectors; error at precision {error.prior_precision:.3g}: samples "
        f"{error.sample:.2g}, log-determinant {error.log_determinant:.2g}{done}",
        style="dim",
        highlight=False,
    )
