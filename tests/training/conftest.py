"""Fixtures of the training application's tests."""

import io
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from training.cli import interruption, program

Examples = Sequence[tuple[np.ndarray, int]]


def png(image: np.ndarray) -> bytes:
    """Encode an image of shape (H, W, 1) or (H, W, 3)."""
    encoded = io.BytesIO()
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(encoded, format="PNG")
    return encoded.getvalue()


@pytest.fixture(scope="module")
def private_directories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The tests of a module share their data, and change no setting of JAX."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(tmp_path_factory.mktemp("tfds")))
        patch.setattr(program, "use_compilation_cache", lambda: None)
        yield


@pytest.fixture(autouse=True)
def slow_machines_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal that a test sends to its own process must not end the tests where they run slowly."""
    monkeypatch.setattr(interruption, "SECONDS_TO_UNWIND", 600.0)


@pytest.fixture
def write_set(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., Path]:
    """Return a function that prepares a set of given examples in tmp_path, under a name that TFDS does not know."""
    import tensorflow_datasets as tfds

    def write(name: str, splits: dict[str, Examples], features: dict[str, Any] | None = None) -> Path:
        channels = next(iter(splits.values()))[0][0].shape[-1]
        kinds = features or {
            "image": tfds.features.Image(shape=(None, None, channels)),
            "label": tfds.features.ClassLabel(names=["cat", "dog", "owl"]),
        }
        image_key, label_key = list(kinds)[:2]

        class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> tfds.core.DatasetInfo:
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(kinds), disable_shuffling=True
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {split: self._generate_examples(examples) for split, examples in splits.items()}

            def _generate_examples(self, examples: Examples) -> Iterator[tuple[int, dict[str, Any]]]:
                for index, (image, label) in enumerate(examples):
                    rest = dict.fromkeys(list(kinds)[2:], 0)
                    yield index, {image_key: png(image), label_key: label, **rest}

        Tiny.name = name
        Tiny(data_dir=tmp_path, file_format="array_record").download_and_prepare()
        capfd.readouterr()
        return tmp_path

    return write


@pytest.fixture
def examples() -> Callable[..., Examples]:
    """Return a function that draws random images, labelled 0, 1, 2, 0, ..."""

    def draw(count: int, shape: tuple[int, int, int] = (4, 4, 3), seed: int = 0) -> Examples:
        images = np.random.default_rng(seed).integers(256, size=(count, *shape), dtype=np.uint8)
        return [(image, index % 3) for index, image in enumerate(images)]

    return draw
