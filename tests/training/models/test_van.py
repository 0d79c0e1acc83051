"""The Visual Attention Network against its definition in library convolutions, and against its published sizes."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import exhaustive, usual
from jax import Array, lax

from training.config import Config, Data, Model
from training.errors import UserError
from training.models.van import VAN, VARIANTS, Block, Normalise, from_config

TINY = VAN(3, embed_dims=(4, 6), depths=(1, 2), mlp_ratios=(2, 1), stem_kernel=3, stem_stride=2)


@pytest.fixture(scope="module")
def variables() -> dict[str, Any]:
    """Random numbers everywhere: at initialisation biases are zero and layer scales small enough to hide faults."""
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), jnp.zeros((1, 8, 8, 2)))
    rng = np.random.default_rng(1)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Array:
        numbers = 0.5 * rng.standard_normal(leaf.shape)
        return jnp.asarray(np.abs(numbers) + 0.5 if path[-1].key == "var" else numbers, leaf.dtype)

    return jax.tree.map_with_path(draw, shapes)


@pytest.fixture(scope="module")
def images() -> Array:
    return jax.random.normal(jax.random.key(2), (3, 8, 8, 2))


def convolution(x: Array, kernel: Array, bias: Array, stride: int = 1, dilation: int = 1, groups: int = 1) -> Array:
    radius = dilation * (kernel.shape[0] // 2)
    y = lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(radius, radius)] * 2,
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
        precision=lax.Precision.HIGHEST,
    )
    return y + bias


def pointwise(p: dict[str, Array], x: Array) -> Array:
    return convolution(x, p["kernel"][None, None], p["bias"])


def depthwise(p: dict[str, Array], x: Array, dilation: int = 1) -> Array:
    return convolution(x, p["kernel"][:, :, None], p["bias"], dilation=dilation, groups=x.shape[-1])


def batch_norm(p: dict[str, Array], statistics: dict[str, Array], x: Array) -> Array:
    return (x - statistics["mean"]) / jnp.sqrt(statistics["var"] + 1e-5) * p["scale"] + p["bias"]


def gelu(x: Array) -> Array:
    return x * jax.scipy.stats.norm.cdf(x)


def block(p: dict[str, Any], statistics: dict[str, Any], x: Array) -> Array:
    y = batch_norm(p["norm1"], statistics["norm1"], x)
    attn = p["attn"]
    u = gelu(pointwise(attn["proj_1"], y))
    gate = depthwise(attn["conv_spatial"], depthwise(attn["conv0"], u), dilation=3)
    x = x + p["layer_scale_1"] * (y + pointwise(attn["proj_2"], u * pointwise(attn["conv1"], gate)))
    y = pointwise(p["mlp"]["fc1"], batch_norm(p["norm2"], statistics["norm2"], x))
    return x + p["layer_scale_2"] * pointwise(p["mlp"]["fc2"], gelu(depthwise(p["mlp"]["dwconv"], y)))


def layer_norm(p: dict[str, Array], x: Array) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def definition(variables: dict[str, Any], x: Array) -> Array:
    """TINY in NHWC, from the library's convolutions."""
    params, statistics = variables["params"], variables["batch_stats"]
    for stage, depth in ((1, 1), (2, 2)):
        embed = params[f"patch_embed{stage}"]
        x = convolution(x, embed["kernel"], embed["bias"], stride=2)
        x = batch_norm(embed["norm"], statistics[f"patch_embed{stage}"]["norm"], x)
        for index in range(depth):
            name = f"block{stage}_{index}"
            x = block(params[name], statistics[name], x)
        x = layer_norm(params[f"norm{stage}"], x)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]


Function = Callable[[dict[str, Any], Array], Array]


@pytest.fixture(scope="module")
def derivatives(variables, images) -> Callable[[Function], list[Array]]:
    """Return a function that evaluates logits, a directional derivative and a gradient, through one linearisation."""

    @partial(jax.jit, static_argnums=0)
    def evaluate(f: Function, variables: dict[str, Any]) -> Any:
        logits, pushforward = jax.linearize(lambda p: f({**variables, "params": p}, images), variables["params"])
        cotangent = jnp.cos(jnp.arange(logits.size).reshape(logits.shape))
        gradient = jax.linear_transpose(pushforward, variables["params"])(cotangent)[0]
        return logits, pushforward(jax.tree.map(jnp.cos, variables["params"])), gradient

    return lambda f: jax.tree.leaves(evaluate(f, variables))


@pytest.fixture(scope="module")
def expected(derivatives) -> list[Array]:
    return derivatives(definition)


@pytest.mark.parametrize("method", usual(["auto"], ["auto", "shifted", "grouped"]))
def test_logits_and_derivatives_are_those_of_the_definition(derivatives, expected, method):
    for ours, theirs in zip(derivatives(TINY.clone(depthwise=method).apply), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=2e-5 * float(jnp.abs(theirs).max()))


@pytest.mark.parametrize(
    ("variant", "weights"),
    [
        ("b0", 4_105_800),
        exhaustive("b1", 13_861_800),
        ("b2", 26_578_472),
        exhaustive("b3", 44_765_608),
        # Published as 60.3 and 90.0 million. B6 is published as 200.3 million; its published widths and depths give
        # 199.8, so its count cannot be pinned.
        exhaustive("b4", 60_283_176),
        exhaustive("b5", 89_967_688),
    ],
)
def test_official_sizes(variant, weights):
    module = VAN.from_variant(VARIANTS[variant], num_classes=1000)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == weights


@pytest.mark.parametrize(("variant", "weights"), [("cifar", 273_578), ("digits", 19_466)])
def test_small_sizes(variant, weights):
    size = VARIANTS[variant]
    module = VAN.from_variant(size, num_classes=10)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *size.image_shape)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == weights


def test_training_updates_running_statistics(variables, images):
    logits, updated = TINY.apply(variables, images, train=True, mutable=["batch_stats"])
    assert logits.shape == (3, 3)
    embed = variables["params"]["patch_embed1"]
    x = convolution(images, embed["kernel"], embed["bias"], stride=2)
    old, new = (tree["batch_stats"]["patch_embed1"]["norm"] for tree in (variables, updated))
    np.testing.assert_allclose(new["mean"], 0.9 * old["mean"] + 0.1 * x.mean((0, 1, 2)), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(new["var"], 0.9 * old["var"] + 0.1 * x.var((0, 1, 2)), rtol=1e-5)


def test_drop_path_drops_or_rescales_whole_images():
    x = jax.random.normal(jax.random.key(3), (4, 2, 2, 64))
    always, sometimes = (Block(mlp_ratio=1, drop_path=rate, method="auto") for rate in (0.0, 0.75))
    state = always.init(jax.random.key(4), x, train=False)
    # With the second branch switched off, what is added to x is the first branch alone.
    state["params"]["layer_scale_2"] = jnp.zeros(4)
    kept, _ = always.apply(state, x, train=True, mutable=["batch_stats"])
    rngs = {"drop_path": jax.random.key(5)}
    dropped, _ = sometimes.apply(state, x, train=True, mutable=["batch_stats"], rngs=rngs)
    factor = (dropped - x) / (kept - x)
    np.testing.assert_allclose(factor, jnp.broadcast_to(factor[:1, :1, :1], factor.shape), atol=1e-2)
    factors = np.round(np.asarray(factor[0, 0, 0]), 2)
    assert set(factors.tolist()) == {0.0, 4.0}
    assert 4 <= np.sum(factors == 4.0) <= 28  # of 64, binomial with mean 16 and deviation 3.5
    np.testing.assert_array_equal(sometimes.apply(state, x, train=False), always.apply(state, x, train=False))


def test_drop_path_grows_linearly_from_zero():
    assert TINY.clone(drop_path=0.2)._drop_rates() == pytest.approx([0.0, 0.1, 0.2])


def test_from_config_takes_the_variant_and_overrides_its_stem():
    pixels = {"pixel_mean": (0.5,), "pixel_std": (0.25,)}
    module = from_config(settings(Model("digits", stem_kernel=5, stem_stride=1, drop_path=0.1)), 7)
    expected = VAN.from_variant(VARIANTS["digits"], 7, stem_kernel=5, stem_stride=1, drop_path=0.1, **pixels)
    assert module == expected
    assert from_config(settings(Model("b2")), 10) == VAN.from_variant(VARIANTS["b2"], 10, **pixels)


def settings(model: Model) -> Config:
    return Config(data=Data(mean=(0.5,), std=(0.25,)), model=model)


def test_pixels_that_were_not_measured_are_refused():
    with pytest.raises(ValueError, match="must have the statistics of the pixels"):
        from_config(Config(), 10)


def test_normalise_matches_its_formula():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 4, 4, 3)
    mean, std = (0.1, 0.5, 0.9), (0.2, 1.0, 0.05)
    normalised = Normalise(mean, std).apply({}, images)
    assert normalised.dtype == np.float32
    np.testing.assert_allclose(normalised, (images / 255.0 - mean) / std, rtol=1e-6, atol=4e-6)


def test_the_first_layer_normalises_stored_images(variables):
    images = np.random.default_rng(7).integers(256, size=(3, 8, 8, 2), dtype=np.uint8)
    mean, std = (0.25, 0.5), (0.5, 0.125)
    found = TINY.clone(pixel_mean=mean, pixel_std=std).apply(variables, images)
    expected = TINY.apply(variables, ((images / 255.0 - mean) / std).astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Model("b7"), "one of b0, b1, b2, b3, b4, b5, b6, cifar, digits; got 'b7'"),
        (Model(stem_kernel=4), "stem_kernel` must be odd; got 4; try 5"),
        (Model(stem_stride=4), "stem_stride` must not exceed the stem's kernel, 3; got 4; try 3"),
    ],
)
def test_configurations_that_a_user_must_mend(model, message):
    with pytest.raises(UserError, match=message):
        from_config(settings(model), 10)


@pytest.mark.parametrize(
    ("fields", "shape", "message"),
    [
        ({}, (1, 3, 8, 2), "at least 4 x 4 pixels.*got 3 x 8"),
        ({}, (1, 8, 8, 3), "images of 2 channels.*got 3"),
        ({}, (8, 8, 2), "\\(N, H, W, C\\); got shape \\(8, 8, 2\\)"),
        ({"depths": (1,)}, (1, 8, 8, 2), "one entry per stage"),
        ({"stem_kernel": 2}, (1, 8, 8, 2), "odd kernel"),
        ({"drop_path": -0.1}, (1, 8, 8, 2), "drop_path=...\\) must lie in"),
        ({"pixel_mean": (0.5,), "pixel_std": (0.5,)}, (1, 8, 8, 2), "one number for each channel of the images, 2"),
        ({"pixel_mean": (0.5, 0.5)}, (1, 8, 8, 2), "one number for each channel of the images, 2"),
    ],
)
def test_faults(variables, fields, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TINY.clone(**fields).apply, variables, jnp.zeros(shape))
