"""How many GGN products does a posterior sample cost: one block decomposition, or one Lanczos run per probe?

    python benchmarks/block_krylov.py checkpoints/van_digits [--probes 1 4 16 64] [--max-vectors 1024]

Uses the network of a finished run with all its training images, at the prior precision that maximises the evidence.
Both decompositions grow until the bound on the relative error of a sample is met; a run for each probe is a block of
one. Prints a table and writes `benchmarks/results/block_krylov_RUN.json`; the name of the record holds every option
that is not the default. About five minutes on 2 cores.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import tyro
from jax import Array
from record import console, record_name, write
from rich.table import Table

from bnnlaplace import categorical, krylov
from bnnlaplace.core.tree import size
from bnnlaplace.curvature import streamed
from bnnlaplace.structure import KrylovStructure
from training import posteriors
from training.data.load import load
from training.models import van
from training.train.checkpoints import load_trained
from training.workdir import load_saved_config

TOLERANCE, SAMPLES = 0.05, 64


def main(
    workdir: tyro.conf.Positional[Path], probes: tuple[int, ...] = (1, 4, 16, 64), max_vectors: int = 1024
) -> None:
    """Grow each decomposition, print and write.

    Args:
        workdir: The directory of the run.
        probes: Numbers of probes in a block.
        max_vectors: Number of vectors at which a decomposition ends if it has not converged; its row then says so.
    """
    options = dict(locals())
    config = load_saved_config(workdir)
    data = load(config.data)
    trained = load_trained(workdir)
    module = van.from_config(config, len(data.class_names))
    network = posteriors.make_network(module, trained.params, trained.batch_stats)
    precision = posteriors.load(workdir, network)["Lanczos"].evidence_optimum().prior_precision
    product = streamed.operator(network, categorical(), tuple(data.train), side="primal").matvec

    table = Table(
        "probes in a block", "products a block", f"products for {SAMPLES} samples", "seconds", title_justify="left"
    )
    table.title = f"{workdir.name}: prior precision {precision:.3g}, relative error of a sample at most {TOLERANCE}"
    rows = []
    for count in probes:
        runs = [
            grow(product, size(network.params), count, max_vectors, precision, seed)
            for seed in range(3 if count == 1 else 1)
        ]
        products = float(np.mean([run.products for run in runs]))
        seconds = float(np.mean([run.seconds for run in runs]))
        blocks, converged = SAMPLES / count, all(run.converged for run in runs)
        row = {"probes": count, "products": products * blocks, "seconds": seconds * blocks, "converged": converged}
        rows.append(row)
        more = "" if converged else "more than "
        cells = f"{products:.0f}", f"{products * blocks:.0f}", f"{seconds * blocks:.1f}"
        table.add_row(str(count), *(more + cell for cell in cells))
    console.print(table)
    content = {"options": options, "prior_precision": precision, "rows": rows}
    write(record_name("block_krylov", main, options), content)


class Growth(NamedTuple):
    """Products and seconds until the samples converged or `max_vectors` was reached, without compilation."""

    products: int
    seconds: float
    converged: bool


def grow(
    product: Callable[[Array], Array], dimension: int, probes: int, max_vectors: int, precision: float, seed: int
) -> Growth:
    """Grow a decomposition from `probes` normal probes until the bound on the error of a sample is small."""
    rows = jax.random.normal(jax.random.key(seed), (probes, dimension))
    jax.block_until_ready(product(rows))
    start, converged = time.perf_counter(), False
    for decomposition in krylov.block_lanczos(product, rows, max_vectors=max_vectors):
        count = len(decomposition.tridiagonal)
        # The bound costs little, but not nothing beside one product of one vector, so it is not computed each time.
        if count % 16 == 0:
            converged = KrylovStructure.from_decomposition(decomposition).error(precision).sample <= TOLERANCE
        if converged:
            break
    return Growth(count, time.perf_counter() - start, bool(converged))


if __name__ == "__main__":
    tyro.cli(main)
