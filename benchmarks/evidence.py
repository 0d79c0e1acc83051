"""What do the evidence of a VAN and its gradients cost, beside the formulation of the paper's own experiment?

    python benchmarks/evidence.py [--classes 10 1000] [--probes 1] [--rounds 1] [--steps 400] [--no-weights] [--small]

For 50 images, 10 Lanczos steps and a scalar prior precision, on the same network with the same probes:

1. The value with its derivative in the prior precision. Ours needs no product beyond those of the value.
2. The value with the derivatives in the prior precision and in all weights, by the adjoint of Lanczos.
3. The value with its derivatives in one prior precision for each weight. Those of groups are sums of them. The peer
   has no such derivatives.
4. An optimiser that takes many steps in the prior precision: one decomposition serves them all. The peer decomposes in
   each step, so its time is that of 1, times the number of steps: an extrapolation.

The peer is `evidence_paper.py`, the formulation of Krämer et al. 2024 with the adjoint of matfree, `pip install
matfree==0.6.3`; without it its rows are left out. Both see the same VAN with our depthwise convolution, so formulations
are compared and not layers. Weights and images are random. Cases run in turn in one process. Compilation is timed
apart, and memory is that of arguments, results and temporary arrays as XLA lays them out.

Another row has their formulation with all images linearised together, which shows what one image at a time costs them.
Rows "by remat" compute the linearisation of 10 images at a time anew in each product: less memory for more time.
The experiment has 10 probes. The default here is one, because the peer takes minutes for each.

Prints tables and writes `benchmarks/results/evidence.json`; the name of the record holds every option that is not the
default. `--small` only shows that everything runs.
"""

import importlib.metadata
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import evidence_paper
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from record import Program, Results, compile_ahead, console, judge, measure, record_name, show, write

from bnnlaplace import Network, categorical, evidence
from bnnlaplace.core.tree import ravel, size, unraveler
from training.models.van import VAN, VARIANTS, VANVariant

IMAGES, DEPTH = 50, 10
DELTA, BOTH, OF_EACH = "d delta", "d delta and weights", "d delta of each weight"
# The arguments in which each case is differentiated, and the share of the peer's time that it should not exceed.
GRADIENTS, TIMES = {DELTA: 0, BOTH: (0, 1)}, {DELTA: 1 / 3, BOTH: 1 / 1.5}
BATCHED = f"paper, {DELTA}, all images at once"
REMAT, REMAT_MICROBATCH = "ours by remat", 10
STEP_SIZE = 1e-2
TINY = VANVariant((2,), (1,), (1,), 3, 2, (4, 4, 1))


class Setting(NamedTuple):
    """A network, data, probes with one number for each weight, and the depth."""

    network: Network
    images: Array
    labels: Array
    probes: Array
    depth: int


def build(classes: int, probes: int, small: bool) -> Setting:
    """Build the network for 32 x 32 images away from its initialisation, or one that compiles quickly."""
    variant = TINY if small else VARIANTS["cifar"]
    count, depth = (2, 2) if small else (IMAGES, DEPTH)
    module = VAN.from_variant(variant, classes)
    images = jax.random.normal(jax.random.key(0), (count, *variant.image_shape))
    network = Network.from_linen(module, jax.jit(module.init)(jax.random.key(1), images[:1]), train=False)
    # At the initialisation layer scales of 0.01 would hide most of the network.
    weights = ravel(network.params)
    weights = weights + 0.1 * jax.random.normal(jax.random.key(2), weights.shape)
    labels = jax.random.randint(jax.random.key(3), (count,), 0, classes)
    rows = jax.random.rademacher(jax.random.key(4), (probes, len(weights)), jnp.float32)
    return Setting(network.with_params(unraveler(network.params)(weights)), images, labels, rows, depth)


def log_evidence(
    setting: Setting, gradient: str = "adjoint", *, of_each_weight: bool = False, remat: bool = False
) -> Callable[..., Array]:
    """Our map from (log delta, weights, probes, images, labels) to the evidence, with the arguments of the peer."""
    unravel = unraveler(setting.network.params)
    at_a_time = {"microbatch": REMAT_MICROBATCH, "remat": True} if remat else {}

    def value(log_precision: Array, weights: Array, probes: Array, images: Array, labels: Array) -> Array:
        precision = jnp.exp(log_precision)
        return evidence.log_marginal_likelihood(
            unravel(weights),
            jnp.broadcast_to(precision, weights.shape) if of_each_weight else precision,
            (images, labels),
            probes,
            network=setting.network,
            likelihood=categorical(),
            num_matvecs=setting.depth,
            gradient=gradient,
            **at_a_time,
        ).mean

    return value


def many_steps(setting: Setting, steps: int) -> Callable[..., tuple[Array, Array]]:
    """The map from (log delta, ...) to log delta after RMSprop on the evidence, and the evidence before each step."""
    unravel = unraveler(setting.network.params)

    def run(log_precision: Array, weights: Array, probes: Array, images: Array, labels: Array) -> tuple[Array, Array]:
        options = {"network": setting.network, "likelihood": categorical(), "num_matvecs": setting.depth}
        curve = evidence.isotropic(unravel(weights), (images, labels), probes, **options)

        def step(state: tuple[Array, Array], _: None) -> tuple[tuple[Array, Array], Array]:
            position, square = state
            value, slope = jax.value_and_grad(lambda position: curve(jnp.exp(position)).mean)(position)
            square = 0.9 * square + 0.1 * slope**2
            return (position + STEP_SIZE * slope / (jnp.sqrt(square) + 1e-8), square), value

        (last, _), values = jax.lax.scan(step, (log_precision, jnp.zeros_like(log_precision)), length=steps)
        return last, values

    return run


def programs(setting: Setting, steps: int, gradients: Sequence[str]) -> dict[str, Program]:
    """Compile all cases, with those of `GRADIENTS` that are named."""
    network, images, labels, probes, _ = setting
    start = jnp.zeros(()), ravel(network.params), probes, images
    ours = {
        "ours, value": log_evidence(setting),
        f"ours, {OF_EACH}": jax.value_and_grad(log_evidence(setting, "forward", of_each_weight=True)),
        f"ours, {steps} steps": many_steps(setting, steps),
    }
    for name in gradients:
        ours[f"ours, {name}"] = jax.value_and_grad(log_evidence(setting), GRADIENTS[name])
        ours[f"{REMAT}, {name}"] = jax.value_and_grad(log_evidence(setting, remat=True), GRADIENTS[name])
    compiled = {name: compile_ahead(function, *start, labels) for name, function in ours.items()}
    if evidence_paper.decomp:
        theirs = evidence_paper.log_evidence(network, setting.depth)
        targets = jax.nn.one_hot(labels, network(network.params, images[:1]).shape[-1])
        for name in gradients:
            compiled[f"paper, {name}"] = compile_ahead(jax.value_and_grad(theirs, GRADIENTS[name]), *start, targets)
        batched = evidence_paper.log_evidence(network, setting.depth, whole_batch=True)
        compiled[BATCHED] = compile_ahead(jax.value_and_grad(batched), *start, targets)
    return compiled


def differences(cases: dict[str, Program], name: str) -> dict[str, float]:
    """Differences of value and derivatives of a case between the formulations, relative to the peer's."""
    relative = {}
    expected = jax.tree.leaves(cases[f"paper, {name}"].run())
    names = ("value", "d delta", "d weights")[: len(expected)]
    for who in ("ours", REMAT):
        answer = jax.tree.leaves(cases[f"{who}, {name}"].run())
        for what, ours, theirs in zip(names, answer, expected, strict=True):
            relative[f"{who}, {what}"] = float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max())
            console.print(f"  {who}, {what}, largest relative difference to theirs: {relative[f'{who}, {what}']:.1e}")
    return relative


def compare(results: Results, steps: int, classes: int, gradients: Sequence[str]) -> Results:
    """Print and judge ratios of ours to theirs."""

    def ratio(ours: str, theirs: str, key: str) -> float:
        return results[ours][key] / results[f"paper, {theirs}"][key]

    targets = {
        f"{OF_EACH}, time": (ratio(f"ours, {OF_EACH}", DELTA, "seconds"), TIMES[DELTA]),
        f"{steps} steps, time (theirs extrapolated)": (
            ratio(f"ours, {steps} steps", DELTA, "seconds") / steps,
            1 / 200,
        ),
    }
    for name in gradients:
        for who in ("ours", REMAT):
            targets[f"{who}, {name}, time"] = ratio(f"{who}, {name}", name, "seconds"), TIMES[name]
            memory = ratio(f"{who}, {name}", name, "memory_bytes")
            if classes >= 1000 and who == REMAT:
                targets[f"{who}, {name}, memory"] = memory, 1 / 5
            else:
                console.print(f"  {who}, {name}, memory: {memory:.3g}")
    batched = results[f"ours, {DELTA}"]["seconds"] / results[BATCHED]["seconds"]
    console.print(
        f"  ours, {DELTA}, time, to theirs with all images at once, which the experiment does not do: {batched:.3g}"
    )
    return judge(targets)


def main(
    classes: tuple[int, ...] = (10, 1000),
    probes: int = 1,
    rounds: int = 1,
    steps: int = 400,
    weights: bool = True,
    small: bool = False,
) -> None:
    """Run, print and write.

    Args:
        classes: Numbers of classes of the network; each has a table.
        probes: Rademacher probes of the log-determinant. The experiment has 10; time grows in proportion.
        rounds: How often to repeat each timing; the median counts.
        steps: Steps of the optimiser.
        weights: Also compute derivatives in the weights, which take the most time.
        small: A small network and one round, to see that everything runs.
    """
    options = dict(locals())
    if small:
        classes, probes, rounds = (3,), 2, 1
    if not evidence_paper.decomp:
        console.print("matfree is not installed, and the paper's rows are left out: pip install matfree==0.6.3")
    gradients = [BOTH, DELTA] if weights else [DELTA]
    content: dict[str, Any] = {
        "options": options,
        "matfree": importlib.metadata.version("matfree") if evidence_paper.decomp else None,
        "probes": probes,
        "steps": steps,
    }
    for count in dict.fromkeys(classes):
        setting = build(count, probes, small)
        number = size(setting.network.params)
        cases = programs(setting, steps, gradients)
        results = measure(cases, rounds)
        title = (
            f"{len(setting.images)} images, {count} classes, {number} weights, {probes} probes, {setting.depth} steps"
        )
        show(f"Evidence of the same VAN, our depthwise convolution in both: {title}", results)
        content[f"classes_{count}"] = {"weights": number, "images": len(setting.images), "cases": results}
        if evidence_paper.decomp:
            content[f"classes_{count}"]["differences"] = differences(cases, gradients[0])
            if not small:  # nothing that matters takes time there
                content[f"classes_{count}"]["targets"] = compare(results, steps, count, gradients)
    write(record_name("evidence", main, options), content)


if __name__ == "__main__":
    tyro.cli(main)
