"""How many GGN products does a posterior sample cost: one block decomposition, or one Lanczos run per probe?

    python benchmarks/block_krylov.py checkpoints/van_digits

On the network of a finished run, all training images, at the prior precision that maximises the evidence. Both are
grown until the bound on the relative error of a sample is met; a run per probe is a block of one. Prints a table and
writes `benchmarks/results/block_krylov.json`. About two minutes on 2 cores.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np
from record import write
from rich.console import Console
from rich.table import Table

from bnnlaplace import categorical, krylov
from bnnlaplace.curvature import streamed
from bnnlaplace.structure import KrylovStructure
from bnnlaplace.tree import size
from training import config_io, loop, posteriors
from training.data import load, normalise
from training.models import van

TOLERANCE, SAMPLES = 0.05, 64


def main(workdir: Path) -> None:
    """Grow each decomposition, print and write."""
    console = Console()
    config = config_io.load_saved_config(workdir)
    data = load(config.data)
    trained = loop.load_trained(workdir)
    module = van.from_config(config.model, len(data.class_names))
    network = posteriors.make_network(module, trained.params, trained.batch_stats)
    precision = posteriors.load(workdir, network)["Lanczos"].evidence_optimum().prior_precision
    images = normalise(data.train.images, data.mean, data.std)
    product = streamed.operator(network, categorical(), (images, data.train.labels), side="primal").matvec

    table = Table(
        "probes in a block", "products a block", f"products for {SAMPLES} samples", "seconds", title_justify="left"
    )
    table.title = f"{workdir.name}: prior precision {precision:.3g}, relative error of a sample at most {TOLERANCE}"
    rows = []
    for probes, repetitions in ((1, 3), (4, 1), (16, 1), (64, 1)):
        found = [grow(product, size(network.params), probes, precision, seed) for seed in range(repetitions)]
        products = float(np.mean([count for count, _ in found]))
        seconds = float(np.mean([spent for _, spent in found]))
        blocks = SAMPLES / probes
        rows.append({"probes": probes, "products": products * blocks, "seconds": seconds * blocks})
        table.add_row(str(probes), f"{products:.0f}", f"{products * blocks:.0f}", f"{seconds * blocks:.1f}")
    console.print(table)
    console.print(f"written to {write('block_krylov', {'prior_precision': precision, 'rows': rows})}", highlight=False)


def grow(product, dimension: int, probes: int, precision: float, seed: int) -> tuple[int, float]:
    """Products until the samples have converged, and the seconds that took, compilation excluded."""
    rows = jax.random.normal(jax.random.key(seed), (probes, dimension))
    jax.block_until_ready(product(rows))
    start = time.perf_counter()
    for decomposition in krylov.block_lanczos(product, rows, max_vectors=1024):
        count = len(decomposition.tridiagonal)
        # The bound costs little, but not nothing beside one product of one vector.
        if count % 16 == 0 and KrylovStructure.from_decomposition(decomposition).error(precision).sample <= TOLERANCE:
            break
    return count, time.perf_counter() - start


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
