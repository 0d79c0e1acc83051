"""Saves a posterior again and again in processes that are killed, and prints what is on disk after each, as JSON lines.

`python saves.py DIRECTORY KILLS SEED`. It runs as a program of its own, because processes are forked: a fork has what
was imported and fitted, so a kill costs a tenth of a second.
"""

import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import bnnlaplace

PRECISIONS = (1.0, 4.0)


def fitted() -> bnnlaplace.Laplace:
    """A posterior of 512 weights, whose matrix takes a megabyte: long enough to be killed while it is written."""
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(64, 8)), jnp.float32)
    x = np.random.default_rng(1).normal(size=(20, 64)).astype(np.float32)
    network = bnnlaplace.Network.from_function(lambda w, x: jnp.tanh(x @ w), weights)
    return bnnlaplace.Laplace(network, "regression", hessian_structure="full").fit((x, x[:, :8]))


def save_forever(path: Path, posteriors: list[bnnlaplace.Laplace]) -> None:
    """Replace one posterior by the other until the process is killed."""
    while True:
        for la in posteriors:
            la.save(path)


def outcome(path: Path, la: bnnlaplace.Laplace) -> str:
    """What a load finds: one of the posteriors in whole and nothing else, or which fault."""
    try:
        again = bnnlaplace.Laplace.load(path, la.network)
    except Exception as error:
        return f"lost: {type(error).__name__}: {error}"
    if again.prior_precision not in PRECISIONS or not np.array_equal(again.structure.matrix, la.structure.matrix):
        return "silent: the numbers are those of neither"
    if (names := os.listdir(path.parent)) != [path.name]:
        return f"lost: the load left {names}"
    return "same"


def main(directory: str, kills: int, seed: int) -> None:
    """Kill `kills` processes at random times after they have begun to save."""
    warnings.simplefilter("ignore")  # JAX warns of forks; these compute nothing
    chance, path = random.Random(seed), Path(directory) / "posterior"
    la = fitted()
    posteriors = [la.with_prior_precision(precision) for precision in PRECISIONS]
    posteriors[0].save(path)
    for _ in range(kills):
        savers = []
        for _ in range(chance.choice((1, 1, 2))):  # also two at once
            process = os.fork()
            if process == 0:
                save_forever(path, posteriors)
            savers.append(process)
        time.sleep(chance.uniform(0.005, 0.1))
        for process in savers:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        print(json.dumps(outcome(path, la)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
