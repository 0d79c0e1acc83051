"""Which images a run was trained on: their digests lie in `WORKDIR/data.json`, so that other images are an error.

A set is opened by its name, and a directory may hold a part of the set, the whole, or another release. There the
settings of the run choose other training and validation images: posteriors would be fitted on images that the network
has not seen, and the temperature chosen on images that it has.
"""

import hashlib
from pathlib import Path

import numpy as np

from training import sealed
from training.data import catalog
from training.data.load import ImageData
from training.data.reading import Split
from training.errors import UserError
from training.train.checkpoints import list_steps
from training.workdir import DATA_FILE, write_atomically

_SPLITS = {"train": "training", "validation": "validation"}


def digests(data: ImageData) -> dict[str, str]:
    """Return the SHA-256 of the training and of the validation images with their labels, in their order."""
    return {name: _digest(getattr(data, name)) for name in _SPLITS}


def _digest(split: Split) -> str:
    digest = hashlib.sha256()
    for array in split:
        digest.update(f"{array.dtype.str} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array))
    return digest.hexdigest()


def claim(workdir: Path, data: ImageData, data_dir: Path | None) -> None:
    """Record the images of a run that begins. If the training has begun already, compare them, as `require_same` does.

    A training of an earlier release has no record, and gets none: nobody knows what it was trained on.
    """
    if list_steps(workdir / "train"):
        require_same(workdir, data, data_dir)
    else:
        write_atomically(workdir / DATA_FILE, sealed.dump(digests(data), indent=2))


def require_same(workdir: Path, data: ImageData, data_dir: Path | None) -> None:
    """Compare the training and validation images with those that a run was trained on, if it has a record of them.

    Parameters
    ----------
    workdir
        The work directory of the run.
    data
        The images, as the settings of the run choose them.
    data_dir
        The TFDS data directory that they were read from, for the message; None for the default.

    Raises
    ------
    UserError
        They are other images, or the record is damaged.
    """
    path = workdir / DATA_FILE
    try:
        recorded, _ = sealed.load(path)
    except FileNotFoundError:  # as in earlier releases
        return
    except UserError as error:
        raise UserError(f"{path} must be as it was written; {error}; restore it") from None
    found = digests(data)
    if others := [word for name, word in _SPLITS.items() if recorded.get(name) != found[name]]:
        raise UserError(
            f"the data directory must hold the images that the run in {workdir} was trained with; "
            f"{catalog.data_directory(data_dir)} holds other {' and '.join(others)} images of {data.name!r} (perhaps "
            "the whole set where the run had a part); use the data directory of that run, or train on these images in "
            f"another --workdir; or remove {path} to go on all the same: then posteriors are fitted on images that "
            "the network may not have seen, and the temperature is chosen on images that it may have seen"
        )
