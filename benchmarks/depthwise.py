"""How fast are Gauss-Newton products of Visual Attention Networks on CPU?

    python benchmarks/depthwise.py

Four questions, each answered in one process with the alternatives interleaved, compilation apart:

1. one product of the network for 32 x 32 images: our depthwise convolution against the library's grouped one;
2. one product over 1,257 images of 8 x 8 pixels, the size of the embedded training set;
3. the same for blocks of vectors: which arrangement is fastest for one vector of the block;
4. the exact diagonal over the same images: which arrangement is fastest.

Weights and images are random: the cost does not depend on them. Prints a table and writes
`benchmarks/results/depthwise.json`. About four minutes on 2 cores.
"""

import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.models.depthwise import Method
from training.models.van import VAN, VARIANTS

RESULTS = Path(__file__).parent / "results" / "depthwise.json"
DIGITS = 1257
CLASSES = 10

Logits = Callable[[Any, Array], Array]


@dataclass(frozen=True)
class Case:
    """One timed program: `run()` does the work of `vectors` products."""

    name: str
    run: Callable[[], Any]
    vectors: int
    compile_seconds: float


@dataclass(frozen=True)
class Measurement:
    """The outcome of a case; the fastest of the repetitions, because whatever disturbs a machine only adds time."""

    question: str
    case: str
    milliseconds: float
    milliseconds_per_vector: float
    compile_seconds: float


def build(variant: str, images: int, method: Method = "auto") -> tuple[Logits, Any, Array]:
    """The network as a function of its weights, random weights, and random images."""
    size = VARIANTS[variant]
    module = VAN.from_variant(size, CLASSES, depthwise=method)
    x = jax.random.normal(jax.random.key(0), (images, *size.image_shape))
    variables = jax.jit(module.init)(jax.random.key(1), x[:1])
    params = variables.pop("params")
    # Away from the initialisation, where layer scales of 0.01 would hide most of the network from a comparison.
    params = jax.tree.map(jnp.add, params, directions(params, 2, scale=0.1))
    return (lambda p, x: module.apply({"params": p, **variables}, x)), params, x


def directions(params: Any, seed: int, block: tuple[int, ...] = (), scale: float = 1.0) -> Any:
    """Random tangents of the weights, `block` of them along leading axes."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [scale * jax.random.normal(key, block + leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(structure, drawn)


def microbatches(x: Array, size: int) -> tuple[Array, Array]:
    """Images in equal microbatches, and weights that are zero for the padding of the last."""
    count = -(-len(x) // size)
    padded = jnp.pad(x, ((0, count * size - len(x)), *[(0, 0)] * (x.ndim - 1)))
    weights = (jnp.arange(count * size) < len(x)).astype(x.dtype)
    return padded.reshape(count, size, *x.shape[1:]), weights.reshape(count, size)


def softmax_hessian(logits: Array, tangent: Array) -> Array:
    """(diag p - p p') tangent, row by row."""
    p = jax.nn.softmax(logits)
    return p * (tangent - jnp.sum(p * tangent, -1, keepdims=True))


def compiled(name: str, f: Callable[..., Any], *arguments: Any, vectors: int = 1) -> Case:
    start = time.perf_counter()
    program = jax.jit(f).lower(*arguments).compile()
    seconds = time.perf_counter() - start
    return Case(name, partial(program, *arguments), vectors, seconds)


def measure(question: str, cases: list[Case], repetitions: int) -> list[Measurement]:
    """Run all cases in turn, `repetitions` times after one that is not counted."""
    fastest = dict.fromkeys((case.name for case in cases), float("inf"))
    for repetition in range(repetitions + 1):
        for case in cases:
            start = time.perf_counter()
            jax.block_until_ready(case.run())
            if repetition:
                fastest[case.name] = min(fastest[case.name], time.perf_counter() - start)
    return [
        Measurement(question, c.name, 1e3 * fastest[c.name], 1e3 * fastest[c.name] / c.vectors, c.compile_seconds)
        for c in cases
    ]


# Arrangements of the product ------------------------------------------------------------------------------------------


def one_microbatch(logits: Array, pushforward: Any, params: Any, weights: Array) -> Callable[[Any], Any]:
    pullback = jax.linear_transpose(pushforward, params)
    return lambda v: pullback(weights[:, None] * softmax_hessian(logits, pushforward(v)))[0]


def residuals_kept(
    f: Logits, params: Any, x: Array, microbatch: int, over_vectors: Callable[[Any], Any]
) -> tuple[Callable[[Any, Any], Any], Any]:
    """Linearised once, before any product; products read the residuals back. Returns the product and the residuals."""
    structure = None

    def linearise(batch: tuple[Array, Array]) -> Any:
        nonlocal structure
        logits, pushforward = jax.linearize(lambda p: f(p, batch[0]), params)
        leaves, structure = jax.tree.flatten(pushforward)
        return logits, leaves, batch[1]

    residuals = jax.block_until_ready(jax.jit(partial(lax.map, linearise))(microbatches(x, microbatch)))

    def product(vectors: Any, residuals: Any) -> Any:
        def add(total: Any, residual: Any) -> tuple[Any, None]:
            logits, leaves, weights = residual
            one = one_microbatch(logits, jax.tree.unflatten(structure, leaves), params, weights)
            return jax.tree.map(jnp.add, total, over_vectors(one)(vectors)), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, vectors), residuals)[0]

    return product, residuals


def linearised_per_block(f: Logits, params: Any, x: Array, microbatch: int) -> Callable[[Any], Any]:
    """Linearised afresh for every block, one microbatch at a time: nothing is kept between products."""

    def product(vectors: Any) -> Any:
        def add(total: Any, batch: tuple[Array, Array]) -> tuple[Any, None]:
            logits, pushforward = jax.linearize(lambda p: f(p, batch[0]), params)
            one = one_microbatch(logits, pushforward, params, batch[1])
            return jax.tree.map(jnp.add, total, jax.vmap(one)(vectors)), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, vectors), microbatches(x, microbatch))[0]

    return product


def diagonal(f: Logits, params: Any, x: Array, microbatch: int, classes: str) -> Callable[[], Any]:
    """sum_n sum_c (J_n' B_n e_c)^2, with the classes of an image mapped, or scanned."""

    def example(x: Array, weight: Array) -> Any:
        logits, pullback = jax.vjp(lambda p: f(p, x[None])[0], params)
        p = jax.nn.softmax(logits)
        factor = jnp.diag(jnp.sqrt(p)) - p[:, None] * jnp.sqrt(p)
        squares = lambda column: jax.tree.map(jnp.square, pullback(column)[0])
        if classes == "mapped":
            total = jax.tree.map(lambda g: g.sum(0), jax.vmap(squares)(factor.T))
        else:
            add = lambda total, column: (jax.tree.map(jnp.add, total, squares(column)), None)
            total = lax.scan(add, jax.tree.map(jnp.zeros_like, params), factor.T)[0]
        return jax.tree.map(lambda g: weight * g, total)

    def run() -> Any:
        def add(total: Any, batch: tuple[Array, Array]) -> tuple[Any, None]:
            return jax.tree.map(lambda t, g: t + g.sum(0), total, jax.vmap(example)(*batch)), None

        return lax.scan(add, jax.tree.map(jnp.zeros_like, params), microbatches(x, microbatch))[0]

    return run


# Questions ------------------------------------------------------------------------------------------------------------


def against_grouped(images: int = 64) -> tuple[list[Measurement], float]:
    """Question 1, and the largest difference of the two products relative to the largest entry."""
    cases = []
    for method in ("auto", "grouped"):
        f, params, x = build("cifar", images, method)
        product, residuals = residuals_kept(f, params, x, images, lambda one: one)
        cases.append(compiled(method, product, directions(params, 3), residuals))
    ours, theirs = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(case.run())]) for case in cases)
    difference = float(jnp.abs(ours - theirs).max() / jnp.abs(theirs).max())
    return measure(f"32 x 32, {images} images, 1 vector", cases, 5), difference


def single_vector() -> list[Measurement]:
    f, params, x = build("digits", DIGITS)
    cases = []
    for size in (64, 128, 256):
        product, residuals = residuals_kept(f, params, x, size, lambda one: one)
        cases.append(compiled(f"microbatches of {size}", product, directions(params, 3), residuals))
    return measure(f"8 x 8, {DIGITS} images, 1 vector", cases, 10)


def block_of_vectors(vectors: int) -> list[Measurement]:
    f, params, x = build("digits", DIGITS)
    block = directions(params, 3, (vectors,))
    arrangements = [
        ("vmap, microbatches of 32", 32, jax.vmap),
        ("vmap, microbatches of 64", 64, jax.vmap),
        ("vmap, microbatches of 128", 128, jax.vmap),
        ("lax.map, microbatches of 128", 128, lambda one: partial(lax.map, one)),
    ]
    if vectors > 16:
        by_sixteen = lambda one: partial(lax.map, one, batch_size=16)
        arrangements.append(("vmap over 16 at a time, microbatches of 64", 64, by_sixteen))
    cases = []
    for name, size, over_vectors in arrangements:
        product, residuals = residuals_kept(f, params, x, size, over_vectors)
        cases.append(compiled(name, product, block, residuals, vectors=vectors))
    product = linearised_per_block(f, params, x, 64)
    cases.append(compiled("vmap, microbatches of 64, linearised per block", product, block, vectors=vectors))
    return measure(f"8 x 8, {DIGITS} images, {vectors} vectors", cases, 3)


def exact_diagonal() -> list[Measurement]:
    f, params, x = build("digits", DIGITS)
    cases = [
        compiled(f"classes {classes}, microbatches of {size}", diagonal(f, params, x, size, classes))
        for classes in ("mapped", "scanned")
        for size in (16, 64)
    ]
    return measure(f"8 x 8, {DIGITS} images, diagonal", cases, 3)


def main() -> None:
    console = Console()
    measurements, difference = against_grouped()
    speedup = measurements[1].milliseconds / measurements[0].milliseconds
    measurements += single_vector()
    for vectors in (16, 64):
        measurements += block_of_vectors(vectors)
    measurements += exact_diagonal()

    for question, answers in itertools.groupby(measurements, key=lambda m: m.question):
        table = Table("arrangement", "ms", "ms per vector", "compile s", title=question, title_justify="left")
        for m in answers:
            times = (f"{m.milliseconds:.1f}", f"{m.milliseconds_per_vector:.2f}", f"{m.compile_seconds:.1f}")
            table.add_row(m.case, *times)
        console.print(table)
    console.print(f"32 x 32: {speedup:.1f} times as fast as grouped; largest relative difference {difference:.1e}")

    device = jax.devices()[0]
    RESULTS.parent.mkdir(exist_ok=True)
    record = {
        "jax": jax.__version__,
        "platform": device.platform,
        "device": device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "speedup_over_grouped": speedup,
        "largest_relative_difference": difference,
        "measurements": [asdict(m) for m in measurements],
    }
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    console.print(f"written to benchmarks/results/{RESULTS.name}")


if __name__ == "__main__":
    main()
