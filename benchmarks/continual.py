"""How far are sums of Kronecker products over tasks from what they stand for, by four approximations?

    python benchmarks/continual.py [--tasks 4] [--steps 1500] [--small]

A network of 1,042 weights is trained on digits of half the resolution, one task after another, each with the sum of the
Kronecker-factored blocks of all earlier tasks as its prior. "permuted": the pixels are permuted for each task. "split":
each task has two of the digits. For both kernels the sum of the blocks and of the prior precision 1 is a matrix, with
which NumPy compares in float64:

    added factors        sum A_t kron sum B_t, with A_t and B_t of equal norm (as Ritter et al. 2018)
    partial traces       those of the sum of products, divided by its trace
    corrected            the eigenvectors of those, with the diagonal of the sum in them (as George et al. 2018)
    whitened             the root of `bnnlaplace.structure.block_sum`, which is what `fit(prior=la)` uses

Prints for each number of tasks how far log det(I + K / delta) is off, in nats, and the posterior variances of the
network's outputs over those of the sum: the mean of their logarithm, its root mean square and its largest size. Writes
`benchmarks/results/continual.json`. About three minutes on 2 cores. `--small` only shows that everything runs.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from record import Results, console, record_name, write
from rich.table import Table
from sklearn.datasets import load_digits

import bnnlaplace
from bnnlaplace.structure.block_sum import BlockSum, root_of, whitened

PIXELS, WIDTH, CLASSES, EXAMPLES, DELTA = 32, 24, 10, 350, 1.0
Matrix = np.ndarray


def outputs(weights: dict[str, jax.Array], x: jax.Array) -> jax.Array:
    """A perceptron."""
    return jnp.tanh(x @ weights["w1"] + weights["b1"]) @ weights["w2"] + weights["b2"]


def tasks_of(name: str, count: int) -> list[tuple[Matrix, Matrix]]:
    """Inputs and labels of each task."""
    rng = np.random.default_rng(0)
    images, labels = load_digits(return_X_y=True)
    x = (images / 16).reshape(-1, 8, 4, 2).mean(3).reshape(-1, PIXELS).astype(np.float32)
    if name == "split":
        chosen = [np.flatnonzero(labels // 2 == task)[:EXAMPLES] for task in range(count)]
        return [(x[rows], labels[rows]) for rows in chosen]
    starts = range(0, count * EXAMPLES, EXAMPLES)
    return [(x[at : at + EXAMPLES, rng.permutation(PIXELS)], labels[at : at + EXAMPLES]) for at in starts]


def blocks_of(tasks: list[tuple[Matrix, Matrix]], steps: int) -> tuple[Any, dict[str, jax.Array]]:
    """The Kronecker-factored curvature of each task alone, at its own weights, and the last weights."""
    rng = np.random.default_rng(1)
    shapes = {"w1": (PIXELS, WIDTH), "b1": (WIDTH,), "w2": (WIDTH, CLASSES), "b2": (CLASSES,)}
    weights = {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))
    found, before = [], None
    for x, y in tasks:

        def loss(weights: Any, x: Matrix = x, y: Matrix = y, before: Any = before) -> jax.Array:
            fit = optax.softmax_cross_entropy_with_integer_labels(outputs(weights, x), y).sum()
            zero = 0.5 * DELTA * optax.tree.norm(weights, squared=True)
            return fit + (zero if before is None else -before.log_density(weights))

        def step(carry: Any, _: None, loss: Callable = loss) -> tuple[Any, None]:
            weights, state = carry
            updates, state = optimizer.update(jax.grad(loss)(weights), state)
            return (optax.apply_updates(weights, updates), state), None

        run = jax.jit(
            lambda weights, step=step: jax.lax.scan(step, (weights, optimizer.init(weights)), length=steps)[0][0]
        )
        weights = run(weights)
        network = bnnlaplace.Network.from_function(outputs, weights)
        alone = bnnlaplace.Laplace(network, hessian_structure="kron")
        found.append(alone.fit((x, y)).structure.blocks)
        before = alone.fit((x, y), prior=before)
    return found, weights


def sides(block: Any) -> tuple[Matrix, Matrix]:
    """Both factors of a block, as matrices in float64."""
    rows, row_vectors, columns, column_vectors = (np.asarray(leaf, np.float64) for leaf in block)
    return (row_vectors * rows.ravel()) @ row_vectors.T, (column_vectors * columns.ravel()) @ column_vectors.T


def approximations(blocks: list[Any]) -> dict[str, Matrix]:
    """K + delta I as each of them has it, with the exact one as "sum"."""
    factors = [sides(block) for block in blocks]
    identity = np.eye(blocks[0].size)
    traces = [(np.trace(a), np.trace(b)) for a, b in factors]
    norms = [(np.linalg.norm(a), np.linalg.norm(b)) for a, b in factors]
    rows = sum(a * of_b for (a, _), (_, of_b) in zip(factors, traces, strict=True))
    columns = sum(b * of_a for (_, b), (of_a, _) in zip(factors, traces, strict=True))
    row_vectors, column_vectors = np.linalg.eigh(rows)[1], np.linalg.eigh(columns)[1]
    basis = np.kron(row_vectors, column_vectors)
    diagonal = sum(
        np.outer(*(np.einsum("ij,ik,kj->j", v, m, v) for v, m in ((row_vectors, a), (column_vectors, b))))
        for a, b in factors
    )
    added = (
        sum(m / n[side] * (n[0] * n[1]) ** 0.5 for m, n in zip(ms, norms, strict=True))
        for side, ms in enumerate(zip(*factors, strict=True))
    )
    exact = BlockSum([type(block)(*(np.asarray(leaf, np.float64) for leaf in block)) for block in blocks])
    inverse_root = whitened(root_of(exact, DELTA), identity)
    return {
        "sum": sum(np.kron(a, b) for a, b in factors) + DELTA * identity,
        "added factors": np.kron(*added) + DELTA * identity,
        "partial traces": np.kron(rows, columns) / np.trace(rows) + DELTA * identity,
        "corrected": (basis * diagonal.ravel()) @ basis.T + DELTA * identity,
        "whitened": np.linalg.inv(inverse_root @ inverse_root.T),
    }


def compare(blocks: list[Any], rows: Matrix) -> Results:
    """The errors of each approximation of one kernel's block."""
    found = approximations(blocks)

    def numbers(matrix: Matrix) -> tuple[float, Matrix]:
        variances = np.einsum("ni,ni->n", rows @ np.linalg.inv(matrix), rows)
        return np.linalg.slogdet(matrix / DELTA)[1], np.log(variances)

    log_determinant, variances = numbers(found.pop("sum"))
    errors: Results = {}
    for name, matrix in found.items():
        determinant, found_variances = numbers(matrix)
        ratio = found_variances - variances
        errors[name] = {
            "log_determinant": float(log_determinant),
            "error": float(determinant - log_determinant),
            "mean": float(ratio.mean()),
            "root_mean_square": float(np.sqrt((ratio**2).mean())),
            "largest": float(np.abs(ratio).max()),
        }
    return errors


def study(name: str, count: int, steps: int) -> dict[str, Results]:
    """Train on the tasks, compare and print."""
    tasks = tasks_of(name, count)
    found, weights = blocks_of(tasks, steps)
    inputs = np.concatenate([x[:30] for x, _ in tasks])
    jacobian = jax.jacrev(outputs)(weights, inputs)
    table = Table("kernel", "tasks", "approximation", "log det", "error", "mean", "rms", "largest", title=name)
    results = {}
    for kernel, leaf in (("w1", 2), ("w2", 3)):
        rows = np.asarray(jacobian[kernel], np.float64).reshape(len(inputs) * CLASSES, -1)
        for seen in range(2, count + 1):
            errors = results[f"{kernel}, {seen} tasks"] = compare([blocks[leaf] for blocks in found[:seen]], rows)
            for approximation, numbers in errors.items():
                columns = (
                    f"{number:.1f}" if key in ("log_determinant", "error") else f"{number:.3f}"
                    for key, number in numbers.items()
                )
                table.add_row(kernel, str(seen), approximation, *columns)
    console.print(table)
    return results


def main(tasks: int = 4, steps: int = 1500, small: bool = False) -> None:
    """Run both sequences of tasks, print and write.

    Args:
        tasks: How many tasks; at most five.
        steps: Training steps of each.
        small: Two tasks and few steps, to see that everything runs.
    """
    options = dict(locals())
    if small:
        tasks, steps = 2, 20
    results = {name: study(name, tasks, steps) for name in ("permuted", "split")}
    write(record_name("continual", main, options), {"options": options, "tasks": results})


if __name__ == "__main__":
    tyro.cli(main)
