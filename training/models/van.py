"""Visual Attention Networks: Guo, Lu, Liu, Cheng, Hu, "Visual Attention Network", 2022, arXiv 2202.09741.

The official architecture, sizes B0 to B6, and two small ones for 32 x 32 and 8 x 8 images. Four stages (fewer in the
small ones), each an overlapping patch embedding, blocks of large kernel attention and convolutional MLP, and a layer
normalisation; then the mean over pixels and a linear head.

Images come in as (N, H, W, C). Inside, everything is (C, H, W, N), channels first and images last: pointwise layers
are then plain matrix products, batched over weights or cotangents without transposition, per-channel factors vary
slowest, and depthwise convolutions are fastest (see `training.models.depthwise`).
"""

import math
from dataclasses import dataclass, fields
from typing import get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import Array, lax

from training import config
from training.errors import UserError
from training.models.depthwise import Method, depthwise_conv


@dataclass(frozen=True)
class VANVariant:
    """A size of network, and the images it is meant for."""

    embed_dims: tuple[int, ...]
    """Channels of each stage."""
    depths: tuple[int, ...]
    """Blocks in each stage."""
    mlp_ratios: tuple[int, ...]
    """Hidden channels of the MLP over channels of the stage, for each stage."""
    stem_kernel: int = 7
    """Kernel size of the first patch embedding; odd."""
    stem_stride: int = 4
    """Stride of the first patch embedding; the later ones have kernel 3 and stride 2."""
    image_shape: tuple[int, int, int] = (224, 224, 3)
    """The height, width and channels it was designed for; others work from the product of the strides upwards."""


_SMALL = (32, 64, 160, 256)
_MEDIUM = (64, 128, 320, 512)
_LARGE = (96, 192, 480, 768)
_RATIOS = (8, 8, 4, 4)

VARIANTS: dict[str, VANVariant] = {
    "b0": VANVariant(_SMALL, (3, 3, 5, 2), _RATIOS),
    "b1": VANVariant(_MEDIUM, (2, 2, 4, 2), _RATIOS),
    "b2": VANVariant(_MEDIUM, (3, 3, 12, 3), _RATIOS),
    "b3": VANVariant(_MEDIUM, (3, 5, 27, 3), _RATIOS),
    "b4": VANVariant(_MEDIUM, (3, 6, 40, 3), _RATIOS),
    "b5": VANVariant(_LARGE, (3, 3, 24, 3), _RATIOS),
    "b6": VANVariant((96, 192, 384, 768), (6, 6, 90, 6), _RATIOS),
    "cifar": VANVariant((32, 64, 128), (1, 1, 1), (4, 4, 3), 3, 2, (32, 32, 3)),
    "digits": VANVariant((16, 32), (1, 1), (4, 2), 3, 2, (8, 8, 1)),
}


def _per_channel(v: Array) -> Array:
    """(C,) against (C, H, W, N)."""
    return v[:, None, None, None]


class Pointwise(nn.Module):
    """A linear map of the channels, W' x + b: (C, ...) to (features, ...)."""

    features: int
    kernel_std: float | None = None

    @nn.compact
    def __call__(self, x: Array) -> Array:
        std = math.sqrt(2 / self.features) if self.kernel_std is None else self.kernel_std
        kernel = self.param("kernel", nn.initializers.normal(std), (x.shape[0], self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # The kernel first: products with many kernels at once are then one matrix product, kernels times features long.
        y = lax.dot_general(kernel, x, (((0,), (0,)), ((), ())))
        return y + bias.reshape(-1, *(1,) * (x.ndim - 1))


class Depthwise(nn.Module):
    size: int
    dilation: int = 1
    method: Method = "auto"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[0])
        kernel = self.param("kernel", nn.initializers.normal(math.sqrt(2) / self.size), shape)
        bias = self.param("bias", nn.initializers.zeros, x.shape[:1])
        return depthwise_conv(x, kernel, dilation=self.dilation, method=self.method) + _per_channel(bias)


def _batch_norm(name: str, train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, axis=0, momentum=0.9, epsilon=1e-5, name=name)


class PatchEmbedding(nn.Module):
    features: int
    size: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape = (self.size, self.size, x.shape[0], self.features)
        std = math.sqrt(2 / self.features) / self.size
        kernel = self.param("kernel", nn.initializers.normal(std), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        y = lax.dot_general(kernel.reshape(-1, self.features), self._patches(x), (((0,), (0,)), ((), ())))
        return _batch_norm("norm", train)(y + _per_channel(bias))

    def _patches(self, x):
        r, s = self.size // 2, self.stride
        height, width = (-(-extent // s) for extent in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), (r, r), (r, r), (0, 0)))
        return jnp.concatenate([
            x[:, i : i + (height - 1) * s + 1 : s, j : j + (width - 1) * s + 1 : s]
            for i in range(self.size) for j in range(self.size)
        ])


class Attention(nn.Module):
    method: Method = "auto"

    @nn.compact
    def __call__(self, x):
        c = x.shape[0]
        u = nn.gelu(Pointwise(c, name="proj_1")(x), approximate=False)
        a = Depthwise(5, 1, self.method, name="conv0")(u)
        a = Depthwise(7, 3, self.method, name="conv_spatial")(a)
        a = Pointwise(c, name="conv1")(a)
        return x + Pointwise(c, name="proj_2")(u * a)


class MLP(nn.Module):
    hidden: int
    method: Method = "auto"

    @nn.compact
    def __call__(self, x):
        y = Pointwise(self.hidden, name="fc1")(x)
        y = Depthwise(3, 1, self.method, name="dwconv")(y)
        return Pointwise(x.shape[0], name="fc2")(nn.gelu(y, approximate=False))


class Block(nn.Module):
    mlp_ratio: int
    drop_path: float
    method: Method

    @nn.compact
    def __call__(self, x, train):
        y = Attention(self.method, name="attn")(_batch_norm("norm1", train)(x))
        x = x + self._branch("layer_scale_1", y, train)
        y = MLP(self.mlp_ratio * x.shape[0], self.method, name="mlp")(_batch_norm("norm2", train)(x))
        return x + self._branch("layer_scale_2", y, train)

    def _branch(self, name, y, train):
        y = _per_channel(self.param(name, nn.initializers.constant(1e-2), y.shape[:1])) * y
        if not train or self.drop_path == 0.0:
            return y
        keep = jax.random.bernoulli(self.make_rng("drop_path"), 1 - self.drop_path, y.shape[-1:])
        return y * keep / (1 - self.drop_path)


class VAN(nn.Module):
    num_classes: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    stem_kernel: int = 7
    stem_stride: int = 4
    drop_path: float = 0.0
    depthwise: Method = "auto"

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = jnp.transpose(x, (3, 1, 2, 0))
        total = sum(self.depths)
        rates = iter([self.drop_path * i / max(total - 1, 1) for i in range(total)])
        for i, (d, n, r) in enumerate(zip(self.embed_dims, self.depths, self.mlp_ratios, strict=True), start=1):
            k, s = (self.stem_kernel, self.stem_stride) if i == 1 else (3, 2)
            x = PatchEmbedding(d, k, s, name=f"patch_embed{i}")(x, train)
            for j in range(n):
                x = Block(r, next(rates), self.depthwise, name=f"block{i}_{j}")(x, train)
            x = nn.LayerNorm(epsilon=1e-6, reduction_axes=0, feature_axes=0, name=f"norm{i}")(x)
        return Pointwise(self.num_classes, kernel_std=0.02, name="head")(jnp.mean(x, (1, 2))).T
