"""Depthwise convolution against its definition, in every lowering, under every transformation the package uses."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import usual
from jax import Array
from jax.test_util import check_grads

from training.models.depthwise import depthwise_conv

METHODS = ["auto", "toeplitz", "shifted", "grouped"]

# (pixels, window, dilation): one pixel; all taps but the centre off one axis; more pixels than Toeplitz takes for the
# convolution, then for its kernel gradient too; more rows than one block of the shifted gradient.
CASES = [
    ((1, 1), (5, 5), 1),
    ((4, 3), (3, 5), 1),
    ((4, 4), (7, 7), 3),
    ((2, 7), (7, 7), 3),
    ((6, 5), (5, 3), 2),
    ((18, 4), (3, 3), 1),
]


def definition(x: np.ndarray, kernel: np.ndarray, dilation: int) -> np.ndarray:
    """The sum in the docstring, term by term."""
    _, height, width, _ = x.shape
    y = np.zeros_like(x)
    for i, j, u, v in np.ndindex(height, width, *kernel.shape[:2]):
        row = i + dilation * (u - kernel.shape[0] // 2)
        column = j + dilation * (v - kernel.shape[1] // 2)
        if 0 <= row < height and 0 <= column < width:
            y[:, i, j] += x[:, row, column] * kernel[u, v][:, None]
    return y


def draw(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("pixels", "window", "dilation"), CASES)
def test_convolution_and_both_transposes(x64, pixels, window, dilation, method):
    x, y, kernel = draw(0, (2, *pixels, 3), (2, *pixels, 3), (*window, 2))

    @jax.jit
    def evaluate(x: Array, kernel: Array, y: Array) -> tuple[Array, tuple[Array, Array]]:
        out, pullback = jax.vjp(partial(depthwise_conv, dilation=dilation, method=method), x, kernel)
        return out, pullback(y)

    out, (x_bar, kernel_bar) = evaluate(x, kernel, y)
    np.testing.assert_allclose(out, definition(x, kernel, dilation), atol=1e-12)
    np.testing.assert_allclose(x_bar, definition(y, kernel[::-1, ::-1], dilation), atol=1e-12)
    expected = np.zeros_like(kernel)
    for tap in np.ndindex(*window):
        unit = np.zeros_like(kernel)
        unit[tap] = 1.0
        expected[tap] = np.sum(definition(x, unit, dilation) * y, axis=(1, 2, 3))
    np.testing.assert_allclose(kernel_bar, expected, atol=1e-12)


@pytest.mark.parametrize("method", usual(["toeplitz", "shifted"], METHODS))
def test_derivatives_of_higher_order(x64, method):
    x, kernel = draw(1, (1, 3, 4, 2), (3, 3, 1))
    check_grads(lambda x, k: jnp.sin(depthwise_conv(x * x, k, method=method)), (x, kernel), order=3, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0), (4, 1), (3, None), (None, 3)])
def test_batching(x64, axes, method):
    x, kernel = draw(2, (3, 4, 2, 2), (3, 3, 3))
    xs, kernels = draw(3, (5, *x.shape), (5, *kernel.shape))
    conv = partial(depthwise_conv, dilation=2, method=method)
    operands = [
        single if axis is None else np.moveaxis(stack, 0, axis)
        for single, stack, axis in zip((x, kernel), (xs, kernels), axes, strict=True)
    ]
    expected = [
        definition(x if axes[0] is None else xs[s], kernel if axes[1] is None else kernels[s], 2) for s in range(5)
    ]
    np.testing.assert_allclose(jax.jit(jax.vmap(conv, in_axes=axes))(*operands), expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_nested_batching_shares_what_is_shared(x64, method):
    xs, kernels = draw(4, (2, 3, 4, 2, 2), (5, 3, 3, 3))
    conv = partial(depthwise_conv, method=method)
    outer = jax.jit(jax.vmap(jax.vmap(conv, in_axes=(None, 0)), in_axes=(0, None)))(xs, kernels)
    expected = [[definition(x, kernel, 1) for kernel in kernels] for x in xs]
    np.testing.assert_allclose(outer, expected, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_transpose_of_a_batched_convolution(x64, method):
    """An operand that the batch shares gets the sum of the batch's cotangents."""
    x, kernel = draw(5, (2, 3, 4, 2), (3, 3, 2))
    xs, kernels = draw(6, (5, *x.shape), (5, *kernel.shape))
    conv = partial(depthwise_conv, method=method)

    @jax.jit
    def shared_image(x: Array, ys: Array) -> Array:
        return jax.vjp(lambda x: jax.vmap(conv, in_axes=(None, 0))(x, kernels), x)[1](ys)[0]

    @jax.jit
    def shared_kernel(kernel: Array, ys: Array) -> Array:
        return jax.vjp(lambda k: jax.vmap(conv, in_axes=(0, None))(xs, k), kernel)[1](ys)[0]

    x_bars = [definition(y, k[::-1, ::-1], 1) for y, k in zip(xs, kernels, strict=True)]
    np.testing.assert_allclose(shared_image(x, xs), sum(x_bars), atol=1e-12)
    kernel_bars = [jax.vjp(lambda k, x=x: conv(x, k), kernel)[1](x)[0] for x in xs]
    np.testing.assert_allclose(shared_kernel(kernel, xs), sum(kernel_bars), atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_per_image(x64, method):
    x, y, kernel = draw(7, (2, 4, 3, 5), (2, 4, 3, 5), (3, 3, 2))

    @jax.jit
    @partial(jax.vmap, in_axes=(3, 3))
    def per_image(x: Array, y: Array) -> Array:
        conv = partial(depthwise_conv, x[..., None], method=method)
        return jax.vjp(conv, jnp.asarray(kernel))[1](y[..., None])[0]

    whole = jax.vjp(lambda k: depthwise_conv(x, k, method=method), jnp.asarray(kernel))[1](jnp.asarray(y))[0]
    gradients = per_image(x, y)
    assert gradients.shape == (5, *kernel.shape)
    np.testing.assert_allclose(gradients.sum(0), whole, atol=1e-12)
    first = jax.vjp(lambda k: depthwise_conv(x[..., :1], k), jnp.asarray(kernel))[1](jnp.asarray(y[..., :1]))[0]
    np.testing.assert_allclose(gradients[0], first, atol=1e-12)


@pytest.mark.parametrize(("side", "operation"), [(4, "dot_general"), (9, "multiply")])
def test_platform_chooses_the_lowering(side, operation):
    x, kernel = jnp.ones((2, side, side, 3)), jnp.ones((3, 3, 2))
    traced = jax.jit(depthwise_conv).trace(x, kernel)
    on_cpu = traced.lower(lowering_platforms=("cpu",)).as_text()
    on_gpu = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert f"stablehlo.{operation}" in on_cpu and "stablehlo.convolution" not in on_cpu
    assert "stablehlo.convolution" in on_gpu


@pytest.mark.parametrize("precision", ["HIGHEST", "DEFAULT"])
def test_grouped_convolution_keeps_the_precision_it_is_called_under(precision):
    """The derivatives do as well, although the convolution is lowered after the context has ended."""
    x, kernel = jnp.ones((2, 3, 3, 1)), jnp.ones((3, 3, 2))

    def gradients(x: Array, kernel: Array) -> tuple[Array, Array]:
        with jax.default_matmul_precision(precision.lower()):
            return jax.grad(lambda x, k: jnp.sum(depthwise_conv(x, k, method="grouped") ** 2), (0, 1))(x, kernel)

    text = jax.jit(gradients).lower(x, kernel).as_text()
    assert text.count("stablehlo.convolution") == 3
    assert text.count(f"#stablehlo<precision {precision}>") == 2 * 3


def test_unreachable_taps_cost_nothing():
    """A 7 x 7 kernel of dilation 3 reaches 4 x 4 pixels with 9 of its 49 taps."""
    conv = partial(depthwise_conv, dilation=3, method="shifted")
    text = jax.jit(conv).lower(jnp.ones((1, 4, 4, 2)), jnp.ones((7, 7, 1))).as_text()
    assert text.count("stablehlo.multiply") == 9


def test_mixed_precision_is_promoted(x64):
    x, kernel = draw(8, (1, 3, 3, 1), (3, 3, 1))
    y = depthwise_conv(jnp.asarray(x, jnp.float32), jnp.asarray(kernel))
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, definition(x, kernel, 1), atol=1e-6)


@pytest.mark.parametrize(
    ("x", "kernel", "options", "message"),
    [
        ((2, 4, 4, 1), (2, 3, 2), {}, "odd sizes; got"),
        ((2, 4, 4, 1), (3, 3, 1), {}, "kernel \\(kh, kw, C\\)"),
        ((2, 4, 4), (3, 3, 2), {}, "x \\(C, H, W, N\\)"),
        ((2, 4, 4, 1), (3, 3, 2), {"dilation": 0}, "at least 1; got 0"),
        ((2, 4, 4, 1), (3, 3, 2), {"method": "winograd"}, "auto, toeplitz, shifted, grouped; got 'winograd'"),
    ],
)
def test_faults(x, kernel, options, message):
    with pytest.raises(ValueError, match=message):
        depthwise_conv(jnp.ones(x), jnp.ones(kernel), **options)
