"""How fast are GGN products of Visual Attention Networks?

    python benchmarks/ggn_products.py

1. One product of the network for 32 x 32 images: our depthwise convolution against the library's grouped one.
2. One product over 1,257 images of 8 x 8 pixels, the size of the embedded training set, linearised once.
3. The same for a block of 64 vectors, linearised once per block: what block Lanczos calls.
4. The exact diagonal over the same images.

Weights and images are random: the cost does not depend on them. Alternatives run in turn in one process; compilation is
timed apart. Prints a table and writes `benchmarks/results/ggn_products.json`. About two minutes on 2 cores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from record import compile_seconds, interleaved, write
from rich.console import Console
from rich.table import Table

from bnnlaplace import Network, categorical
from bnnlaplace.core.tree import ravel, size, unraveler
from bnnlaplace.curvature.diagonal import ggn_diagonal
from bnnlaplace.curvature.ggn import block_product, ggn_operator
from bnnlaplace.curvature.linearisation import linearise
from training.models.depthwise import Method
from training.models.van import VAN, VARIANTS

DIGITS, CLASSES, PRODUCTS = 1257, 10, 6


def build(variant: str, images: int, method: Method = "auto") -> tuple[Network, Array]:
    """The network at random weights, and random images."""
    module = VAN.from_variant(VARIANTS[variant], CLASSES, depthwise=method)
    x = jax.random.normal(jax.random.key(0), (images, *VARIANTS[variant].image_shape))
    variables = jax.jit(module.init)(jax.random.key(1), x[:1])
    network = Network.from_linen(module, variables, train=False)
    # Away from the initialisation, where layer scales of 0.01 would hide most of the network from a comparison.
    weights = ravel(network.params)
    noise = 0.1 * jax.random.normal(jax.random.key(2), weights.shape)
    return network.with_params(unraveler(network.params)(weights + noise)), x


def vectors(network: Network, count: int) -> Array:
    """Random directions of the weights, one in each row."""
    return jax.random.normal(jax.random.key(3), (count, size(network.params)))


def repeated(network: Network, x: Array, microbatch: int, count: int) -> Callable[[], Array]:
    """`count` products one after another with the operator linearised once; a difference of two gives the product."""

    @jax.jit
    def run(network: Network, x: Array, vector: Array) -> Array:
        operator = ggn_operator(linearise(network, network.params, x, microbatch=microbatch), categorical())

        def step(vector: Array, _: None) -> tuple[Array, None]:
            image = operator.matvec(vector)
            return image / jnp.linalg.norm(image), None

        return jax.lax.scan(step, vector, length=count)[0]

    return partial(run, network, x, vectors(network, 1)[0])


def one_product(networks: dict[str, tuple[Network, Array]], microbatch: int, repetitions: int) -> dict[str, Any]:
    """Seconds of one product of each network, and of compiling several."""
    few = {name: repeated(*built, microbatch, 1) for name, built in networks.items()}
    many = {f"{name}, many": repeated(*built, microbatch, 1 + PRODUCTS) for name, built in networks.items()}
    compiling = {name: compile_seconds(run) for name, run in (few | many).items()}
    medians = interleaved(few | many, repetitions)
    return {
        name: {"seconds": (medians[f"{name}, many"] - medians[name]) / PRODUCTS, "compile_seconds": compiling[name]}
        for name in networks
    }


def largest_difference(networks: dict[str, tuple[Network, Array]], microbatch: int) -> float:
    """Of the products of two networks with the same weights, relative to the largest entry."""

    @jax.jit
    def product(network: Network, x: Array, vector: Array) -> Array:
        return ggn_operator(linearise(network, network.params, x, microbatch=microbatch), categorical()).matvec(vector)

    images = [product(network, x, vectors(network, 1)[0]) for network, x in networks.values()]
    return float(jnp.abs(images[0] - images[1]).max() / jnp.abs(images[1]).max())


def of_a_block(count: int, repetitions: int) -> dict[str, Any]:
    """Seconds per vector of a block, relinearised for the block."""
    network, x = build("digits", DIGITS)
    run = partial(
        jax.jit(lambda network, x, rows: block_product(network, categorical(), network.params, x)(rows)),
        network,
        x,
        vectors(network, count),
    )
    compiling = compile_seconds(run)
    return {"seconds": interleaved({"": run}, repetitions)[""] / count, "compile_seconds": compiling}


def of_the_diagonal(repetitions: int) -> dict[str, Any]:
    """Seconds of the exact diagonal."""
    network, x = build("digits", DIGITS)
    run = partial(
        jax.jit(lambda network, x: ggn_diagonal(network, categorical(), network.params, x, microbatch=16)), network, x
    )
    compiling = compile_seconds(run)
    return {"seconds": interleaved({"": run}, repetitions)[""], "compile_seconds": compiling}


def main() -> None:
    """Answer the questions, print and write."""
    console = Console()
    alternatives = {method: build("cifar", 64, method) for method in ("auto", "grouped")}
    cifar = one_product(alternatives, 64, 5)
    difference = largest_difference(alternatives, 64)
    digits = one_product({"digits": build("digits", DIGITS)}, 64, 9)["digits"]
    block, diagonal = of_a_block(64, 5), of_the_diagonal(5)

    table = Table("what", "ms", "compile s", title="GGN products", title_justify="left")
    for name, found in (
        ("32 x 32, 64 images, our depthwise convolution", cifar["auto"]),
        ("32 x 32, 64 images, the library's grouped convolution", cifar["grouped"]),
        (f"8 x 8, {DIGITS} images, one vector", digits),
        (f"8 x 8, {DIGITS} images, per vector of a block of 64", block),
        (f"8 x 8, {DIGITS} images, exact diagonal", diagonal),
    ):
        table.add_row(name, f"{1e3 * found['seconds']:.1f}", f"{found['compile_seconds']:.1f}")
    console.print(table)
    speedup = cifar["grouped"]["seconds"] / cifar["auto"]["seconds"]
    console.print(f"32 x 32: {speedup:.1f} times as fast as grouped; largest relative difference {difference:.1e}")
    path = write(
        "ggn_products",
        {
            "cifar": cifar,
            "speedup_over_grouped": speedup,
            "largest_relative_difference": difference,
            "digits_one_vector": digits,
            "digits_block_of_64": block,
            "digits_diagonal": diagonal,
        },
    )
    console.print(f"written to {path}", highlight=False)


if __name__ == "__main__":
    main()
