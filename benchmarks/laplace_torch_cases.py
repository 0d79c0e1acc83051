"""Networks and data of `benchmarks/laplace_torch.py`, and our side of it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np

import bnnlaplace
from bnnlaplace.structure import BY_NAME

TEST, BATCH = 128, 64


@dataclass(frozen=True)
class Case:
    """One network, one number of classes, one posterior.

    Attributes
    ----------
    network
        "mlp" or "cnn".
    widths
        For an MLP the numbers of inputs and of units in the hidden layers. For a CNN the pixels of a side, and the
        channels of the image and of each convolution.
    """

    network: str
    widths: tuple[int, ...]
    classes: int
    examples: int
    subset: str
    structure: str

    @property
    def name(self) -> str:
        """The name in tables and records; no two cases of one run share it."""
        where = "last layer " if self.subset == "last_layer" else ""
        return f"{self.network} {'-'.join(map(str, self.widths))}, {self.classes} classes, {where}{self.structure}"


class Data(NamedTuple):
    """Images with the channels last."""

    inputs: np.ndarray
    targets: np.ndarray
    test: np.ndarray


def cases(classes: tuple[int, ...], small: bool) -> list[Case]:
    """Return all combinations that both packages can hold in memory."""
    large = ("mlp", (16, 12, 12), 64) if small else ("mlp", (64, 128, 128), 1000)
    images = ("cnn", (8, 1, 3, 4), 32) if small else ("cnn", (16, 3, 8, 16), 300)
    compact = ("mlp", (8, 6, 6), 64) if small else ("mlp", (32, 24, 24), 1000)
    everywhere = [name for name in ("diag", "kron") if name in BY_NAME]
    selected = []
    for count in classes:
        for network, widths, examples in (large, images):
            for structure in everywhere:
                selected.append(Case(network, widths, count, examples, "all", structure))
        selected.append(Case(compact[0], compact[1], count, compact[2], "all", "full"))
        for structure in [*everywhere, *(["full"] if count <= 10 else [])]:
            selected.append(Case(large[0], large[1], count, large[2], "last_layer", structure))
    return selected


def data(case: Case) -> Data:
    """Draw normal inputs and random labels; the cost depends on neither."""
    rng = np.random.default_rng(0)
    shape = (case.widths[0],) if case.network == "mlp" else (case.widths[0], case.widths[0], case.widths[1])
    inputs = rng.normal(size=(case.examples + TEST, *shape)).astype(np.float32)
    return Data(inputs[: case.examples], rng.integers(0, case.classes, case.examples), inputs[case.examples :])


class Perceptron(nn.Module):
    """Dense layers and tanh."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class Convolutional(nn.Module):
    """Two convolutions of 3 x 3 with stride 2, and a dense layer."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x):
        for width in self.widths[:-1]:
            x = nn.tanh(nn.Conv(width, (3, 3), strides=2, padding=1)(x))
        return nn.Dense(self.widths[-1])(x.reshape(len(x), -1))


def module(case: Case) -> nn.Module:
    """The network of a case."""
    if case.network == "mlp":
        return Perceptron((*case.widths[1:], case.classes))
    return Convolutional((*case.widths[2:], case.classes))


def our_steps(case: Case) -> dict[str, Callable[[], Any]]:
    """Return fit, evidence and predictive; each uses the result of the one before."""
    images = data(case)
    flax_module = module(case)
    network = bnnlaplace.Network.from_linen(flax_module, flax_module.init(jax.random.key(0), images.inputs[:1]))
    unfitted = bnnlaplace.Laplace(
        network, "classification", subset_of_weights=case.subset, hessian_structure=case.structure
    )
    latest: dict[str, bnnlaplace.Laplace] = {}

    def fit() -> Any:
        latest["posterior"] = unfitted.fit((images.inputs, images.targets), microbatch=BATCH)
        return latest["posterior"].structure

    return {
        "fit": fit,
        "evidence": lambda: latest["posterior"].log_marginal_likelihood().mean,
        "predictive": lambda: latest["posterior"].predictive(images.test, microbatch=BATCH),
    }
