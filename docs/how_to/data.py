"""Fit data larger than memory.

`fit` takes arrays, or anything that gives batches every time it is iterated over. Of those one batch is in memory at a
time; where only some weights have a posterior, the features that precede them are kept as well, if they take less than
a quarter of the free memory. Inputs may be pytrees.
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
# x may be any pytree of arrays with examples along the leading axis: here images and a number for each of them. The
# network takes the pytree.

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
# An object whose `__iter__` begins anew at every call: "lanczos" reads the data once for each block of products, about
# ten times. A list of batches is such an object, and so is a data loader that gives pairs (x, y) of arrays, without
# shuffling and augmentation. The last batch may be shorter. A function with `yield` gives an iterator, which can be
# read once only: that is enough for "diag", "kron" and "full", and refused by "lanczos".

folder = tempfile.TemporaryDirectory()
BATCH = 256
for number, first in enumerate(range(0, NUM, BATCH)):
    rows = slice(first, first + BATCH)
    np.savez(Path(folder.name, f"{number:03d}.npz"), y=y[rows], **{name: part[rows] for name, part in x.items()})


class Files:
    """Batches of a folder, read from disk each time they are asked for."""

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
# A random part of the data gives an estimate of the whole curvature, for less: with `num_data`, the size of the whole
# training set, likelihood and curvature are scaled to it. The error of the part is in no standard error.

part = rng.choice(NUM, 600, replace=False)
some = bnnlaplace.Laplace(network, hessian_structure="diag")
some = some.fit((jax.tree.map(lambda leaf: leaf[part], x), y[part]), num_data=NUM)
print(f"half of the data: log evidence {some.log_marginal_likelihood().mean:.1f} nats")

# %% Products alone
# The GGN of such data is also there as products, of weights or of outputs, whichever are fewer: for eigenvalues by
# `scipy.sparse.linalg`, or for a trace by `krylov.block_lanczos`, here log det(I + G / 10).

operator = bnnlaplace.curvature.streamed.operator(network, bnnlaplace.categorical(), files, prior_precision=10.0)
probes = krylov.normal_probes(jax.random.key(1), jnp.ones(operator.size), 16)
*_, decomposition = krylov.block_lanczos(operator.matvec, probes, max_vectors=128)
forms = krylov.trace_forms(krylov.ritz(decomposition), np.log1p)
print(f"log det of {operator.size} weights: {forms.mean():.1f} +- {forms.std(ddof=1) / len(forms) ** 0.5:.1f} nats")

# %% How much memory
# Beside a batch there is the curvature, and the activations of a microbatch (`fit(microbatch=...)`). `memory_estimate`
# says before anything is computed what the curvature takes. `fit` raises `MemoryError` where that is more than the
# device has free, and says which options make it less.

wide = {"w1": jnp.zeros((17, 20_000)), "b1": jnp.zeros(20_000), "w2": jnp.zeros((20_000, 2)), "b2": jnp.zeros(2)}
needed = {}
for structure in ("diag", "kron", "lanczos", "full"):
    la = bnnlaplace.Laplace(bnnlaplace.Network.from_function(logits, wide), hessian_structure=structure)
    estimate = la.memory_estimate(files)
    needed[structure] = estimate.needed
    print(f"{structure:8s} {estimate.needed / 1e9:10.3f} GB; {estimate.shrink}")

# %% Predictions
# `predictive` takes as many inputs as memory has room for; of more of them call it batch by batch.

probs = np.concatenate([streamed.predictive(inputs) for inputs, _ in files])
print(f"accuracy {np.mean(probs.argmax(axis=1) == y):.3f} on the training data")

folder.cleanup()
assert isinstance(streamed.structure, bnnlaplace.structure.KrylovStructure)
assert abs(difference) < 0.1
assert abs(some.log_marginal_likelihood().mean / diagonal.log_marginal_likelihood().mean - 1) < 0.1
assert needed["diag"] < needed["lanczos"] < needed["full"]
