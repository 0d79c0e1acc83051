"""Imported weights give the logits of PyTorch's Visual Attention Network, and pickles that run code are refused."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from training.errors import UserError
from training.models.van import VAN, VARIANTS
from training.pretrained import convert, files

torch = pytest.importorskip("torch")
van = pytest.importorskip("transformers.models.deprecated.van")


def perturbed(size):
    """The network of Hugging Face with random numbers everywhere: at initialisation biases and many scales are zero."""
    variant = VARIANTS[size]
    config = van.VanConfig(
        hidden_sizes=list(variant.embed_dims), depths=list(variant.depths), mlp_ratios=list(variant.mlp_ratios)
    )
    config.num_labels = 1000
    torch.manual_seed(0)
    model = van.VanForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if buffer.is_floating_point():
                noise = 0.1 * torch.randn_like(buffer)
                buffer.copy_((buffer + noise).abs() + 0.1 if name.endswith("var") else buffer + noise)
    return model


@pytest.mark.parametrize("size", ["b0", "b1"])
def test_logits_are_those_of_transformers(size, tmp_path):
    model = perturbed(size)
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "model.pth.tar")
    variables = convert.to_flax(files.read_weights(tmp_path / "model.pth.tar"), size)
    images = np.random.default_rng(1).normal(size=(2, 224, 224, 3)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(images.transpose(0, 3, 1, 2))).logits.numpy()
    module = VAN.from_variant(VARIANTS[size], 1000)
    with jax.default_matmul_precision("highest"):
        found = jax.jit(module.apply)(variables, jnp.asarray(images))
    difference = np.abs(np.asarray(found) - expected).max() / np.abs(expected).max()
    print(f"{size}: largest difference {difference:.1e} of the largest logit {np.abs(expected).max():.2f}")
    assert difference < 1e-5


class _Runs:
    def __reduce__(self):
        return os.mkdir, ("pwned",)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"head.bias": torch.zeros(2)}, "more": _Runs()}, tmp_path / "model.pth")
    with pytest.raises(UserError, match=r"as a pickle it would call \w+.mkdir; nothing of it was run"):
        files.read_weights(tmp_path / "model.pth")
    assert not (tmp_path / "pwned").exists()


def test_pickles_of_something_else(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(UserError, match="must hold weights by name, or under one of state_dict, .*; got list"):
        files.read_weights(tmp_path / "list.pt")
    (tmp_path / "cut.bin").write_bytes(b"\x80\x02}q")
    with pytest.raises(UserError, match="must be a file of PyTorch; got .*; download it again"):
        files.read_weights(tmp_path / "cut.bin")
