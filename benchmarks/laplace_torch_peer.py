"""The peer's side of `benchmarks/laplace_torch.py`: the same networks in PyTorch. Imported only if it is installed."""

import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from laplace_torch_cases import BATCH, Case, data

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import laplace
    import torch

from torch import nn
from torch.utils.data import DataLoader, TensorDataset

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
torch.set_num_threads(CORES)


def module(case: Case) -> nn.Sequential:
    """The network of a case."""
    layers: list[nn.Module] = []
    if case.network == "mlp":
        for width, following in zip(case.widths[:-1], case.widths[1:], strict=True):
            layers += [nn.Linear(width, following), nn.Tanh()]
        return nn.Sequential(*layers, nn.Linear(case.widths[-1], case.classes))
    side = case.widths[0]
    for width, following in zip(case.widths[1:-1], case.widths[2:], strict=True):
        layers += [nn.Conv2d(width, following, 3, stride=2, padding=1), nn.Tanh()]
        side = (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(case.widths[-1] * side**2, case.classes))


def peer_steps(case: Case) -> dict[str, Callable[[], Any]]:
    """Return fit, evidence and predictive; each uses the result of the one before."""
    images = data(case)
    inputs, test = (torch.as_tensor(_channels_first(case, part)) for part in (images.inputs, images.test))
    torch.manual_seed(0)
    network = module(case)
    loader = DataLoader(TensorDataset(inputs, torch.as_tensor(images.targets)), batch_size=BATCH)
    latest: dict[str, laplace.ParametricLaplace] = {}

    def fit() -> None:
        latest["posterior"] = laplace.Laplace(
            network, "classification", subset_of_weights=case.subset, hessian_structure=case.structure
        )
        latest["posterior"].fit(loader)

    def predictive() -> np.ndarray:
        parts = [latest["posterior"](batch, link_approx="probit") for batch in test.split(BATCH)]
        return torch.cat(parts).numpy()

    return {
        "fit": fit,
        "evidence": lambda: float(latest["posterior"].log_marginal_likelihood()),
        "predictive": predictive,
    }


def _channels_first(case: Case, images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(images, -1, 1)) if case.network == "cnn" else images
