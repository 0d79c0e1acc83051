"""Imported weights as a checkpoint: the variables of the Flax network, and where they come from."""

from pathlib import Path
from typing import Any, NamedTuple

from bnnlaplace.checkpoint import load_pytree, save_pytree
from training.errors import UserError
from training.pretrained.convert import num_classes_of

KIND = "imported weights of a Visual Attention Network"


class Pretrained(NamedTuple):
    """Weights and batch statistics of a Visual Attention Network."""

    size: str
    """The key of `training.models.van.VARIANTS`."""
    params: dict[str, Any]
    batch_stats: dict[str, Any]
    source: dict[str, str]
    """Name and SHA-256 of the file that they were read from."""

    @property
    def num_classes(self) -> int:
        """The number of outputs of its head."""
        return num_classes_of({"params": self.params})


def write(directory: Path, pretrained: Pretrained) -> None:
    """Write a checkpoint that `bnnlaplace.checkpoint.load_pytree` reads. Raises as `save_pytree` does."""
    tree = {"params": pretrained.params, "batch_stats": pretrained.batch_stats}
    about = {"kind": KIND, "size": pretrained.size, "num_classes": pretrained.num_classes, "source": pretrained.source}
    save_pytree(directory, tree, about)


def read(directory: Path) -> Pretrained:
    """Read what `write` wrote. Raises a UserError if the checkpoint is of something else."""
    tree, about = load_pytree(directory)
    if about.get("kind") != KIND:
        raise UserError(
            f"`--init-from` must be a directory that training.import_weights wrote; {directory} holds another "
            "checkpoint; import the weights first"
        )
    return Pretrained(about["size"], tree["params"], tree["batch_stats"], about["source"])
