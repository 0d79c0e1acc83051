"""AdamW's decay is decoupled from the loss, a stopped training goes on, and folds share no image."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.cli import interruption
from training.config import Config, Optimizer
from training.data.load import ImageData
from training.data.reading import Split
from training.errors import Interrupted, UserError
from training.study.config import Training
from training.study.decoupled import train_decoupled
from training.study.networks import held_out_part

RATE, DECAY = 1e-2, 0.7


class Linear(nn.Module):
    """Pixels to logits."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(3)(jnp.asarray(x, jnp.float32).reshape(len(x), -1) / 255)


def images(count: int = 20) -> ImageData:
    rng = np.random.default_rng(0)
    split = Split(rng.integers(256, size=(count, 2, 2, 1), dtype=np.uint8), np.arange(count, dtype=np.int32) % 3)
    return ImageData("random", ("a", "b", "c"), split, split, split)


def config(epochs: int, batch_size: int) -> Config:
    optimizer = Optimizer(
        learning_rate=RATE, batch_size=batch_size, epochs=epochs, warmup_epochs=0, polish_epochs=0, clip_norm=1e6
    )
    return Config(optimizer=optimizer)


def test_one_step_is_that_of_adam_and_a_decay_of_kernels_alone(tmp_path):
    data, module = images(), Linear()
    key = jax.random.split(jax.random.key(0))[0]
    before = module.init({"params": key}, data.train.images[:1])["params"]["Dense_0"]
    params, _, _ = train_decoupled(config(1, 20), data, module, weight_decay=DECAY, workdir=tmp_path)
    # The first step of Adam is the learning rate, to the side of the gradient.
    after = params["Dense_0"]
    decayed = np.asarray(before["kernel"], np.float64) * (1 - RATE * DECAY)
    np.testing.assert_allclose(np.abs(after["kernel"] - decayed), RATE, rtol=1e-4)
    np.testing.assert_allclose(np.abs(after["bias"] - before["bias"]), RATE, rtol=1e-4)


def test_a_training_that_is_stopped_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    data, module, settings = images(), Linear(), config(20, 5)
    whole, _, _ = train_decoupled(settings, data, module, weight_decay=DECAY, workdir=tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(interruption, "requested", lambda: True)
        with pytest.raises(Interrupted, match="after step 16 of 80"):
            train_decoupled(settings, data, module, weight_decay=DECAY, workdir=tmp_path / "stopped")
    with pytest.raises(UserError, match="must be of a weight decay of 0.1; it has 0.7"):
        train_decoupled(settings, data, module, weight_decay=0.1, workdir=tmp_path / "stopped")
    resumed, _, _ = train_decoupled(settings, data, module, weight_decay=DECAY, workdir=tmp_path / "stopped")
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_folds_hold_out_every_image_once():
    data, training = images(30), Training("adamw", folds=5, held_out=0.2)
    held_out = []
    for fold in range(5):
        rest, part = held_out_part(data, training, fold)
        assert np.bincount(part.labels).tolist() == [2, 2, 2] and len(rest.train.labels) == 24
        held_out += [image.tobytes() for image in part.images]
        assert not {image.tobytes() for image in rest.train.images} & {image.tobytes() for image in part.images}
    assert sorted(held_out) == sorted(image.tobytes() for image in data.train.images)
