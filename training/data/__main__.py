"""Download a TFDS set and write it in a form that the programs can read.

python -m training.data prepare NAME --dir DIR
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from training.data import catalog
from training.errors import NoDataSetError, UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status: 0, or 2 for a fault of the user's, or 130 for Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m training.data", description="Prepare data sets for training.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    prepare = commands.add_parser("prepare", help="download a TFDS set and write it in array_record format")
    prepare.add_argument("name", metavar="NAME", help="a set as TFDS names it, NAME or NAME/CONFIG")
    prepare.add_argument("--dir", type=Path, help="data directory; default: $TFDS_DATA_DIR, else ~/tensorflow_datasets")
    options = parser.parse_args(arguments)
    directory = catalog.data_directory(options.dir)
    try:
        catalog.prepare(options.name, directory)
        builder = catalog.open_set(options.name, directory)
    except NoDataSetError as error:
        print(f"error: {error} by --dir", file=sys.stderr)
        return 2
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"interrupted: {options.name} is not prepared", file=sys.stderr)
        return 130
    sizes = ", ".join(f"{split} {info.num_examples:,}" for split, info in builder.info.splits.items())
    print(f"{options.name} is prepared in {builder.data_dir}: {sizes} examples")
    return 0


if __name__ == "__main__":
    status = main()
    if status == 130:
        # An orderly exit would first wait for the download threads of TFDS, which nothing can stop.
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)
