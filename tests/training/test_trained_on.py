"""A run is continued and evaluated on the images that it was trained with, or an error says that they are others."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from training import evaluate, fit_van, sealed, trained_on
from training.config import Config, Data
from training.data.load import load
from training.data.reading import Split
from training.errors import UserError
from training.train import loop
from training.workdir import DATA_FILE, open_workdir

pytestmark = pytest.mark.usefixtures("private_directories")
SHIPPED = Path(__file__).resolve().parents[2] / "checkpoints" / "digits"


@pytest.fixture(scope="module")
def data():
    return load(Data(name="digits"))


@pytest.fixture
def workdir(tmp_path):
    """A copy of the shipped run, whose training is finished."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation-*", ".lock")))


def in_another_order(split):
    return split.take(np.arange(len(split.labels))[::-1])


OTHERS = {
    "training": lambda data: data._replace(train=in_another_order(data.train)),
    "validation": lambda data: data._replace(validation=in_another_order(data.validation)),
    "training and validation": lambda data: data._replace(train=data.validation, validation=data.train),
}


def test_a_digest_is_that_of_every_image_and_label_in_its_order(data):
    images, labels = data.train
    pixel, label = images.copy(), labels.copy()
    pixel[-1, -1, -1, -1] ^= 1
    label[-1] = (label[-1] + 1) % 10
    splits = [
        *(data.train, Split(pixel, labels), Split(images, label), in_another_order(data.train)),
        *(Split(images.reshape(len(images), 4, 16, 1), labels), Split(images, labels.astype(np.int64))),
    ]
    assert len({trained_on.digests(data._replace(train=split))["train"] for split in splits}) == len(splits)
    assert trained_on.digests(data) == trained_on.digests(data._replace(train=Split(images.copy(), labels.copy())))


@pytest.mark.parametrize("others", OTHERS)
@pytest.mark.parametrize("module", [evaluate, fit_van])
def test_other_images_are_one_line_before_anything_is_computed(data, workdir, module, others, monkeypatch, capsys):
    """Posteriors were fitted on images that the network had not seen, and nothing said so."""
    monkeypatch.setattr(module, "load", lambda config: OTHERS[others](data))
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    argv = [str(workdir)] if module is evaluate else ["--workdir", str(workdir), "--resume"]
    assert module.main(argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"must hold the images that the run in {workdir} was trained with; " in error
    assert f" holds other {others} images of 'digits'" in error and "use the data directory of that run" in error
    assert {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file() and path.name != ".lock"} == before


def test_a_run_without_a_record_goes_on_in_silence(data, workdir):
    (workdir / DATA_FILE).unlink()
    trained_on.claim(workdir, OTHERS["training"](data), None)
    assert not (workdir / DATA_FILE).exists()  # what it was trained on stays unknown


def test_a_record_that_was_changed_is_named(data, workdir):
    recorded = json.loads((workdir / DATA_FILE).read_text())
    (workdir / DATA_FILE).write_text(json.dumps(recorded | {"train": recorded["validation"]}))
    with pytest.raises(UserError, match=r"data.json must be as it was written; its entry sha256 .*; restore it"):
        trained_on.require_same(workdir, data, None)


def test_a_run_records_its_images_before_it_trains(data, tmp_path, monkeypatch, capsys):
    def stop(*_, **__):
        raise UserError("enough")

    monkeypatch.setattr(loop, "train", stop)
    assert fit_van.main(["--workdir", str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == "error: enough\n"
    assert sealed.load(tmp_path / "run" / DATA_FILE) == (trained_on.digests(data), True)
    other = Config(seed=3)  # Nothing is trained yet: another run may have the directory, with its own images.
    assert open_workdir(tmp_path / "run", other, resume=False) == other
    trained_on.claim(tmp_path / "run", OTHERS["training"](data), None)
    trained_on.require_same(tmp_path / "run", OTHERS["training"](data), None)
