"""Visual Attention Networks: Guo, Lu, Liu, Cheng, Hu, "Visual Attention Network", 2022, arXiv 2202.09741.

The sizes B0 to B6 are the official ones, and two small sizes are for 32 x 32 and 8 x 8 images. A network has four
stages, the small ones fewer. A stage is an overlapping patch embedding, blocks of large kernel attention and
convolutional MLP, and a layer normalisation. Then come the mean over pixels and a linear head.

Images come in as they are stored, (N, H, W, C), and the first layer normalises them. Inside, arrays are (C, H, W, N),
channels first and images last. Pointwise layers are then plain matrix products, factors of channels vary slowest, and
depthwise convolutions run fastest on CPU (see `training.models.depthwise`). So Gauss-Newton products take less time
than with channels last.
"""

import math
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from training.config import Config
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
    """Hidden channels of the MLP divided by channels of the stage, for each stage."""
    stem_kernel: int = 7
    """Kernel size of the first patch embedding. It is odd."""
    stem_stride: int = 4
    """Stride of the first patch embedding. The later ones have kernel 3 and stride 2."""
    image_shape: tuple[int, int, int] = (224, 224, 3)
    """Height, width and channels of the images it is meant for. Other images work too if their height and width are at
    least the product of the strides."""


_SMALL = (32, 64, 160, 256)
_MEDIUM = (64, 128, 320, 512)
_LARGE = (96, 192, 480, 768)
_RATIOS = (8, 8, 4, 4)

# B0 to B6 are the official sizes.
VARIANTS: dict[str, VANVariant] = {
    "b0": VANVariant(_SMALL, (3, 3, 5, 2), _RATIOS),
    "b1": VANVariant(_MEDIUM, (2, 2, 4, 2), _RATIOS),
    "b2": VANVariant(_MEDIUM, (3, 3, 12, 3), _RATIOS),
    "b3": VANVariant(_MEDIUM, (3, 5, 27, 3), _RATIOS),
    "b4": VANVariant(_MEDIUM, (3, 6, 40, 3), _RATIOS),
    "b5": VANVariant(_LARGE, (3, 3, 24, 3), _RATIOS),
    "b6": VANVariant((96, 192, 384, 768), (6, 6, 90, 6), _RATIOS),
    "cifar": VANVariant((32, 64, 96), (1, 2, 1), (4, 4, 2), 3, 2, (32, 32, 3)),
    "digits": VANVariant((16, 32), (1, 1), (2, 2), 3, 1, (8, 8, 1)),
}


class Normalise(nn.Module):
    """Map pixels from 0 to 255 to (pixel / 255 - mean) / std. The statistics are constants, not weights."""

    mean: tuple[float, ...]
    """Mean of each channel, for pixels scaled to [0, 1]. Channels are the last axis of the images."""
    std: tuple[float, ...]
    """Standard deviation of each channel, for pixels scaled to [0, 1]."""

    def __call__(self, x: Array) -> Array:
        std = np.asarray(self.std, np.float64)
        scale, offset = 1.0 / (255.0 * std), np.asarray(self.mean, np.float64) / std
        return jnp.asarray(x) * scale.astype(np.float32) - offset.astype(np.float32)


class Pointwise(nn.Module):
    """A linear map of the channels: (C, ...) to (features, ...)."""

    features: int
    kernel_std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = _kernel_and_bias(self, x.shape[0])
        return _linear(kernel, x) + bias.reshape(-1, *(1,) * (x.ndim - 1))


class Classifier(nn.Module):
    """A linear map of the channels to logits: (C, N) to (N, features), without a transpose of either.

    So its outputs are those of the network, and curvature and variances take no backward pass through it.
    """

    features: int
    kernel_std: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel, bias = _kernel_and_bias(self, x.shape[0])
        return lax.dot_general(x, kernel, (((0,), (0,)), ((), ()))) + bias


class Depthwise(nn.Module):
    """A depthwise convolution with bias: (C, H, W, N) to the same."""

    size: int
    dilation: int
    method: Method

    @nn.compact
    def __call__(self, x: Array) -> Array:
        shape = (self.size, self.size, x.shape[0])
        kernel = self.param("kernel", nn.initializers.normal(math.sqrt(2) / self.size), shape)
        bias = self.param("bias", nn.initializers.zeros, x.shape[:1])
        return depthwise_conv(x, kernel, dilation=self.dilation, method=self.method) + _per_channel(bias)


class PatchEmbedding(nn.Module):
    """A strided convolution of overlapping patches, and batch normalisation."""

    features: int
    size: int
    stride: int

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        shape = (self.size, self.size, x.shape[0], self.features)
        kernel = self.param("kernel", nn.initializers.normal(math.sqrt(2 / self.features) / self.size), shape)
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        # Patches times kernel is one matrix product. The convolution of the library is slow for many kernels at once
        # and for one kernel gradient per image, and the patches overlap little enough to be written out.
        y = _linear(kernel.reshape(-1, self.features), self._patches(x))
        return _batch_norm("norm", train)(y + _per_channel(bias))

    def _patches(self, x: Array) -> Array:
        """Map (C, H, W, N) to (size * size * C, H / stride, W / stride, N): patches around every stride-th pixel."""
        radius, stride = self.size // 2, self.stride
        height, width = (-(-extent // stride) for extent in x.shape[1:3])
        x = jnp.pad(x, ((0, 0), (radius, radius), (radius, radius), (0, 0)))
        shifts = [
            x[:, i : i + (height - 1) * stride + 1 : stride, j : j + (width - 1) * stride + 1 : stride]
            for i in range(self.size)
            for j in range(self.size)
        ]
        return jnp.concatenate(shifts)


class Attention(nn.Module):
    """Large kernel attention between two pointwise layers. With 25 + 49 taps the gate sees 23 x 23 pixels."""

    method: Method

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[0]
        std = math.sqrt(2 / channels)
        value = nn.gelu(Pointwise(channels, std, name="proj_1")(x), approximate=False)
        gate = Depthwise(5, 1, self.method, name="conv0")(value)
        gate = Depthwise(7, 3, self.method, name="conv_spatial")(gate)
        gate = Pointwise(channels, std, name="conv1")(gate)
        return x + Pointwise(channels, std, name="proj_2")(value * gate)


class MLP(nn.Module):
    """Two pointwise layers with a 3 x 3 depthwise convolution and a GELU between them."""

    hidden: int
    method: Method

    @nn.compact
    def __call__(self, x: Array) -> Array:
        channels = x.shape[0]
        y = Pointwise(self.hidden, math.sqrt(2 / self.hidden), name="fc1")(x)
        y = nn.gelu(Depthwise(3, 1, self.method, name="dwconv")(y), approximate=False)
        return Pointwise(channels, math.sqrt(2 / channels), name="fc2")(y)


class Block(nn.Module):
    """Attention, then MLP. Each gets its input normalised, and adds its output, scaled per channel, to that input."""

    mlp_ratio: int
    drop_path: float
    method: Method

    @nn.compact
    def __call__(self, x: Array, train: bool) -> Array:
        y = Attention(self.method, name="attn")(_batch_norm("norm1", train)(x))
        x = x + self._branch("layer_scale_1", y, train)
        y = MLP(self.mlp_ratio * x.shape[0], self.method, name="mlp")(_batch_norm("norm2", train)(x))
        return x + self._branch("layer_scale_2", y, train)

    def _branch(self, name: str, y: Array, train: bool) -> Array:
        y = y * _per_channel(self.param(name, nn.initializers.constant(1e-2), y.shape[:1]))
        if not train or self.drop_path == 0.0:
            return y
        keep = jax.random.bernoulli(self.make_rng("drop_path"), 1 - self.drop_path, y.shape[-1:])
        return y * (keep.astype(y.dtype) / (1 - self.drop_path))


class VAN(nn.Module):
    """Visual Attention Network: images (N, H, W, C) to logits (N, num_classes).

    It has the fields of `VANVariant` and these:

    num_classes
        Length of the logits.
    pixel_mean, pixel_std
        With them the first layer normalises the images, one number per channel; see `Normalise`. Without them the
        images must be normalised already.
    drop_path
        Probability, in training, that a residual branch of the last block is dropped for an image. It grows linearly
        from 0 at the first block. The random stream is "drop_path".
    depthwise
        How depthwise convolutions run; see `training.models.depthwise.depthwise_conv`.

    Raises
    ------
    ValueError
        It is called, and fields do not fit together, or images are smaller than the product of the strides or have
        another number of channels than the weights.

    Examples
    --------
    >>> import jax, jax.numpy as jnp
    >>> module = VAN.from_variant(VARIANTS["digits"], num_classes=10)
    >>> variables = module.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    >>> module.apply(variables, jnp.zeros((5, 8, 8, 1))).shape
    (5, 10)
    """

    num_classes: int
    embed_dims: tuple[int, ...]
    depths: tuple[int, ...]
    mlp_ratios: tuple[int, ...]
    stem_kernel: int = 7
    stem_stride: int = 4
    drop_path: float = 0.0
    depthwise: Method = "auto"
    pixel_mean: tuple[float, ...] = ()
    pixel_std: tuple[float, ...] = ()

    @classmethod
    def from_variant(cls, variant: VANVariant, num_classes: int, **options: Any) -> "VAN":
        """Make the network of a size. `options` are further fields, and they replace those of the variant."""
        size = {f.name: getattr(variant, f.name) for f in fields(variant) if f.name != "image_shape"}
        return cls(num_classes, **(size | options))

    @nn.compact
    def __call__(self, x: Array, train: bool = False) -> Array:
        self._check(x.shape)
        if self.pixel_mean:
            x = Normalise(self.pixel_mean, self.pixel_std, name="normalise")(x)
        x = jnp.transpose(x, (3, 1, 2, 0))
        rates = iter(self._drop_rates())
        for stage, (channels, depth, ratio) in enumerate(
            zip(self.embed_dims, self.depths, self.mlp_ratios, strict=True), start=1
        ):
            size, stride = (self.stem_kernel, self.stem_stride) if stage == 1 else (3, 2)
            x = PatchEmbedding(channels, size, stride, name=f"patch_embed{stage}")(x, train)
            for index in range(depth):
                x = Block(ratio, next(rates), self.depthwise, name=f"block{stage}_{index}")(x, train)
            x = nn.LayerNorm(epsilon=1e-6, reduction_axes=0, feature_axes=0, name=f"norm{stage}")(x)
        return Classifier(self.num_classes, kernel_std=0.02, name="head")(jnp.mean(x, (1, 2)))

    def _drop_rates(self) -> list[float]:
        blocks = sum(self.depths)
        return [self.drop_path * index / max(blocks - 1, 1) for index in range(blocks)]

    def _check(self, shape: tuple[int, ...]) -> None:
        if not len(self.embed_dims) == len(self.depths) == len(self.mlp_ratios) > 0:
            raise ValueError(
                "VAN(embed_dims=..., depths=..., mlp_ratios=...) must have one entry per stage; "
                f"got {self.embed_dims}, {self.depths}, {self.mlp_ratios}"
            )
        if self.stem_kernel % 2 == 0 or not 1 <= self.stem_stride <= self.stem_kernel:
            raise ValueError(
                "VAN(stem_kernel=..., stem_stride=...) must be an odd kernel and a stride of at least 1 that the "
                f"kernel covers; got {self.stem_kernel} and {self.stem_stride}"
            )
        if not 0.0 <= self.drop_path < 1.0:
            raise ValueError(f"VAN(drop_path=...) must lie in [0, 1); got {self.drop_path}")
        if len(shape) != 4:
            raise ValueError(f"VAN()(x) must get images (N, H, W, C); got shape {shape}; add the missing axes")
        if not len(self.pixel_mean) == len(self.pixel_std) in (0, shape[3]):
            raise ValueError(
                "VAN(pixel_mean=..., pixel_std=...) must have one number for each channel of the images, "
                f"{shape[3]}; got {self.pixel_mean} and {self.pixel_std}"
            )
        smallest = self.stem_stride * 2 ** (len(self.embed_dims) - 1)
        if min(shape[1:3]) < smallest:
            raise ValueError(
                f"VAN()(x) must get images of at least {smallest} x {smallest} pixels, the product of its strides; "
                f"got {shape[1]} x {shape[2]}; use a smaller stem_stride or fewer stages"
            )
        stem = self.variables.get("params", {}).get("patch_embed1")
        if stem is not None and stem["kernel"].shape[2] != shape[3]:
            raise ValueError(
                f"VAN()(x) must get images of {stem['kernel'].shape[2]} channels, as its weights were made for; "
                f"got {shape[3]}; convert the images or initialise anew"
            )


def from_config(config: Config, num_classes: int) -> VAN:
    """Make the network that a configuration describes.

    Parameters
    ----------
    config
        Its model section has the variant, overrides of its stem, and drop-path. Its data section has the statistics
        of the pixels, measured or configured (`training.data.load.with_statistics`).
    num_classes
        Number of classes of the data.

    Raises
    ------
    UserError
        The variant is unknown, the stem kernel is even, or the stem stride leaves pixels out.
    ValueError
        The configuration has no statistics of the pixels.
    """
    model, data = config.model, config.data
    if data.mean is None or data.std is None:
        raise ValueError(
            "`from_config(config=...)` must have the statistics of the pixels; got none; use `with_statistics` first"
        )
    if model.variant not in VARIANTS:
        raise UserError(f"`model.variant` must be one of {', '.join(VARIANTS)}; got {model.variant!r}; choose one")
    variant = VARIANTS[model.variant]
    kernel = variant.stem_kernel if model.stem_kernel is None else model.stem_kernel
    stride = variant.stem_stride if model.stem_stride is None else model.stem_stride
    if kernel % 2 == 0:
        raise UserError(f"`model.stem_kernel` must be odd; got {kernel}; try {kernel + 1}")
    if stride > kernel:
        raise UserError(f"`model.stem_stride` must not exceed the stem's kernel, {kernel}; got {stride}; try {kernel}")
    return VAN.from_variant(
        variant,
        num_classes,
        stem_kernel=kernel,
        stem_stride=stride,
        drop_path=model.drop_path,
        pixel_mean=data.mean,
        pixel_std=data.std,
    )


def _per_channel(v: Array) -> Array:
    """Give a vector of channels the axes of (C, H, W, N)."""
    return v[:, None, None, None]


def _kernel_and_bias(layer: Pointwise | Classifier, channels: int) -> tuple[Array, Array]:
    """Return the weights of a linear map of channels."""
    kernel = layer.param("kernel", nn.initializers.normal(layer.kernel_std), (channels, layer.features))
    return kernel, layer.param("bias", nn.initializers.zeros, (layer.features,))


def _linear(kernel: Array, x: Array) -> Array:
    """Multiply kernel' x over the leading axes. With the kernel first, the features come out first."""
    return lax.dot_general(kernel, x, (((0,), (0,)), ((), ())))


def _batch_norm(name: str, train: bool) -> nn.BatchNorm:
    return nn.BatchNorm(use_running_average=not train, axis=0, momentum=0.9, epsilon=1e-5, name=name)
