"""The first weights of a run that starts from imported ones."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax

from training.config import Config
from training.errors import UserError
from training.pretrained import store


class Start(NamedTuple):
    """Weights and batch statistics to start from."""

    params: Any
    batch_stats: Any
    described: str
    """Where they are from, for the log."""


def start_from(directory: Path, config: Config, params: Any, batch_stats: Any) -> Start:
    """Return imported weights in place of random ones.

    A head for another number of classes stays random.

    Parameters
    ----------
    directory
        What `training.import_weights` wrote.
    config
        The settings of the run, for messages and the size of its network.
    params, batch_stats
        The random weights and the initial batch statistics; abstract ones will do.

    Raises
    ------
    UserError
        The directory holds something else, or weights of another size or for other images.
    CheckpointError
        There is no checkpoint, or a file of it is damaged.
    """
    pretrained = store.read(directory)
    if pretrained.size != config.model.variant:
        raise UserError(
            f"`--init-from` must hold weights of `model.variant`, {config.model.variant}; {directory} holds those of "
            f"{pretrained.size}; choose --model.variant {pretrained.size}"
        )
    num_classes = len(params["head"]["bias"])
    has_head = pretrained.num_classes == num_classes
    if not has_head and not config.optimizer.epochs + config.optimizer.polish_epochs:
        raise UserError(
            f"`--init-from` must hold a head for {num_classes} classes where nothing is trained; {directory} has one "
            f"for {pretrained.num_classes}; train it, by --optimizer.epochs or --optimizer.polish-epochs"
        )
    theirs = {**pretrained.params, **({} if has_head else {"head": params["head"]})}
    _require_alike(directory, {"params": theirs, "batch_stats": pretrained.batch_stats}, params, batch_stats)
    head = f"its head for {num_classes} classes is kept" if has_head else f"with a new head for {num_classes} classes"
    described = f"starting from {pretrained.source['file']}, size {pretrained.size}, as in {directory}; {head}"
    return Start(theirs, pretrained.batch_stats, described)


def _require_alike(directory: Path, theirs: Mapping[str, Any], params: Any, batch_stats: Any) -> None:
    """Raise a UserError if arrays have other shapes than those of the network of the run, as for other images."""
    ours, (found, structure) = {"params": params, "batch_stats": batch_stats}, jax.tree.flatten(theirs)
    if structure != jax.tree.structure(ours):
        raise UserError(f"{directory} must hold the weights of the network of this run; it holds others; import anew")
    pairs = zip(jax.tree_util.tree_leaves_with_path(ours), found, strict=True)
    for (path, leaf), array in pairs:
        if leaf.shape != array.shape:
            name = "/".join(part.key for part in path[1:])
            raise UserError(
                f"`--init-from` must hold weights for the images of `data.name`; {name} has shape {array.shape} in "
                f"{directory}, and {leaf.shape} for these images; use images and --model.stem-kernel of the weights"
            )
