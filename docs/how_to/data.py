"""Fit data larger than memory.

`fit` takes arrays, or an object that gives batches every time it is iterated over. One batch is in memory at a time. If
only some weights have a posterior, the features that precede them are kept as well, in at most a quarter of the free
memory. Inputs may be pytrees.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bnnlaplace
from bnnlaplace import krylov

# %% Inputs of several parts
# `x` may be any pytree of arrays with examples along the leading axis. Here it holds images and a number for each
# image. The network takes the pytree. A Linen or NNX module of several inputs takes them in a tuple,
# `fit(((images, ages), y))`, or in a dictionary by the names of its parameters. Arrays may come from any library that
# has `__array__` or DLPack, such as tensors of PyTorch or tables of pandas.

rng = np.random.default_rng(0)
NUM = 1200
x = {
    "image": rng.normal(size=(NUM, 4, 4)).astype(np.float32),
    "age": rng.uniform(-1, 1, (NUM, 1)).astype(np.float32),
}
y = (x["image"].mean(axis=(1, 2)) + 0.3 * x["age"][:, 0] > 0).astype(np.int32)


def logits(params, x):
    features = jnp.concatenate([x["image"].reshape(len(x["age"]), -1), x["age"]], axis=1)
    return jnp.tanh(features @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def negative_log_joint(params):
    fit = optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).sum()
    return fit + 0.5 * optax.tree.norm(params, squared=True)


optimizer = optax.adam(optax.cosine_decay_schedule(2e-2, 2000))


def step(carry, _):
    params, state = carry
    updates, state = optimizer.update(jax.grad(negative_log_joint)(params), state)
    return (optax.apply_updates(params, updates), state), None


shapes = {"w1": (17, 16), "b1": (16,), "w2": (16, 2), "b2": (2,)}
params = {name: jnp.asarray(0.3 * rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}
(params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=2000))((params, optimizer.init(params)))
network = bnnlaplace.Network.from_function(logits, params)

# %% Batches from files
# "lanczos" reads the data once for each block of products, about ten times. It needs an object whose `__iter__` begins
# anew at every call: a list of batches, or a data loader that gives pairs `(x, y)` of arrays, without shuffling and
# augmentation. The last batch may be shorter. A function with `yield` gives an iterator, which can be read only once.
# That is enough for "diag", "kron" and "full"; "lanczos" refuses it.
# All data must be in one process: under `jax.distributed` each process would compute the evidence of its own part.

folder = tempfile.TemporaryDirectory()
BATCH = 256
for number, first in enumerate(range(0, NUM, BATCH)):
    rows = slice(first, first + BATCH)
    np.savez(Path(folder.name, f"{number:03d}.npz"), y=y[rows], **{name: array[rows] for name, array in x.items()})


class Files:
    """The batches of a folder, read from disk on every pass."""

    def __init__(self, folder):
        self.folder, self.passes = folder, 0

    def __iter__(self):
        self.passes += 1
        for path in sorted(Path(self.folder).glob("*.npz")):
            with np.load(path) as batch:
                yield {name: batch[name] for name in ("image", "age")}, batch["y"]


files = Files(folder.name)
options = {"key": jax.random.key(0), "max_vectors": 256, "num_probes": 16}
streamed, at_once = (
    bnnlaplace.Laplace(network, hessian_structure="lanczos").fit(data, **options).optimize_prior_precision()
    for data in (files, (x, y))
)
difference = streamed.log_marginal_likelihood().mean - at_once.log_marginal_likelihood().mean
print(f"{files.passes} passes; largest difference to the evidence from one array {abs(difference):.1g} nats")

diagonal = bnnlaplace.Laplace(network, hessian_structure="diag").fit(batch for batch in files)
print(f"diagonal from an iterator: log evidence {diagonal.log_marginal_likelihood().mean:.1f} nats")

# %% A part of the data
# A random part of the data gives a cheaper estimate of the whole curvature. With `num_data`, the size of the whole
# training set, likelihood and curvature are scaled to it. No standard error includes the error of this sampling.

half = rng.choice(NUM, 600, replace=False)
of_half = bnnlaplace.Laplace(network, hessian_structure="diag")
of_half = of_half.fit((jax.tree.map(lambda leaf: leaf[half], x), y[half]), num_data=NUM)
print(f"half of the data: log evidence {of_half.log_marginal_likelihood().mean:.1f} nats")

# %% Weights of examples
# A third array says how many times each example counts. The posterior and the evidence are those of data in which
# example n stands w_n times: integers are the same as repeated rows, 0 means absent, and fractions lie in between.
# Batches may be such triples too. With `num_data` the sum of the weights takes the place of the number of examples.

weights = np.where(y == 1, 2.0, 1.0)
of_weighted = bnnlaplace.Laplace(network, hessian_structure="diag").fit((x, y, weights))
rows = np.repeat(np.arange(NUM), weights.astype(int))
of_repeated = bnnlaplace.Laplace(network, hessian_structure="diag")
of_repeated = of_repeated.fit((jax.tree.map(lambda leaf: leaf[rows], x), y[rows]))
evidences = [float(la.log_marginal_likelihood().mean) for la in (of_weighted, of_repeated)]
print(f"with weights: log evidence {evidences[0]:.1f} nats; with repeated rows: {evidences[1]:.1f} nats")
np.testing.assert_allclose(*evidences, rtol=1e-4)

# %% Products alone
# `curvature.streamed_operator` gives products with the GGN of such data, or with its dual, whichever is smaller. Use
# them for eigenvalues by `scipy.sparse.linalg`, or for a trace by `krylov.block_lanczos`, here $\log\det(I + G / 10)$.

operator = bnnlaplace.curvature.streamed_operator(network, bnnlaplace.categorical(), files, prior_precision=10.0)
probes = krylov.normal_probes(jax.random.key(1), jnp.ones(operator.size), 16)
*_, decomposition = krylov.block_lanczos(operator.matvec, probes, max_vectors=128)
forms = krylov.trace_forms(krylov.ritz(decomposition), np.log1p)
print(f"log det of {operator.size} weights: {forms.mean():.1f} +- {forms.std(ddof=1) / len(forms) ** 0.5:.1f} nats")

# %% How much memory
# Beside a batch, memory holds the curvature and the activations of a microbatch (`fit(microbatch=...)`).
# `memory_estimate` says what the curvature takes before anything is computed. If that is more than the device has free,
# `fit` raises `MemoryError` and says which options need less.

wide = {"w1": jnp.zeros((17, 20_000)), "b1": jnp.zeros(20_000), "w2": jnp.zeros((20_000, 2)), "b2": jnp.zeros(2)}
needed = {}
for structure in ("diag", "kron", "lanczos", "full"):
    la = bnnlaplace.Laplace(bnnlaplace.Network.from_function(logits, wide), hessian_structure=structure)
    estimate = la.memory_estimate(files)
    needed[structure] = estimate.needed
    print(f"{structure:8s} {estimate.needed / 1e9:10.3f} GB; {estimate.shrink}")

# %% Predictions
# `predictive` takes as many inputs as fit in memory. For more inputs call it batch by batch.

probs = np.concatenate([streamed.predictive(inputs) for inputs, _ in files])
print(f"accuracy {np.mean(probs.argmax(axis=1) == y):.3f} on the training data")

folder.cleanup()
assert isinstance(streamed.structure, bnnlaplace.structure.KrylovStructure)
assert abs(difference) < 0.1
assert abs(of_half.log_marginal_likelihood().mean / diagonal.log_marginal_likelihood().mean - 1) < 0.1
assert needed["diag"] < needed["lanczos"] < needed["full"]
