"""How far are Kronecker factors from the GGN where an example uses a weight several times?

    python benchmarks/kronecker.py [--models cnn vit language-model bilstm bilstm-tagger] [--steps 800] [--small]

Four small networks are trained to a mode at prior precision 1, in double precision: a convolutional network whose
outputs are pooled, a vision transformer, a language model whose table of embeddings is also its output layer, and a
BiLSTM by scan with one output for each sequence or for each position. The three choices of
`curvature.kronecker_factors(shared_weights=...)` stand beside the exact blocks of all leaves and beside the whole GGN,
which NumPy computes from dense Jacobians.

Prints a table for each network and writes `benchmarks/results/kronecker.json`: the log evidence, and the variance of
outputs at other inputs, divided by that of the exact blocks and by that of the whole GGN (medians). About two minutes
on 2 cores. `--small` only shows that everything runs.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from record import Results, console, record_name, write
from rich.table import Table

import bnnlaplace
from bnnlaplace.core.tree import ravel
from bnnlaplace.curvature import jacobian, kronecker, tapped
from bnnlaplace.curvature.dense import factor_rows
from bnnlaplace.structure import KroneckerStructure

Model = Literal["cnn", "vit", "language-model", "bilstm", "bilstm-tagger"]
TRAIN, TEST, CLASSES, WIDTH = 60, 10, 4, 12
PRECISIONS = (1.0, 10.0)


class Convolutional(nn.Module):
    """Two convolutions and the mean over pixels."""

    @nn.compact
    def __call__(self, x):
        x = nn.avg_pool(nn.relu(nn.Conv(6, (3, 3))(x)), (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (3, 3))(x)).mean(axis=(1, 2))
        return nn.Dense(CLASSES)(x)


class Block(nn.Module):
    """Attention and a perceptron, each after a normalisation."""

    @nn.compact
    def __call__(self, x, mask=None):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(2)(y, y, mask=mask)
        y = nn.LayerNorm()(x)
        return x + nn.Dense(WIDTH)(nn.gelu(nn.Dense(2 * WIDTH)(y)))


class VisionTransformer(nn.Module):
    """Patches of 2 x 2, two blocks, and the mean over patches."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(WIDTH, (2, 2), strides=2)(x).reshape(len(x), -1, WIDTH)
        x = x + self.param("position", nn.initializers.normal(0.02), x.shape[1:])
        for _ in range(2):
            x = Block()(x)
        return nn.Dense(CLASSES)(nn.LayerNorm()(x).mean(axis=1))


class LanguageModel(nn.Module):
    """One block with a causal mask; the table of embeddings gives the logits, too."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(CLASSES * 3, WIDTH)
        x = embed(tokens) + self.param("position", nn.initializers.normal(0.02), (tokens.shape[1], WIDTH))
        return embed.attend(nn.LayerNorm()(Block()(x, nn.make_causal_mask(tokens))))


class BiLSTM(nn.Module):
    """Two scans over time, with the mean over time at the end or without it."""

    pooled: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(CLASSES * 3, WIDTH)(tokens)
        cells = [nn.OptimizedLSTMCell(WIDTH, param_dtype=x.dtype) for _ in range(2)]
        x = nn.Bidirectional(*(nn.RNN(cell) for cell in cells))(x)
        return nn.Dense(CLASSES)(x.mean(axis=1) if self.pooled else x)


class Problem(NamedTuple):
    """A network at a mode, its training data, and inputs to predict at."""

    network: bnnlaplace.Network
    inputs: jax.Array
    targets: np.ndarray
    test: jax.Array


def data(model: Model) -> tuple[np.ndarray, np.ndarray]:
    """Draw inputs, and labels that depend on them."""
    rng = np.random.default_rng(0)
    if model in ("cnn", "vit"):
        x = rng.normal(size=(TRAIN + TEST, 6, 6, 2))
        features = np.concatenate([np.abs(x).mean(axis=(1, 2)), 3 * x.mean(axis=(1, 2))], axis=1)
        return x, (features @ rng.normal(size=(4, CLASSES))).argmax(axis=1)
    if model == "language-model":
        chances = rng.dirichlet(0.3 * np.ones(3 * CLASSES), size=3 * CLASSES)
        x = rng.integers(0, 3 * CLASSES, size=(TRAIN + TEST, 9))
        for place in range(8):
            x[:, place + 1] = [rng.choice(3 * CLASSES, p=chances[token]) for token in x[:, place]]
        return x[:, :-1], x[:, 1:]
    x = rng.integers(0, 3 * CLASSES, size=(TRAIN + TEST, 7))
    return x, (x[:, 0] % CLASSES if model == "bilstm" else (x + np.roll(x, 1, axis=1)) % CLASSES)


def problem(model: Model, steps: int) -> Problem:
    """Train a network by Adam on its log joint."""
    modules = {"cnn": Convolutional(), "vit": VisionTransformer(), "language-model": LanguageModel()}
    module = modules.get(model) or BiLSTM(model == "bilstm")
    x, y = data(model)
    variables = module.init(jax.random.key(0), x[:1])
    vector, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables))

    def loss(vector):
        return -log_likelihood(module.apply(unravel(vector), x[:TRAIN]), y[:TRAIN]) + 0.5 * vector @ vector

    optimiser = optax.adam(optax.cosine_decay_schedule(2e-2, steps))

    def step(carry, _):
        updates, state = optimiser.update(jax.grad(loss)(carry[0]), carry[1])
        return (carry[0] + updates, state), None

    (vector, _), _ = jax.lax.scan(step, (vector, optimiser.init(vector)), length=steps)
    network = bnnlaplace.Network.from_linen(module, unravel(vector))
    return Problem(network, jnp.asarray(x[:TRAIN]), y[:TRAIN], jnp.asarray(x[TRAIN:]))


def log_likelihood(outputs: jax.Array, targets: np.ndarray) -> jax.Array:
    """log p(y | f), summed over examples and positions."""
    return jnp.sum(jnp.take_along_axis(jax.nn.log_softmax(outputs), targets[..., None], axis=-1))


class Answer(NamedTuple):
    """log det(I + G / delta), and the variance of each output at the test inputs."""

    log_determinant: float
    variance: np.ndarray


def by_matrices(blocks: list[np.ndarray], rows: np.ndarray, delta: float) -> Answer:
    """The answer of a block-diagonal G, by NumPy alone."""
    log_determinant, variance, start = 0.0, 0.0, 0
    for block in blocks:
        values, vectors = np.linalg.eigh(block)
        log_determinant += np.log1p(np.maximum(values, 0) / delta).sum()
        part = rows[..., start : start + len(block)] @ vectors
        variance = variance + (part**2 / (np.maximum(values, 0) + delta)).sum(axis=-1)
        start += len(block)
    return Answer(log_determinant, variance)


def by_structure(structure: KroneckerStructure, found: jacobian.Jacobian, delta: float) -> Answer:
    """The answer of Kronecker factors, by the package."""
    covariance = np.asarray(structure.output_covariance([delta])(found))[0, :, 0]
    return Answer(float(structure.log_determinant(delta)[0]), np.diagonal(covariance, axis1=-2, axis2=-1))


def study(model: Model, steps: int) -> Results:
    """Compare all choices on one network."""
    network, inputs, targets, test = problem(model, steps)
    likelihood, params = bnnlaplace.categorical(), network.params
    rows = np.asarray(jax.jit(partial(factor_rows, network, likelihood, params))(inputs, jnp.ones(TRAIN)))
    sizes = [leaf.size for leaf in jax.tree.leaves(params)]
    blocks = [part.T @ part for part in np.split(rows, np.cumsum(sizes)[:-1], axis=1)]

    def test_jacobian(test):
        passed = tapped.forward(network, params, test)
        return jacobian.jacobian(passed, np.arange(passed.outputs[0].size)[None])

    of_test = jax.jit(test_jacobian)(test)
    test_rows = np.asarray(of_test.rows())[:, 0]

    def structure(shared_weights):
        options = {"microbatch": 20, "shared_weights": shared_weights}
        return KroneckerStructure.fit(kronecker.factors(network, likelihood, params, inputs, **options))

    choices = get_args(kronecker.SharedWeights)
    structures = {choice: jax.jit(structure, static_argnums=0)(choice) for choice in choices}
    answers: dict[str, Callable[[float], Answer]] = {
        "whole GGN": partial(by_matrices, [rows.T @ rows], test_rows),
        "exact blocks": partial(by_matrices, blocks, test_rows),
        **{choice: partial(by_structure, structures[choice], of_test) for choice in choices},
    }
    vector = ravel(params)
    results: Results = {}
    table = Table("delta", "curvature", "log evidence", "variance / exact blocks", "variance / whole GGN")
    table.title, table.title_justify = f"{model}, {len(vector)} weights", "left"
    for delta in PRECISIONS:
        log_joint = float(log_likelihood(network(params, inputs), targets) - delta / 2 * vector @ vector)
        found = {name: answer(delta) for name, answer in answers.items()}
        for name, (log_determinant, variance) in found.items():
            ratios = [np.median(variance / found[other].variance) for other in ("exact blocks", "whole GGN")]
            evidence = log_joint - log_determinant / 2
            results[f"delta {delta:g}, {name}"] = {
                "evidence": evidence,
                "variance_to_exact_blocks": float(ratios[0]),
                "variance_to_whole": float(ratios[1]),
            }
            table.add_row(f"{delta:g}", name, f"{evidence:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    return results


def main(models: tuple[Model, ...] = get_args(Model), steps: int = 800, small: bool = False) -> None:
    """Run the networks, print and write.

    Args:
        models: Which networks.
        steps: Training steps of each.
        small: One network and few steps, to see that everything runs.
    """
    options = dict(locals())
    jax.config.update("jax_enable_x64", True)
    if small:
        models, steps = models[:1], 20
    answers = {model: study(model, steps) for model in models}
    write(record_name("kronecker", main, options), {"options": options, "models": answers})


if __name__ == "__main__":
    tyro.cli(main)
