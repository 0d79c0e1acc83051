"""Networks as their authors write them, from the examples and tutorials of Flax and from papers, in tiny sizes."""

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import bnnlaplace

# --- a convolutional network, as in the MNIST tutorial of NNX ----------------------------------------------------


class CNN(nnx.Module):
    """A simple CNN model."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 4, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm1 = nnx.BatchNorm(4, rngs=rngs)
        self.dropout1 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.conv2 = nnx.Conv(4, 6, kernel_size=(3, 3), rngs=rngs)
        self.batch_norm2 = nnx.BatchNorm(6, rngs=rngs)
        self.avg_pool = partial(nnx.avg_pool, window_shape=(2, 2), strides=(2, 2))
        self.linear1 = nnx.Linear(24, 8, rngs=rngs)
        self.dropout2 = nnx.Dropout(rate=0.025, rngs=rngs)
        self.linear2 = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.avg_pool(nnx.relu(self.batch_norm1(self.dropout1(self.conv1(x)))))
        x = self.avg_pool(nnx.relu(self.batch_norm2(self.conv2(x))))
        x = x.reshape(x.shape[0], -1)  # flatten
        x = nnx.relu(self.dropout2(self.linear1(x)))
        return self.linear2(x)


# --- a residual network, as in examples/imagenet of Flax ----------------------------------------------------------

ModuleDef = Any


class ResNetBlock(nn.Module):
    """ResNet block."""

    filters: int
    conv: ModuleDef
    norm: ModuleDef
    act: Callable
    strides: tuple[int, int] = (1, 1)

    @nn.compact
    def __call__(self, x):
        residual = x
        y = self.conv(self.filters, (3, 3), self.strides)(x)
        y = self.norm()(y)
        y = self.act(y)
        y = self.conv(self.filters, (3, 3))(y)
        y = self.norm(scale_init=nn.initializers.zeros_init())(y)

        if residual.shape != y.shape:
            residual = self.conv(self.filters, (1, 1), self.strides, name="conv_proj")(residual)
            residual = self.norm(name="norm_proj")(residual)

        return self.act(residual + y)


class ResNet(nn.Module):
    """ResNetV1."""

    stage_sizes: Sequence[int]
    block_cls: ModuleDef
    num_classes: int
    num_filters: int = 64
    dtype: Any = jnp.float32
    act: Callable = nn.relu
    conv: ModuleDef = nn.Conv

    @nn.compact
    def __call__(self, x, train: bool = True):
        conv = partial(self.conv, use_bias=False, dtype=self.dtype)
        norm = partial(
            nn.BatchNorm,
            use_running_average=not train,
            momentum=0.9,
            epsilon=1e-5,
            dtype=self.dtype,
            axis_name="batch",
        )

        x = conv(self.num_filters, (7, 7), (2, 2), padding=[(3, 3), (3, 3)], name="conv_init")(x)
        x = norm(name="bn_init")(x)
        x = nn.relu(x)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, block_size in enumerate(self.stage_sizes):
            for j in range(block_size):
                strides = (2, 2) if i > 0 and j == 0 else (1, 1)
                x = self.block_cls(self.num_filters * 2**i, strides=strides, conv=conv, norm=norm, act=self.act)(x)
        x = jnp.mean(x, axis=(1, 2))
        x = nn.Dense(self.num_classes, dtype=self.dtype)(x)
        return jnp.asarray(x, self.dtype)


# --- a vision transformer, as in google-research/vision_transformer -------------------------------------------------


class AddPositionEmbs(nn.Module):
    """Adds learned positional embeddings to the inputs."""

    posemb_init: Callable

    @nn.compact
    def __call__(self, inputs):
        pos_emb_shape = (1, inputs.shape[1], inputs.shape[2])
        pe = self.param("pos_embedding", self.posemb_init, pos_emb_shape)
        return inputs + pe


class MlpBlock(nn.Module):
    """Transformer MLP / feed-forward block."""

    mlp_dim: int
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, inputs, *, deterministic):
        x = nn.Dense(features=self.mlp_dim)(inputs)
        x = nn.gelu(x)
        x = nn.Dropout(rate=self.dropout_rate)(x, deterministic=deterministic)
        output = nn.Dense(features=inputs.shape[-1])(x)
        return nn.Dropout(rate=self.dropout_rate)(output, deterministic=deterministic)


class Encoder1DBlock(nn.Module):
    """Transformer encoder layer."""

    mlp_dim: int
    num_heads: int
    dropout_rate: float = 0.1

    @nn.compact
    def __call__(self, inputs, *, deterministic):
        x = nn.LayerNorm()(inputs)
        x = nn.MultiHeadDotProductAttention(num_heads=self.num_heads, dropout_rate=self.dropout_rate)(
            x, x, deterministic=deterministic
        )
        x = nn.Dropout(rate=self.dropout_rate)(x, deterministic=deterministic)
        x = x + inputs
        y = nn.LayerNorm()(x)
        return x + MlpBlock(mlp_dim=self.mlp_dim)(y, deterministic=deterministic)


class VisionTransformer(nn.Module):
    """VisionTransformer."""

    num_classes: int
    patches: tuple[int, int]
    hidden_size: int
    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, inputs, *, train):
        x = nn.Conv(self.hidden_size, self.patches, strides=self.patches, padding="VALID", name="embedding")(inputs)
        n, h, w, c = x.shape
        x = jnp.reshape(x, [n, h * w, c])
        cls = self.param("cls", nn.initializers.zeros, (1, 1, c))
        x = jnp.concatenate([jnp.tile(cls, [n, 1, 1]), x], axis=1)
        x = AddPositionEmbs(posemb_init=nn.initializers.normal(stddev=0.02), name="posembed_input")(x)
        x = Encoder1DBlock(self.mlp_dim, self.num_heads, name="encoderblock_0")(x, deterministic=not train)
        x = nn.LayerNorm(name="encoder_norm")(x)[:, 0]
        return nn.Dense(self.num_classes, name="head")(x)


# --- a language model whose embedding is its output layer, as in examples/lm1b of Flax -------------------------------


class DecoderLayer(nn.Module):
    """A causal layer, normalised before attention and perceptron."""

    mlp_dim: int
    num_heads: int

    @nn.compact
    def __call__(self, inputs, mask, deterministic: bool):
        x = nn.LayerNorm()(inputs)
        x = nn.MultiHeadDotProductAttention(
            num_heads=self.num_heads, use_bias=False, broadcast_dropout=False, deterministic=deterministic
        )(x, mask=mask)
        x = x + inputs
        z = nn.relu(nn.Dense(self.mlp_dim)(nn.LayerNorm()(x)))
        return x + nn.Dense(inputs.shape[-1])(z)


class TransformerLM(nn.Module):
    """Logits of the next token, by the embeddings of all tokens."""

    vocab_size: int
    emb_dim: int
    mlp_dim: int
    num_heads: int = 2
    logits_via_embedding: bool = True

    @nn.compact
    def __call__(self, inputs, deterministic: bool = True):
        mask = nn.combine_masks(nn.make_attention_mask(inputs >= 0, inputs >= 0), nn.make_causal_mask(inputs))
        embed = nn.Embed(self.vocab_size, self.emb_dim, embedding_init=nn.initializers.normal(stddev=1.0))
        y = embed(inputs.astype("int32"))
        y = y + self.param("pos_embedding", nn.initializers.normal(0.1), (1, inputs.shape[1], self.emb_dim))
        y = DecoderLayer(self.mlp_dim, self.num_heads)(y, mask, deterministic)
        y = nn.LayerNorm()(y)
        logits = embed.attend(y)
        return logits / jnp.sqrt(y.shape[-1])


# --- a BiLSTM by scan, as in examples/sst2 of Flax -------------------------------------------------------------------


class SimpleLSTM(nn.Module):
    """A simple unidirectional LSTM."""

    hidden_size: int

    @functools.partial(
        nn.transforms.scan, variable_broadcast="params", in_axes=1, out_axes=1, split_rngs={"params": False}
    )
    @nn.compact
    def __call__(self, carry, x):
        return nn.OptimizedLSTMCell(self.hidden_size)(carry, x)

    def initialize_carry(self, input_shape):
        # Use fixed random key since default state init fn is just zeros.
        return nn.OptimizedLSTMCell(self.hidden_size, parent=None).initialize_carry(jax.random.key(0), input_shape)


@functools.partial(jax.vmap, in_axes=(0, 0))
def flip_sequences(inputs, lengths):
    """Flips a sequence of inputs along the time dimension; padding stays at its end."""
    max_length = inputs.shape[0]
    return jnp.flip(jnp.roll(inputs, max_length - lengths, axis=0), axis=0)


class SimpleBiLSTM(nn.Module):
    """A simple bi-directional LSTM."""

    hidden_size: int

    def setup(self):
        self.forward_lstm = SimpleLSTM(self.hidden_size)
        self.backward_lstm = SimpleLSTM(self.hidden_size)

    def __call__(self, embedded_inputs, lengths):
        initial_state = self.forward_lstm.initialize_carry(embedded_inputs[:, 0].shape)
        _, forward_outputs = self.forward_lstm(initial_state, embedded_inputs)
        reversed_inputs = flip_sequences(embedded_inputs, lengths)
        initial_state = self.backward_lstm.initialize_carry(reversed_inputs[:, 0].shape)
        _, backward_outputs = self.backward_lstm(initial_state, reversed_inputs)
        backward_outputs = flip_sequences(backward_outputs, lengths)
        return jnp.concatenate([forward_outputs, backward_outputs], -1)


class TextClassifier(nn.Module):
    """Attention over the states of a BiLSTM, and a perceptron."""

    embedding_size: int
    hidden_size: int
    vocab_size: int
    output_size: int

    def setup(self):
        self.embedder = nn.Embed(self.vocab_size, self.embedding_size)
        self.encoder = SimpleBiLSTM(self.hidden_size)
        self.keys = nn.Dense(6, use_bias=False)
        self.energy = nn.Dense(1, use_bias=False)
        self.hidden = nn.Dense(7)
        self.output = nn.Dense(self.output_size)

    def __call__(self, token_ids, lengths):
        encoded = self.encoder(self.embedder(token_ids), lengths)
        scores = self.energy(jnp.tanh(self.keys(encoded)))[..., 0]
        mask = jnp.arange(token_ids.shape[1])[None] < lengths[:, None]
        attention = nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
        context = jnp.einsum("bt,bth->bh", attention, encoded)
        return self.output(jnp.tanh(self.hidden(context)))


# --- a U-Net --------------------------------------------------------------------------------------------------------


class DoubleConv(nn.Module):
    """(convolution, normalisation, activation) twice."""

    features: int

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = nn.Conv(self.features, (3, 3), use_bias=False)(x)
            x = nn.silu(nn.GroupNorm(num_groups=2)(x))
        return x


class UNet(nn.Module):
    """A class for each pixel."""

    features: Sequence[int]
    num_classes: int

    @nn.compact
    def __call__(self, x):
        skips = []
        for features in self.features[:-1]:
            x = DoubleConv(features)(x)
            skips.append(x)
            x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = DoubleConv(self.features[-1])(x)
        for features, skip in zip(reversed(self.features[:-1]), reversed(skips), strict=True):
            x = nn.ConvTranspose(features, (2, 2), strides=(2, 2))(x)
            x = DoubleConv(features)(jnp.concatenate([x, skip], axis=-1))
        return nn.Conv(self.num_classes, (1, 1))(x)


# --- the decoder of examples/vae of Flax -----------------------------------------------------------------------------


class Decoder(nn.Module):
    """VAE Decoder."""

    hidden: int
    pixels: int

    @nn.compact
    def __call__(self, z):
        z = nn.Dense(self.hidden, name="fc1")(z)
        z = nn.relu(z)
        return nn.Dense(self.pixels, name="fc2")(z)


# --- networks and data -----------------------------------------------------------------------------------------------


class Example(NamedTuple):
    """A network, data for it, and what its last layer is.

    Attributes
    ----------
    make
        From inputs to a network.
    inputs
        From a generator and a number to that many examples.
    likelihood
        A name.
    last_layer
        The weights of the last layer.
    once
        The kernels that multiply once for each example.
    single
        Whether the model computes in single precision, whatever the type of its weights.
    """

    make: Callable[[Any], bnnlaplace.Network]
    inputs: Callable[[np.random.Generator, int], Any]
    likelihood: str
    last_layer: frozenset[str]
    once: frozenset[str] = frozenset()
    single: bool = False


def linen(module: nn.Module, several: bool = False, **arguments: Any) -> Callable[[Any], bnnlaplace.Network]:
    """A Linen module with its initial weights; `arguments` are those of every call."""

    def make(inputs: Any) -> bnnlaplace.Network:
        first = jax.tree.map(lambda leaf: leaf[:1], inputs)
        variables = jax.jit(partial(module.init, **arguments))(jax.random.key(0), *(first if several else (first,)))
        return bnnlaplace.Network.from_linen(module, variables, **arguments)

    return make


def cnn(inputs: Any) -> bnnlaplace.Network:
    """The NNX model, as it is evaluated."""
    model = CNN(rngs=nnx.Rngs(0))
    model.eval()
    return bnnlaplace.Network.from_nnx(model)


def normal(*shape: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Inputs of normal numbers."""
    return lambda rng, count: rng.normal(size=(count, *shape)).astype(np.float32)


def tokens(vocabulary: int, length: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Sequences of tokens."""
    return lambda rng, count: rng.integers(0, vocabulary, size=(count, length)).astype(np.int32)


def texts(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Token sequences of several lengths."""
    return tokens(18, 6)(rng, count), rng.integers(2, 7, size=count).astype(np.int32)


def layer(name: str) -> frozenset[str]:
    """Kernel and bias."""
    return frozenset([f"{name}/kernel", f"{name}/bias"])


resnet = ResNet(stage_sizes=[1, 1], block_cls=ResNetBlock, num_classes=3, num_filters=4)
vit = VisionTransformer(num_classes=3, patches=(2, 2), hidden_size=12, mlp_dim=16, num_heads=2)

EXAMPLES = {
    "convolutional network": Example(
        cnn, normal(8, 8, 1), "classification", layer("linear2"), frozenset(["linear1/kernel", "linear2/kernel"])
    ),
    "ResNet": Example(
        linen(resnet, train=False),
        normal(12, 12, 1),
        "classification",
        layer("Dense_0"),
        frozenset(["Dense_0/kernel"]),
        single=True,
    ),
    "ViT": Example(
        linen(vit, train=False), normal(6, 6, 2), "classification", layer("head"), frozenset(["head/kernel"])
    ),
    "language model": Example(
        linen(TransformerLM(vocab_size=14, emb_dim=12, mlp_dim=16)),
        tokens(14, 5),
        "classification",
        # The embeddings enter first of all, so they are not the last layer.
        layer("DecoderLayer_0/Dense_1") | {"LayerNorm_0/scale", "LayerNorm_0/bias"},
    ),
    "BiLSTM": Example(
        linen(TextClassifier(5, 12, 18, 3), several=True),
        texts,
        "classification",
        layer("output"),
        frozenset(["hidden/kernel", "output/kernel"]),
        single=True,
    ),
    "U-Net": Example(linen(UNet((4, 6), 2)), normal(6, 6, 1), "classification", layer("Conv_0")),
    "VAE decoder": Example(
        linen(Decoder(9, 25)),
        normal(3),
        "binary",
        layer("fc2"),
        frozenset(["fc1/kernel", "fc2/kernel"]),
    ),
}
