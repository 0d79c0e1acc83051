"""Depthwise 2-D convolution that stays fast when it is linearised, transposed, or batched over its kernels.

The operation is bilinear in image and kernel. With zeros outside the image, dilation d and radius r = (k - 1) / 2,
two primitives are closed under every derivative, of any order:

    conv(x, w)[i, j]               = sum_uv x[i + d(u - r), j + d(v - r)] w[u, v]
    kernel_gradient(x, y)[u, v]    = sum_ij x[i + d(u - r), j + d(v - r)] y[i, j]

The transpose of `conv` in x is `conv` with the kernel turned by 180 degrees. Its transpose in w is `kernel_gradient`.
The two transposes of `kernel_gradient` are `conv` again.

XLA on CPU runs grouped convolutions many times slower than their arithmetic, above all dilated ones and their kernel
gradients. So each primitive has three lowerings. "auto" chooses among them by the platform that the program is compiled
for, not by the one where it is traced. On accelerators it takes the grouped convolution of the library. On CPU it takes
shifted multiply-adds, or, for the smallest images, one matrix product per channel with the Toeplitz matrix of its
kernel. Taps that no pixel reaches are skipped: a 7 x 7 kernel of dilation 3 has 9 left on a 4 x 4 image.

Arrays have channels first and images last. A channel is then a contiguous matrix of pixels by images. So multiply-adds
run along the images, and the Toeplitz products need no transposition, as the pointwise layers around them need none.

Inside the primitives there is an axis G of independent convolutions, to which `jax.vmap` maps. Images are
(C, G, H, W, N), kernels are (kh, kw, C, G), and either may have G = 1 and be shared.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Method = Literal["auto", "toeplitz", "shifted", "grouped"]

# Largest images, in pixels, for which Toeplitz products beat shifted sums (2 CPU cores, 16 to 64 channels). The limit
# of the kernel gradient is larger, because XLA does not vectorise its sum over pixels and images.
TOEPLITZ_CONV_PIXELS = 16
TOEPLITZ_GRADIENT_PIXELS = 64

# Rows that the shifted kernel gradient adds up before it reduces. More rows would only take longer to compile.
ROWS_PER_SUM = 16


def depthwise_conv(x: Array, kernel: Array, *, dilation: int = 1, method: Method = "auto") -> Array:
    """Convolve each channel with its own kernel, with stride 1 and zeros outside: the output is as large as the input.

    y[c, i, j, n] = sum_uv x[c, i + dilation (u - r_h), j + dilation (v - r_w), n] kernel[u, v, c]

    Parameters
    ----------
    x : (C, H, W, N)
        Images, channels first and images last.
    kernel : (kh, kw, C)
        One kernel per channel. kh and kw are odd.
    dilation
        Distance between taps, in pixels.
    method
        "auto" is "grouped" on accelerators; on CPU it is "toeplitz" for the smallest images and "shifted" for others.
        "grouped" multiplies in the precision of the `jax.default_matmul_precision` that it is called under. The others
        multiply in full precision.

    Returns
    -------
    Array
        (C, H, W, N), differentiable to any order in x and kernel. It costs C H W N multiply-adds per tap. "toeplitz"
        costs H W per output, and keeps a C x (H W)^2 matrix.

    Raises
    ------
    ValueError
        The shapes do not fit, a size of the kernel is even, the dilation is below 1, or the method is unknown.
    """
    _check(x, kernel, dilation, method)
    dtype = jnp.result_type(x, kernel)
    x, kernel = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    # It is read here, because the context that sets it has ended when the primitive is lowered.
    precision = jax.config.jax_default_matmul_precision
    return _conv_p.bind(x[:, None], kernel[..., None], dilation=dilation, method=method, precision=precision)[:, 0]


def _check(x: Array, kernel: Array, dilation: int, method: str) -> None:
    if method not in get_args(Method):
        raise ValueError(f"depthwise_conv(method=...) must be one of {', '.join(get_args(Method))}; got {method!r}")
    if x.ndim != 4 or kernel.ndim != 3 or kernel.shape[2] != x.shape[0]:
        raise ValueError(
            "depthwise_conv(x, kernel) must get x (C, H, W, N) and kernel (kh, kw, C); "
            f"got {x.shape} and {kernel.shape}; transpose to channels first and images last"
        )
    if kernel.shape[0] % 2 == 0 or kernel.shape[1] % 2 == 0:
        raise ValueError(f"depthwise_conv(kernel=...) must have odd sizes; got {kernel.shape[:2]}; pad it with zeros")
    if dilation < 1:
        raise ValueError(f"depthwise_conv(dilation=...) must be at least 1; got {dilation}")


# Taps -----------------------------------------------------------------------------------------------------------------


def _taps(window: tuple[int, int], dilation: int, image: tuple[int, int]) -> list[tuple[int, int, int, int]]:
    """List the (u, v, dy, dx) of the taps that reach at least one pixel of the image from another."""
    offsets = [
        [(k, dilation * (k - size // 2)) for k in range(size) if abs(dilation * (k - size // 2)) < extent]
        for size, extent in zip(window, image, strict=True)
    ]
    return [(u, v, dy, dx) for u, dy in offsets[0] for v, dx in offsets[1]]


def _pad_for(taps: list[tuple[int, int, int, int]], x: Array, below: int = 0) -> tuple[Array, int, int]:
    """Pad x with the zeros that the taps reach, and `below` more rows. Return also the zeros above and to the left."""
    top = max(dy for _, _, dy, _ in taps)
    left = max(dx for _, _, _, dx in taps)
    padded = jnp.pad(x, ((0, 0), (0, 0), (top, top + below), (left, left), (0, 0)))
    # Without the barrier the padding would be fused into the sum and evaluated once per tap.
    return lax.optimization_barrier(padded), top, left


@cache
def _toeplitz_pattern(window: tuple[int, int], dilation: int, image: tuple[int, int]) -> np.ndarray:
    """E[t, q, p] = 1 where tap t carries input pixel p to output pixel q: (taps, pixels, pixels)."""
    height, width = image
    pattern = np.zeros((*window, height, width, height, width), np.float32)
    for u, v, dy, dx in _taps(window, dilation, image):
        for i in range(max(0, -dy), min(height, height - dy)):
            for j in range(max(0, -dx), min(width, width - dx)):
                pattern[u, v, i, j, i + dy, j + dx] = 1.0
    return pattern.reshape(window[0] * window[1], height * width, height * width)


# Lowerings ------------------------------------------------------------------------------------------------------------


def _shifted_conv(x: Array, w: Array, *, dilation: int) -> Array:
    height, width = x.shape[2:4]
    taps = _taps(w.shape[:2], dilation, (height, width))
    padded, top, left = _pad_for(taps, x)
    terms = [
        padded[:, :, top + dy : top + dy + height, left + dx : left + dx + width] * w[u, v, :, :, None, None, None]
        for u, v, dy, dx in taps
    ]
    # Without the barrier this sum would be fused into the next convolution and evaluated once per tap there.
    return lax.optimization_barrier(sum(terms[1:], terms[0]))


def _shifted_kernel_gradient(x: Array, y: Array, *, window: tuple[int, int], dilation: int) -> Array:
    height, width = x.shape[2:4]
    taps = _taps(window, dilation, (height, width))
    rows = min(height, ROWS_PER_SUM)
    blocks = -(-height // rows)
    below = blocks * rows - height
    is_single = x.shape[4] == 1
    if is_single:
        # One gradient for each image, as for Jacobians: multiply-adds run along the groups, which take the place of the
        # images. A group of one that is shared broadcasts there as well.
        x, y = (jnp.swapaxes(operand, 1, 4) for operand in (x, y))
    padded, top, left = _pad_for(taps, x, below)
    y = jnp.pad(y, ((0, 0), (0, 0), (0, below), (0, 0), (0, 0)))
    sums = {}
    for u, v, dy, dx in taps:
        # Rows are added first: that vectorises and leaves little to reduce. A plain sum of products would do neither.
        terms = [
            padded[:, :, top + dy + i : top + dy + i + (blocks - 1) * rows + 1 : rows, left + dx : left + dx + width]
            * y[:, :, i::rows]
            for i in range(rows)
        ]
        sums[u, v] = sum(terms[1:], terms[0])
    stacked = lax.optimization_barrier(jnp.stack(list(sums.values())))
    reduced = jnp.sum(stacked, (2, 3, 4) if is_single else (3, 4, 5))
    us, vs = (np.array(axis) for axis in zip(*sums, strict=True))
    return jnp.zeros((*window, *reduced.shape[1:]), reduced.dtype).at[us, vs].set(reduced, unique_indices=True)


def _toeplitz_conv(x: Array, w: Array, *, dilation: int) -> Array:
    channels, groups, height, width, images = x.shape
    pattern = _toeplitz_pattern(w.shape[:2], dilation, (height, width)).astype(w.dtype)
    matrices = _exact_einsum("tcg,tqp->cgqp", w.reshape(-1, *w.shape[2:]), pattern)
    pixels = x.reshape(channels, groups, height * width, images)
    if groups == 1:
        y = _exact_einsum("cgqp,cpn->cgqn", matrices, pixels[:, 0])
    else:
        # A shared matrix is repeated. One product per channel would have to transpose the images, which is slower.
        matrices = jnp.broadcast_to(matrices, (channels, groups, *matrices.shape[2:]))
        y = _exact_einsum("cgqp,cgpn->cgqn", matrices, pixels)
    return y.reshape(*y.shape[:2], height, width, images)


def _toeplitz_kernel_gradient(x: Array, y: Array, *, window: tuple[int, int], dilation: int) -> Array:
    channels, _, height, width, images = x.shape
    pattern = _toeplitz_pattern(window, dilation, (height, width)).astype(y.dtype)
    inputs = x.reshape(channels, -1, height * width, images)
    outputs = y.reshape(channels, -1, height * width, images)
    if inputs.shape[1] == 1:
        products = _exact_einsum("cgqn,cpn->cgqp", outputs, inputs[:, 0])
    elif outputs.shape[1] == 1:
        products = _exact_einsum("cqn,cgpn->cgqp", outputs[:, 0], inputs)
    else:
        products = _exact_einsum("cgqn,cgpn->cgqp", outputs, inputs)
    gradient = _exact_einsum("tqp,cgqp->tcg", pattern, products)
    return gradient.reshape(*window, *products.shape[:2])


_exact_einsum = partial(jnp.einsum, precision=lax.Precision.HIGHEST)


def _grouped_conv(x: Array, w: Array, *, dilation: int, precision: str | None) -> Array:
    channels, _, height, width, images = x.shape
    groups = max(x.shape[1], w.shape[3])
    y = lax.conv_general_dilated(
        jnp.broadcast_to(x, (channels, groups, *x.shape[2:])).reshape(channels * groups, *x.shape[2:]),
        jnp.broadcast_to(w, (*w.shape[:3], groups)).reshape(*w.shape[:2], 1, channels * groups),
        window_strides=(1, 1),
        padding="SAME",
        rhs_dilation=(dilation, dilation),
        dimension_numbers=("CHWN", "HWIO", "CHWN"),
        feature_group_count=channels * groups,
        precision=precision,
    )
    return y.reshape(channels, groups, height, width, images)


def _grouped_kernel_gradient(
    x: Array, y: Array, *, window: tuple[int, int], dilation: int, precision: str | None
) -> Array:
    channels, groups = x.shape[0], max(x.shape[1], y.shape[1])
    y = jnp.broadcast_to(y, (channels, groups, *y.shape[2:]))
    kernel = jax.ShapeDtypeStruct((*window, channels, groups), y.dtype)
    (gradient,) = jax.linear_transpose(partial(_grouped_conv, x, dilation=dilation, precision=precision), kernel)(y)
    return gradient


# Primitives -----------------------------------------------------------------------------------------------------------

_conv_p = Primitive("depthwise_conv")
_gradient_p = Primitive("depthwise_kernel_gradient")


# Position of the axis G in an image and in a kernel.
_IMAGE, _KERNEL = 1, 3


def _conv_shape(x: Any, w: Any, **_: Any) -> Any:
    return x.update(shape=(x.shape[0], max(x.shape[1], w.shape[3]), *x.shape[2:]))


def _gradient_shape(x: Any, y: Any, *, window: tuple[int, int], **_: Any) -> Any:
    return y.update(shape=(*window, x.shape[0], max(x.shape[1], y.shape[1])))


def _summed_like(operand: Any, cotangent: Array, axis: int) -> Array:
    """Return the cotangent of an operand. If the G convolutions shared it, their cotangents are summed."""
    shared = operand.aval.shape[axis] == 1 < cotangent.shape[axis]
    return jnp.sum(cotangent, axis, keepdims=True) if shared else cotangent


def _conv_transpose_x(ct: Array, x: Any, w: Array, **params: Any) -> Array:
    return _summed_like(x, _conv_p.bind(ct, w[::-1, ::-1], **params), _IMAGE)


def _conv_transpose_w(ct: Array, x: Array, w: Any, **params: Any) -> Array:
    return _summed_like(w, _gradient_p.bind(x, ct, window=w.aval.shape[:2], **params), _KERNEL)


def _gradient_transpose_x(ct: Array, x: Any, y: Array, *, window: tuple[int, int], **params: Any) -> Array:
    return _summed_like(x, _conv_p.bind(y, ct[::-1, ::-1], **params), _IMAGE)


def _gradient_transpose_y(ct: Array, x: Array, y: Any, *, window: tuple[int, int], **params: Any) -> Array:
    return _summed_like(y, _conv_p.bind(x, ct, **params), _IMAGE)


def _batch(
    primitive: Primitive,
    places: tuple[int, int],
    place_out: int,
    operands: tuple[Array, Array],
    axes: tuple[int | None, int | None],
    **params: Any,
) -> tuple[Array, int]:
    """Fold the mapped axis into G. An operand that is neither mapped nor grouped stays shared."""
    moved = [
        jnp.expand_dims(a, place) if axis is None else jnp.moveaxis(a, axis, place)
        for a, axis, place in zip(operands, axes, places, strict=True)
    ]
    size, groups = (max(a.shape[place + k] for a, place in zip(moved, places, strict=True)) for k in (0, 1))

    def fold(a: Array, place: int) -> Array:
        before, own, after = a.shape[:place], a.shape[place : place + 2], a.shape[place + 2 :]
        own = own if own == (1, 1) else (size, groups)
        return jnp.broadcast_to(a, (*before, *own, *after)).reshape(*before, own[0] * own[1], *after)

    out = primitive.bind(*(fold(a, place) for a, place in zip(moved, places, strict=True)), **params)
    return out.reshape(*out.shape[:place_out], size, groups, *out.shape[place_out + 1 :]), place_out


@cache
def _compiled(primitive: Primitive, params: tuple[tuple[str, Any], ...]) -> Callable[..., Array]:
    return jax.jit(partial(primitive.bind, **dict(params)))


def _lowering(rules: dict[str, Callable[..., Array]], pixels: int, platform: str) -> Callable[..., list[Array]]:
    """Make the lowering rule for a platform. On CPU "auto" takes Toeplitz products up to `pixels`.

    The kernel gradient of single images has none: a product over one image would be as large as the Toeplitz matrix.
    """

    def lower(x: Array, other: Array, *, method: Method, precision: str | None, **params: Any) -> list[Array]:
        if method == "auto" and platform == "cpu":
            is_small = x.shape[2] * x.shape[3] <= pixels
            is_single_gradient = "window" in params and x.shape[4] == 1
            method = "toeplitz" if is_small and not is_single_gradient else "shifted"
        elif method == "auto":
            method = "grouped"
        if method == "grouped":
            params["precision"] = precision
        return [rules[method](x, other, **params)]

    return lower


def _define(
    primitive: Primitive, shape: Any, places: tuple[int, int, int], rules: dict[str, Callable[..., Array]], pixels: int
) -> None:
    """Register all but the derivatives. `places` are the positions of G in the operands and in the result."""
    primitive.def_abstract_eval(shape)
    primitive.def_impl(lambda *operands, **params: _compiled(primitive, tuple(params.items()))(*operands))
    batching.primitive_batchers[primitive] = partial(_batch, primitive, places[:2], places[2])
    for platform in ("default", "cpu"):
        rule = mlir.lower_fun(_lowering(rules, pixels, platform), multiple_results=True)
        mlir.register_lowering(primitive, rule, platform=None if platform == "default" else platform)


_define(
    _conv_p,
    _conv_shape,
    (_IMAGE, _KERNEL, _IMAGE),
    {"toeplitz": _toeplitz_conv, "shifted": _shifted_conv, "grouped": _grouped_conv},
    TOEPLITZ_CONV_PIXELS,
)
_define(
    _gradient_p,
    _gradient_shape,
    (_IMAGE, _IMAGE, _KERNEL),
    {
        "toeplitz": _toeplitz_kernel_gradient,
        "shifted": _shifted_kernel_gradient,
        "grouped": _grouped_kernel_gradient,
    },
    TOEPLITZ_GRADIENT_PIXELS,
)
ad.defbilinear(_conv_p, _conv_transpose_x, _conv_transpose_w)
ad.defbilinear(_gradient_p, _gradient_transpose_x, _gradient_transpose_y)
