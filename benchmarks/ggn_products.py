"""How fast are GGN products of convolutional networks?

    python benchmarks/ggn_products.py [--small]

1. One product of the network for 32 x 32 images: our depthwise convolution against the library's grouped one.
2. One product over 1,257 images of 8 x 8 pixels, the size of the embedded training set, linearised once.
3. A product of a block of 64 vectors over these images, linearised once for the block, as block Lanczos calls it.
4. The exact diagonal over the same images.
5. Rows of the Jacobian at the same images, as a fit keeps them: forming them, and products and the diagonal from them.
6. A block of 8 vectors on 200 images of 28 x 28 pixels, by derivatives and from rows: LeNet, most of whose weights are
   in dense layers.

Weights and images are random, since the cost does not depend on them. Alternatives run in turn in one process;
compilation is timed apart. Prints a table and writes `benchmarks/results/ggn_products.json`; `--small`, which only
shows that everything runs, writes `ggn_products_small.json`. Five to ten minutes on 2 cores.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from record import compile_seconds, console, interleaved, record_name, write
from rich.table import Table

from bnnlaplace import Network, categorical
from bnnlaplace.core.tree import ravel, size, unraveler
from bnnlaplace.curvature.diagonal import ggn_diagonal
from bnnlaplace.curvature.ggn import block_product, ggn_operator
from bnnlaplace.curvature.keep import keep
from bnnlaplace.curvature.kept import CurvatureAt
from bnnlaplace.curvature.linearisation import linearise
from bnnlaplace.model.data import as_data
from training.models.depthwise import Method
from training.models.van import VAN, VARIANTS, VANVariant

CLASSES, PRODUCTS = 10, 6
LENET_IMAGES, LENET_BLOCK = 200, 8


class Sizes(NamedTuple):
    """The networks for 32 x 32 and for 8 x 8 pixels, numbers of images, of vectors in a block and of repetitions."""

    cifar: VANVariant
    digits: VANVariant
    cifar_images: int
    digits_images: int
    block: int
    repetitions: int


WHOLE = Sizes(VARIANTS["cifar"], VARIANTS["digits"], 64, 1257, 64, 5)
TINY = VANVariant((2,), (1,), (1,), 3, 2, (4, 4, 1))
SMALL = Sizes(TINY, TINY, 2, 3, 2, 1)


class LeNet(nn.Module):
    """Two convolutions with pooling, and three dense layers."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for features in (6, 16):
            x = nn.avg_pool(nn.relu(nn.Conv(features, (5, 5))(x)), (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        for features in (120, 84):
            x = nn.relu(nn.Dense(features)(x))
        return nn.Dense(CLASSES)(x)


def lenet(images: int) -> tuple[Network, Array]:
    """LeNet at its initial weights, and random images."""
    x = jax.random.normal(jax.random.key(0), (images, 28, 28, 1))
    return Network.from_linen(LeNet(), jax.jit(LeNet().init)(jax.random.key(1), x[:1])), x


def build(variant: VANVariant, images: int, method: Method = "auto") -> tuple[Network, Array]:
    """Return a network at random weights, and random images."""
    module = VAN.from_variant(variant, CLASSES, depthwise=method)
    x = jax.random.normal(jax.random.key(0), (images, *variant.image_shape))
    variables = jax.jit(module.init)(jax.random.key(1), x[:1])
    network = Network.from_linen(module, variables, train=False)
    # Away from the initialisation, where layer scales of 0.01 would hide most of the network from a comparison.
    weights = ravel(network.params)
    noise = 0.1 * jax.random.normal(jax.random.key(2), weights.shape)
    return network.with_params(unraveler(network.params)(weights + noise)), x


def vectors(network: Network, count: int) -> Array:
    """Draw random directions of the weights, one in each row."""
    return jax.random.normal(jax.random.key(3), (count, size(network.params)))


def repeated(network: Network, x: Array, microbatch: int, count: int) -> Callable[[], Array]:
    """Make `count` products one after another with one linearisation; a difference of two counts gives the product."""

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
    """Largest difference of the products of two networks with the same weights, relative to the largest entry."""

    @jax.jit
    def product(network: Network, x: Array, vector: Array) -> Array:
        return ggn_operator(linearise(network, network.params, x, microbatch=microbatch), categorical()).matvec(vector)

    images = [product(network, x, vectors(network, 1)[0]) for network, x in networks.values()]
    return float(jnp.abs(images[0] - images[1]).max() / jnp.abs(images[1]).max())


def of_a_block(network: Network, x: Array, count: int, repetitions: int) -> dict[str, Any]:
    """Seconds for each vector of a block, with one linearisation for the block."""
    run = partial(
        jax.jit(lambda network, x, rows: block_product(network, categorical(), network.params, x)(rows)),
        network,
        x,
        vectors(network, count),
    )
    compiling = compile_seconds(run)
    return {"seconds": interleaved({"": run}, repetitions)[""] / count, "compile_seconds": compiling}


def of_the_diagonal(network: Network, x: Array, repetitions: int) -> dict[str, Any]:
    """Seconds of the exact diagonal."""
    run = partial(
        jax.jit(lambda network, x: ggn_diagonal(network, categorical(), network.params, x, microbatch=16)), network, x
    )
    compiling = compile_seconds(run)
    return {"seconds": interleaved({"": run}, repetitions)[""], "compile_seconds": compiling}


def of_kept_rows(network: Network, x: Array, count: int, repetitions: int) -> dict[str, dict[str, Any]]:
    """Seconds of forming rows, of each vector of a block, of one vector, and of the diagonal; bytes of rows."""
    likelihood, data = categorical(), as_data((np.asarray(x), np.zeros(len(x), int)))
    for _ in data:
        pass
    form = partial(keep, network, data, num_products=1000, microbatch=64)
    forming = compile_seconds(lambda: form().batches)
    rows = form()
    at = [CurvatureAt(*rows.outputs, jnp.ones(len(x)))]
    product = rows.ggn_product(likelihood, at, 1.0)
    runs = {
        "block": partial(product, vectors(network, count)),
        "one": partial(product, vectors(network, 1)),
        "diagonal": partial(rows.ggn_diagonal, likelihood, at),
    }
    compiling = {name: compile_seconds(run) for name, run in runs.items()}
    seconds = interleaved(runs, repetitions)
    found = {name: {"seconds": seconds[name], "compile_seconds": compiling[name]} for name in runs}
    found["block"]["seconds"] /= count
    size_of_rows = {"bytes": sum(batch.nbytes for batch in rows.batches)}
    del rows, product, runs  # a second copy is formed
    timed = interleaved({"": lambda: form().batches}, repetitions)[""]
    return {"forming": {"seconds": timed, "compile_seconds": forming} | size_of_rows, **found}


def main(small: bool = False) -> None:
    """Answer the questions, print and write.

    Args:
        small: Tiny networks and one repetition, to see that everything runs.
    """
    options = dict(locals())
    sizes = SMALL if small else WHOLE
    alternatives = {method: build(sizes.cifar, sizes.cifar_images, method) for method in ("auto", "grouped")}
    cifar = one_product(alternatives, 64, sizes.repetitions)
    difference = largest_difference(alternatives, 64)
    network, x = build(sizes.digits, sizes.digits_images)
    digits = one_product({"digits": (network, x)}, 64, 2 * sizes.repetitions - 1)["digits"]
    block = of_a_block(network, x, sizes.block, sizes.repetitions)
    diagonal = of_the_diagonal(network, x, sizes.repetitions)
    kept = of_kept_rows(network, x, sizes.block, sizes.repetitions)
    dense_head = lenet(2 if small else LENET_IMAGES)
    lenet_block = of_a_block(*dense_head, LENET_BLOCK, sizes.repetitions)
    lenet_rows = of_kept_rows(*dense_head, LENET_BLOCK, sizes.repetitions)

    large, tiny = (
        f"{height} x {width}, {images} images"
        for (height, width, _), images in (
            (sizes.cifar.image_shape, sizes.cifar_images),
            (sizes.digits.image_shape, sizes.digits_images),
        )
    )
    table = Table("what", "ms", "compile s", title="GGN products", title_justify="left")
    for name, timing in (
        (f"{large}, our depthwise convolution", cifar["auto"]),
        (f"{large}, the library's grouped convolution", cifar["grouped"]),
        (f"{tiny}, one vector", digits),
        (f"{tiny}, per vector of a block of {sizes.block}", block),
        (f"{tiny}, exact diagonal", diagonal),
        (f"{tiny}, forming rows, {kept['forming']['bytes'] / 1e6:.0f} MB", kept["forming"]),
        (f"{tiny}, one vector, from rows", kept["one"]),
        (f"{tiny}, per vector of a block of {sizes.block}, from rows", kept["block"]),
        (f"{tiny}, exact diagonal, from rows", kept["diagonal"]),
        (f"LeNet, per vector of a block of {LENET_BLOCK}", lenet_block),
        (f"LeNet, forming rows, {lenet_rows['forming']['bytes'] / 1e6:.0f} MB", lenet_rows["forming"]),
        (f"LeNet, per vector of a block of {LENET_BLOCK}, from rows", lenet_rows["block"]),
    ):
        table.add_row(name, f"{1e3 * timing['seconds']:.1f}", f"{timing['compile_seconds']:.1f}")
    console.print(table)
    speedup = cifar["grouped"]["seconds"] / cifar["auto"]["seconds"]
    console.print(f"{large}: {speedup:.1f} times as fast as grouped; largest relative difference {difference:.1e}")
    content = {
        "options": options,
        "cifar": cifar,
        "speedup_over_grouped": speedup,
        "largest_relative_difference": difference,
        "digits_one_vector": digits,
        f"digits_block_of_{sizes.block}": block,
        "digits_diagonal": diagonal,
        "digits_rows": kept,
        "lenet_block": lenet_block,
        "lenet_rows": lenet_rows,
    }
    write(record_name("ggn_products", main, options), content)


if __name__ == "__main__":
    tyro.cli(main)
