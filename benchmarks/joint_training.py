"""What does it cost to train weights and prior by the evidence?

    python benchmarks/joint_training.py [--matvecs 10] [--probes 1] [--every 20] [--small]

Steps of the digits VAN at a batch of 32 images, with as many images of curvature: a plain step; products with the GGN,
linearised once; an evidence step of "joint" by the Lanczos adjoint, by the quadrature gradient, and with the diagonal;
and the update of the prior of "online". Then what a step costs on average if the gradient of the log-determinant is
held for `--every` steps, as a run does. Prints a table and writes `benchmarks/results/joint_training.json`. About five
minutes on 2 cores, most of them to compile; `--small` takes a tiny network.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from record import compile_ahead, judge, measure, record_name, show, write

from bnnlaplace import Network, categorical
from bnnlaplace.core.tree import size
from bnnlaplace.curvature.ggn import ggn_operator
from bnnlaplace.curvature.linearisation import linearise
from bnnlaplace.marglik import EvidenceOptions, prior_update
from bnnlaplace.marglik.objective import half_log_determinant
from training.config import Optimizer, Prior
from training.models.van import VAN, VARIANTS, VANVariant
from training.train.batches import Plan
from training.train.objective import make_passes
from training.train.step import initial_state, make_steps

TINY = VANVariant((2,), (1,), (1,), 3, 2, (4, 4, 1))
NUM_DATA, CLASSES, PRODUCTS = 1257, 10, 10


def cases(variant: VANVariant, batch: int, matvecs: int, probes: int) -> tuple[dict[str, Any], int]:
    """Compile every case; return them with the number of weights."""
    module = VAN.from_variant(variant, CLASSES)
    images = jax.random.normal(jax.random.key(0), (batch, *variant.image_shape))
    labels, key = jnp.arange(batch) % CLASSES, jax.random.key(1)
    passes = make_passes(module)
    params, batch_stats = passes.initialise(jax.random.key(2), images[:1])
    prior, optimizer = Prior(update="joint"), Optimizer(batch_size=batch)
    steps = make_steps(passes, optimizer, Plan(NUM_DATA, batch, 40, 45), prior)
    state = initial_state(params, batch_stats, optimizer, prior)
    network = Network.from_linen(module, {"params": params, "batch_stats": batch_stats}, train=False)
    model = {"likelihood": categorical(), "num_data": NUM_DATA}

    def products(network: Network, images: Any, vector: Any) -> Any:
        linearised = linearise(network, network.params, images)
        matvec = ggn_operator(linearised, categorical(), scale=NUM_DATA / batch).matvec
        return jax.lax.fori_loop(0, PRODUCTS, lambda _, v: matvec(v) / jnp.linalg.norm(v), vector)

    def gradient(network: Network, log: Any, images: Any, labels: Any, key: Any, options: EvidenceOptions) -> Any:
        def half(params: Any, log: Any) -> Any:
            own = {"network": network, "options": options}
            return half_log_determinant(params, log, (images, labels), key, **model, **own)

        return jax.value_and_grad(half, (0, 1), has_aux=True)(network.params, log)

    def online(network: Network, log: Any, images: Any, labels: Any, key: Any, options: EvidenceOptions) -> Any:
        own = {"network": network, "options": options}
        return prior_update(network.params, log, (images, labels), key, **model, **own)

    log, data = jnp.float32(0), (images, labels, key)
    adjoint = EvidenceOptions("lanczos", matvecs, probes)
    options = {
        "joint, Lanczos adjoint": (gradient, adjoint),
        "joint, Lanczos quadrature": (gradient, adjoint._replace(gradient="quadrature")),
        "joint, diagonal": (gradient, EvidenceOptions("diag")),
        "online, Lanczos": (online, adjoint),
    }
    compiled = {
        "plain step": compile_ahead(steps.train, state, images, labels, key),
        f"{PRODUCTS} products": compile_ahead(jax.jit(products), network, images, jnp.ones(size(params))),
    }
    for name, (function, how) in options.items():
        compiled[name] = compile_ahead(jax.jit(partial(function, options=how)), network, log, *data)
    return compiled, size(params)


def main(matvecs: int = 10, probes: int = 1, every: int = 20, batch: int = 32, small: bool = False) -> None:
    """Measure, print and write.

    Args:
        matvecs: Products for each probe.
        probes: Probes of the log-determinant.
        every: Steps for which a gradient of the log-determinant is held.
        batch: Images of a batch and of the curvature.
        small: A tiny network and one repetition, to see that everything runs.
    """
    options = dict(locals())
    variant, images = (TINY, 4) if small else (VARIANTS["digits"], batch)
    compiled, num_weights = cases(variant, images, matvecs, probes)
    results = measure(compiled, 1 if small else 9)
    show(f"{num_weights:,} weights, {images} images, {matvecs} products, {probes} probes", results)
    plain = results["plain step"]["seconds"]
    relative = {name: case["seconds"] / plain for name, case in results.items()}
    # The minimum over rounds is what the work takes if nothing else runs on the machine.
    fastest = {name: float(np.min(case["rounds"])) for name, case in results.items()}
    relative_fastest = {name: value / fastest["plain step"] for name, value in fastest.items()}
    steps = {name: 1 + ratio for name, ratio in relative.items() if name.startswith("joint")}
    held = {name: 1 + relative[name] / every for name in steps}
    targets = judge(
        {f"{name}: an evidence step over a plain one": (value, 4.0) for name, value in steps.items()}
        | {f"{name}: a step on average, held for {every}": (value, 4.0) for name, value in held.items()}
    )
    content = {"options": options, "num_weights": num_weights, "cases": results, "targets": targets}
    content |= {"over_a_plain_step": relative, "fastest_over_a_plain_step": relative_fastest}
    write(record_name("joint_training", main, options), content)


if __name__ == "__main__":
    tyro.cli(main)
