"""What do a last layer of many outputs, and its predictions, cost beside their closed forms?

    python benchmarks/many_outputs.py [--features 128] [--outputs 10 100 1000 5000] [--small]

The Jacobian of a dense layer in its weights is phi kron I, with the features phi that enter it. So with the curvature
Lambda_n of the likelihood in the outputs, the exact diagonal is sum_n phi_n^2 kron diag(Lambda_n), the Kronecker
factors are sum_n phi_n phi_n' and sum_n Lambda_n, and variances of outputs follow from phi alone. These formulas are
written by hand below for a softmax, and timed against the functions of the package, which know nothing of them: they
find the layer in the traced network. For "full" there is one closed form of the matrix where it fits, and for
"lanczos" that of a product with eight vectors.

Each case is compiled for 2,000 examples (256 for variances), and its memory is that of arguments, outputs and
temporary arrays, as XLA lays them out. Cases run in turn in one process. Before they are timed, the results of both are
compared. Prints a table and writes `benchmarks/results/many_outputs.json`; `--small`, which only shows that everything
runs, writes `many_outputs_small.json`. A few minutes on 2 cores.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from record import Results, compile_ahead, measure, record_name, show, write

from bnnlaplace import Network, categorical
from bnnlaplace.core.linalg import einsum, matmul
from bnnlaplace.curvature.dense import ggn
from bnnlaplace.curvature.diagonal import ggn_diagonal
from bnnlaplace.curvature.ggn import block_product
from bnnlaplace.curvature.kronecker import factors
from bnnlaplace.evidence.log_likelihood import LogLikelihood
from bnnlaplace.fitted import Fitted
from bnnlaplace.fitting.fit import exact_structure
from bnnlaplace.predictive.functional import functional_variances
from bnnlaplace.prior import Prior
from bnnlaplace.structure import Structure

# The full matrix has that many weights at most, and Kronecker factors of more outputs are not decomposed.
MOST_WEIGHTS_OF_FULL, MOST_OUTPUTS_DECOMPOSED = 3000, 1000
# How many vectors a block of products has.
VECTORS = 8
Case = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


def problem(num_features: int, num_outputs: int, num_examples: int) -> tuple[Network, Array]:
    """A dense layer with a bias, and features of which the larger ones go with surer outputs."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jnp.maximum(jax.random.normal(keys[0], (num_examples, num_features)), 0)
    kernel = 3 * jax.random.normal(keys[1], (num_features, num_outputs)) / num_features**0.5
    bias = jax.random.normal(keys[2], (num_outputs,))
    return Network.from_function(lambda p, x: x @ p["kernel"] + p["bias"], {"bias": bias, "kernel": kernel}), x


def curvature(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
    """The probabilities p, and the diagonal of Lambda, p (1 - p)."""
    p = jax.nn.softmax(matmul(x, params["kernel"]) + params["bias"])
    return p, p * (1 - p)


def diagonal_by_hand(params: dict[str, Array], x: Array) -> Array:
    _, diagonal = curvature(params, x)
    return jnp.concatenate([diagonal.sum(axis=0), matmul((x**2).T, diagonal).reshape(-1)])


def factors_by_hand(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
    p, _ = curvature(params, x)
    return matmul(x.T, x), jnp.diag(p.sum(axis=0)) - matmul(p.T, p)


def full_by_hand(params: dict[str, Array], x: Array) -> Array:
    p, _ = curvature(params, x)
    inputs = jnp.concatenate([jnp.ones((len(x), 1)), x], axis=1)
    moments = jnp.eye(p.shape[1]) * p[:, :, None] - p[:, :, None] * p[:, None, :]
    products = (inputs[:, :, None] * inputs[:, None, :]).reshape(len(x), -1)
    size = inputs.shape[1] * p.shape[1]
    blocks = matmul(products.T, moments.reshape(len(x), -1)).reshape(*[inputs.shape[1]] * 2, *p.shape[1:] * 2)
    return jnp.transpose(blocks, (0, 2, 1, 3)).reshape(size, size)


def product_by_hand(params: dict[str, Array], x: Array, vectors: Array) -> Array:
    p, _ = curvature(params, x)
    bias, kernel = jnp.split(vectors, [p.shape[1]], axis=1)
    tangents = einsum("ni,sio->sno", x, kernel.reshape(len(vectors), x.shape[1], -1)) + bias[:, None]
    curved = p * tangents - p * jnp.sum(p * tangents, axis=-1, keepdims=True)
    kernel = einsum("ni,sno->sio", x, curved).reshape(len(vectors), -1)
    return jnp.concatenate([curved.sum(axis=1), kernel], axis=1)


def diagonal_variance_by_hand(structure: Structure, x: Array) -> Array:
    bias, kernel = jnp.split(1 / (structure.diagonal + 1), [structure.diagonal.size // (x.shape[1] + 1)])
    return matmul(x**2, kernel.reshape(x.shape[1], -1)) + bias


def kronecker_variance_by_hand(structure: Structure, x: Array) -> Array:
    bias, kernel = structure.blocks
    values = 1 / (kernel.row_values * kernel.column_values + 1)
    of_bias = matmul(bias.vectors[0] ** 2, 1 / (bias.values[0] + 1))
    return matmul(matmul(matmul(x, kernel.row_vectors) ** 2, values), (kernel.column_vectors**2).T) + of_bias


def variances(network: Network, structure: Structure, x: Array) -> Array:
    """The variances of all outputs, as `predictive` asks for them with the probit link."""
    nothing = LogLikelihood(*[np.float64(0)] * 4)
    fitted = Fitted(network, categorical(), Prior(1.0), structure, nothing)
    return next(functional_variances(fitted, x, [1.0], marginal=True))


def fits(network: Network, x: Array) -> dict[str, Case]:
    """The cases of a fit: the package and the closed form of each structure."""
    params, likelihood, num_weights = network.params, categorical(), sum(map(jnp.size, network.params.values()))
    options = {"microbatch": 32}
    cases = {
        "diag": (
            lambda n, x: ggn_diagonal(n, likelihood, n.params, x, **options),
            (diagonal_by_hand, (params, x)),
        ),
        "kron": (
            lambda n, x: (lambda s: (s.inputs, s.outputs))(factors(n, likelihood, n.params, x, **options)[1]),
            (factors_by_hand, (params, x)),
        ),
    }
    if num_weights <= MOST_WEIGHTS_OF_FULL:
        full = lambda n, x: ggn(n, likelihood, n.params, x, **options)  # noqa: E731
        cases["full"] = (full, (full_by_hand, (params, x)))
    return {
        f"{name}, fit": {"bnnlaplace": (ours, (network, x)), "closed form": by_hand}
        for name, (ours, by_hand) in cases.items()
    }


def products(network: Network, x: Array) -> dict[str, Case]:
    """The case of a block of products, as Lanczos takes them."""
    count = sum(map(jnp.size, network.params.values()))
    vectors = jax.random.normal(jax.random.key(4), (VECTORS, count))
    ours = lambda n, x, v: block_product(n, categorical(), n.params, x)(v)  # noqa: E731
    arguments = (network, x, vectors), (network.params, x, vectors)
    return {
        f"lanczos, {VECTORS} products": {
            "bnnlaplace": (ours, arguments[0]),
            "closed form": (product_by_hand, arguments[1]),
        }
    }


def predictions(network: Network, x: Array, num_inputs: int) -> dict[str, Case]:
    """The cases of variances of outputs."""
    params, likelihood = network.params, categorical()
    cases = {"diag": (exact_structure("diag", diagonal_by_hand(params, x), 1.0), diagonal_variance_by_hand)}
    if params["bias"].size <= MOST_OUTPUTS_DECOMPOSED:
        sums = factors(network, likelihood, params, x[:8])
        inputs, outputs = factors_by_hand(params, x)
        sums = [
            type(sums[0])(outputs[None]),
            type(sums[1])(inputs, outputs, jnp.asarray(float(len(x))), sums[1].segments),
        ]
        cases["kron"] = (exact_structure("kron", sums, 1.0), kronecker_variance_by_hand)
    x = x[:num_inputs]
    return {
        f"{name}, variances": {
            "bnnlaplace": (variances, (network, structure, x)),
            "closed form": (by_hand, (structure, x)),
        }
        for name, (structure, by_hand) in cases.items()
    }


def difference(cases: dict[str, Callable[[], Any]]) -> float:
    """The largest difference between both results, relative to the largest number."""
    ours, by_hand = (jax.tree.leaves(jax.tree.map(np.asarray, run())) for run in cases.values())
    return max(
        float(np.abs(a.reshape(b.shape) - b).max() / np.abs(b).max()) for a, b in zip(ours, by_hand, strict=True)
    )


def compare(cases: dict[str, Case], repetitions: int) -> dict[str, Results]:
    """Measure both sides of each case, and compare their results."""
    results = {}
    for name, sides in cases.items():
        programs = {side: compile_ahead(function, *arguments) for side, (function, arguments) in sides.items()}
        results[name] = measure(programs, repetitions)
        if not name.startswith("full"):  # whose weights are in another order by hand
            results[name]["bnnlaplace"]["difference"] = difference({k: p.run for k, p in programs.items()})
    return results


def main(
    features: int = 128,
    outputs: tuple[int, ...] = (10, 100, 1000, 5000),
    examples: int = 2000,
    repetitions: int = 5,
    small: bool = False,
) -> None:
    """Time both sides, print and write.

    Args:
        features: The number of inputs of the layer.
        outputs: The numbers of its outputs.
        examples: The number of examples of a fit.
        repetitions: How often each case is timed.
        small: A tiny layer and one repetition, to see that everything runs.
    """
    options = dict(locals())
    if small:
        features, outputs, examples, repetitions = 4, (3,), 20, 1
    results = {}
    for count in outputs:
        network, x = problem(features, count, examples)
        cases = fits(network, x) | products(network, x) | predictions(network, x, min(256, examples))
        results[f"{count} outputs"] = compare(cases, repetitions)
        show(f"{features} features, {count} outputs, {examples} examples", _rows(results[f"{count} outputs"]))
    write(record_name("many_outputs", main, options), {"options": options, "results": results})


def _rows(results: dict[str, Results]) -> Results:
    return {f"{name}, {side}": case for name, sides in results.items() for side, case in sides.items()}


if __name__ == "__main__":
    tyro.cli(main)
