"""Which posterior can be acted on where the evidence alone chooses its prior, and what does the variational one cost?

    python benchmarks/variational.py [--images 300] [--seeds 3] [--samples S] [--small]

A convolutional network of 3,818 weights is trained on a few digits to the mode under prior precision 1. For every
structure the prior precision maximises the evidence of the Laplace approximation, or the lower bound of the variational
posterior. Prints both in nats an image, the NLL of training images under the posterior, which must not exceed that,
NLL and calibration error on test images beside those of the point estimate, as it is and with the temperature of 180
validation images; and the processor seconds of a second fit at the chosen precision, when everything is compiled, as a
multiple of the Laplace fit. Writes `benchmarks/results/variational.json`. About 15 minutes on 2 cores. `--small` only
shows that everything runs.
"""

import time
import warnings
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import tyro
from record import Results, console, record_name, write
from rich.table import Table
from sklearn.datasets import load_digits

import bnnlaplace
from bnnlaplace import Laplace, Variational, calibration
from bnnlaplace.predictive import link

VALIDATION, TEST, DELTA, NUM_PROBES = 180, 1000, 1.0, 32
STRUCTURES = {
    "full": {"hessian_structure": "full"},
    "Lanczos": {"hessian_structure": "lanczos"},
    "kron": {"hessian_structure": "kron"},
    "diagonal": {"hessian_structure": "diag"},
    "last layer, full": {"hessian_structure": "full", "subset_of_weights": "last_layer"},
}


class ConvNet(nn.Module):
    """Two convolutions and a dense layer."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def data(images: int, seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Disjoint sets of images."""
    x, y = load_digits(return_X_y=True)
    x = (x / 16).reshape(-1, 8, 8, 1).astype(np.float32)
    order = np.random.default_rng(seed).permutation(len(x))
    ends = np.cumsum([VALIDATION, min(TEST, len(x) - VALIDATION - images), images])
    names = ("validation", "test", "train")
    return {name: (x[rows], y[rows]) for name, rows in zip(names, np.split(order[: ends[-1]], ends[:-1]), strict=True)}


def trained(x: np.ndarray, y: np.ndarray, seed: int, steps: int) -> bnnlaplace.Network:
    """The network at a mode of the log joint."""
    module = ConvNet()
    params = module.init(jax.random.key(seed), x[:1])["params"]
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    def loss(params: Any) -> jax.Array:
        fit = optax.softmax_cross_entropy_with_integer_labels(module.apply({"params": params}, x), y).sum()
        return fit + 0.5 * DELTA * optax.tree.norm(params, squared=True)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(step, (params, optimizer.init(params)), length=steps)[0][0])
    return bnnlaplace.Network.from_linen(module, {"params": run(params)})


def scores(probs: Any, y: np.ndarray) -> dict[str, float]:
    """NLL in nats an image, and the calibration error."""
    probs = np.asarray(probs, np.float64)
    probs = probs / probs.sum(axis=1, keepdims=True)
    error = calibration.expected_calibration_error(probs, y)
    return {"nll": calibration.negative_log_likelihood(probs, y), "ece": error}


def seconds(run: Callable[[], Any]) -> float:
    """Processor seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def averaged(la: Laplace, x: np.ndarray) -> np.ndarray:
    """Probabilities averaged over as many samples as `predictive` takes, in double precision.

    In single precision a class may have probability zero in all of them, and the NLL of its images is infinite.
    """
    num_samples = NUM_PROBES if la.hessian_structure == "lanczos" else 100
    how = {"key": jax.random.key(7), "num_samples": num_samples}
    (of,) = la.functional_posteriors(x, [float(la.prior.precision)], **how)
    return link.monte_carlo_double(la.likelihood, of.mean, of.deviations)


def posterior(
    network: bnnlaplace.Network, sets: Any, options: Any, approximation: str | Variational, seed: int
) -> dict[str, float]:
    """Choose the prior precision by the evidence or the bound, and score the posterior."""
    how = {"key": jax.random.key(seed), "num_probes": NUM_PROBES, "approximation": approximation}

    def fit(la: Laplace) -> Laplace:
        return la.fit(sets["train"], **how)

    la = fit(Laplace(network, prior_precision=DELTA, **options))
    la = la.optimize_prior_precision(refit=None if approximation == "laplace" else fit)
    evidence = la.log_marginal_likelihood()
    start = Laplace(network, prior_precision=la.prior_precision, **options)
    numbers = {
        "prior_precision": float(la.prior.precision),
        "evidence": -evidence.mean / len(sets["train"][1]),
        "evidence_sem": evidence.sem / len(sets["train"][1]),
        "seconds": seconds(lambda: fit(start)),
        "train_nll": scores(averaged(la, sets["train"][0]), sets["train"][1])["nll"],
        "probit_nll": scores(la.predictive(sets["test"][0]), sets["test"][1])["nll"],
    }
    return numbers | scores(averaged(la, sets["test"][0]), sets["test"][1])


def study(images: int, seed: int, steps: int, names: list[str], samples: int | None) -> Results:
    """All posteriors of one network, and its point predictions."""
    sets = data(images, seed)
    network = trained(*sets["train"], seed, steps)
    logits = {name: np.asarray(network(network.params, x), np.float64) for name, (x, _) in sets.items()}
    temperature = calibration.fit_temperature(logits["validation"], sets["validation"][1]).temperature
    labels = sets["test"][1]
    results: Results = {
        "MAP": scores(jax.nn.softmax(logits["test"]), labels),
        "MAP + T": scores(jax.nn.softmax(logits["test"] / temperature), labels) | {"temperature": temperature},
    }
    for name in names:
        for label, approximation in (("laplace", "laplace"), ("variational", Variational(num_samples=samples))):
            results[f"{name}, {label}"] = posterior(network, sets, STRUCTURES[name], approximation, seed)
        seconds_of = [results[f"{name}, {label}"]["seconds"] for label in ("variational", "laplace")]
        results[f"{name}, variational"]["fits"] = seconds_of[0] / seconds_of[1]
    return results


def show(results: dict[str, Results], images: int) -> None:
    """Print the means over seeds."""
    columns = {
        "prior_precision": ("delta", "{:.2g}"),
        "evidence": ("-evidence / N", "{:.3f}"),
        "train_nll": ("train NLL", "{:.3f}"),
        "nll": ("NLL, MC", "{:.3f}"),
        "probit_nll": ("NLL, probit", "{:.3f}"),
        "ece": ("ECE", "{:.3f}"),
        "fits": ("Laplace fits", "{:.1f}"),
    }
    table = Table("method", *(title for title, _ in columns.values()), title=f"{images} images, means over seeds")
    for method in next(iter(results.values())):
        cells = []
        for key, (_, form) in columns.items():
            values = [of_seed[method][key] for of_seed in results.values() if key in of_seed[method]]
            cells.append(form.format(np.mean(values)) if values else "")
        table.add_row(method, *cells)
    console.print(table)


def main(images: int = 300, seeds: int = 3, steps: int = 2000, samples: int | None = None, small: bool = False) -> None:
    """Train, fit and compare, print and write.

    Args:
        images: Training images.
        seeds: Networks, each on images of its own.
        steps: Training steps, each with all images.
        samples: Samples of the outputs in a variational fit; None: as many as the library takes.
        small: Few images, steps and structures, to see that everything runs.
    """
    options = dict(locals())
    names = list(STRUCTURES)
    if small:
        images, seeds, steps, names = 20, 1, 50, ["diagonal", "last layer, full"]
    with warnings.catch_warnings():
        # The Laplace approximations of this table are saturated, and warn of it; their numbers are printed.
        warnings.simplefilter("ignore", UserWarning)
        results = {str(seed): study(images, seed, steps, names, samples) for seed in range(seeds)}
    show(results, images)
    write(record_name("variational", main, options), {"options": options, "seeds": results})


if __name__ == "__main__":
    tyro.cli(main)
