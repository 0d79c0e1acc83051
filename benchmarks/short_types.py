"""Rounding of curvature in networks that compute in 16 bits, on data of known rank: a few inputs that repeat.

Eigenvalues that should be zero are printed in units of eps times the largest one: Ritz values of products with G of
either sign, with and without sums of derivatives in float32, and the root of those of B' J.
"""

import argparse

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import bnnlaplace
from bnnlaplace import krylov
from bnnlaplace.curvature import dense, streamed
from bnnlaplace.model import network as network_module

DISTINCT, CLASSES, WIDTH = 8, 3, 36
RANK = DISTINCT * (CLASSES - 1)


class Perceptron(nn.Module):
    """Layers of `widths` units."""

    widths: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.widths:
            x = nn.tanh(nn.Dense(width, dtype=self.dtype)(x))
        return nn.Dense(CLASSES, dtype=self.dtype)(x)


class Convolutions(nn.Module):
    """Convolutions of `widths` channels, and a mean over positions."""

    widths: tuple[int, ...]
    dtype: str

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(-1, 6, 6, 1)
        for width in self.widths:
            x = nn.gelu(nn.Conv(width, (3, 3), dtype=self.dtype)(x))
        return nn.Dense(CLASSES, dtype=self.dtype)(x.mean((1, 2)))


def ritz_values(network: bnnlaplace.Network, x: np.ndarray, max_vectors: int = 96) -> np.ndarray:
    """Ritz values over the largest one, ascending."""
    product = streamed.operator(network, bnnlaplace.categorical(), (x, np.zeros(len(x), int)), side="primal")
    probes = jax.random.normal(jax.random.key(5), (16, product.size))
    *_, decomposition = krylov.block_lanczos(product.matvec, probes, max_vectors=max_vectors)
    values = krylov.ritz(decomposition, positive=False).values
    return values / values.max()


def main() -> None:
    """Print one line for each network, type and number of copies."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--copies", type=int, nargs="+", default=[20])
    arguments = parser.parse_args()
    inputs = np.random.default_rng(3).normal(size=(DISTINCT, WIDTH)).astype(np.float32)
    wide_sums = network_module.with_wide_sums
    modules = [Perceptron, (16,)], [Perceptron, (64, 64)], [Perceptron, (32,) * 5], [Convolutions, (8, 8)]
    print("network                    type      copies   most negative   largest of zeros   plain sums   root of B'J")
    for kind, widths in modules:
        for dtype in ("float32", "bfloat16", "float16"):
            for copies in arguments.copies:
                module, eps = kind(widths, dtype), float(jnp.finfo(dtype).eps)
                network = bnnlaplace.Network.from_linen(module, module.init(jax.random.key(0), inputs))
                x = np.tile(inputs, (copies, 1))
                values = ritz_values(network, x)
                rows = dense.factor_rows(network, bnnlaplace.categorical(), network.params, inputs, np.ones(DISTINCT))
                singular = np.linalg.svd(np.asarray(rows, np.float64))[1]
                network_module.with_wide_sums = lambda function, *rest: function(*rest)
                jax.clear_caches()
                plain = ritz_values(network, x)
                network_module.with_wide_sums = wide_sums
                jax.clear_caches()
                columns = values.min(), values[:-RANK].max(), plain.min(), singular[RANK] / singular[0]
                numbers = "".join(f"{value / eps:16.3f}" for value in columns)
                print(f"{kind.__name__ + str(widths):<27}{dtype:<10}{copies:>6}{numbers}", flush=True)


if __name__ == "__main__":
    main()
