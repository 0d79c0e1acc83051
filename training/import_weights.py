"""Turn official weights of a Visual Attention Network into a checkpoint of the Flax network, batch statistics included.

python -m training.import_weights pytorch_model.bin --size b0 --out checkpoints/van_b0_imagenet
"""

import sys

if __name__ == "__main__":  # The imports below take seconds.
    from training.cli.interruption import end_while_loading

    end_while_loading()

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from bnnlaplace.core.tree import size as count_numbers
from training.cli import program
from training.cli.arguments import parse_record
from training.pretrained import files, store
from training.pretrained.convert import num_classes_of, to_flax


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Turn official weights of a Visual Attention Network into a checkpoint of the Flax network.

    The file may have the names of the official code or those of Hugging Face. All weights of the size must be in it,
    and no others; otherwise nothing is written. `--init-from DIR` of training.fit_van starts from the checkpoint, and
    `bnnlaplace.checkpoint.load_pytree` reads it.
    """

    file: Annotated[Path, tyro.conf.Positional]
    """The weights: .safetensors, or a pickle of PyTorch (.pth, .pth.tar, .pt, .bin), of which nothing is executed. A
    pickle needs PyTorch."""
    size: str
    """The size of the network: b0 to b6."""
    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    """The directory to write. A checkpoint there is replaced; anything else is refused."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return program.run(lambda console: import_weights(sys.argv[1:] if argv is None else argv, console))


def import_weights(argv: Sequence[str], console: Console) -> None:
    """Read, convert and write."""
    arguments = parse_record(Arguments, argv, "python -m training.import_weights")
    variables = to_flax(files.read_weights(arguments.file), arguments.size, str(arguments.file))
    source = {"file": arguments.file.name, "sha256": files.digest(arguments.file)}
    pretrained = store.Pretrained(arguments.size, variables["params"], variables["batch_stats"], source)
    store.write(arguments.out, pretrained)
    console.print(
        f"wrote {count_numbers(pretrained.params):,} weights of size {arguments.size} for "
        f"{num_classes_of(variables):,} classes to {arguments.out}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
