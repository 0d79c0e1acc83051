"""The same network twice, in PyTorch and in Flax with the weights of the first, and the same data for both."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import laplace
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

import bnnlaplace

PRIOR_PRECISION, SIGMA_NOISE = 0.7, 0.4
TRAIN, TEST = 24, 5


class Pair(NamedTuple):
    """A network and its data for both packages; images are (N, C, H, W) for one and (N, H, W, C) for the other."""

    likelihood: str
    module: torch.nn.Sequential
    network: bnnlaplace.Network
    torch_inputs: torch.Tensor
    inputs: np.ndarray
    targets: np.ndarray

    def peer(self, subset: str, structure: str) -> laplace.ParametricLaplace:
        """Fit by the peer, all data in one batch."""
        train = TensorDataset(self.torch_inputs[:TRAIN], torch.as_tensor(self.targets))
        noise = {"sigma_noise": SIGMA_NOISE} if self.likelihood == "regression" else {}
        fitted = laplace.Laplace(
            self.module,
            self.likelihood,
            subset_of_weights=subset,
            hessian_structure=structure,
            prior_precision=PRIOR_PRECISION,
            **noise,
        )
        fitted.fit(DataLoader(train, batch_size=TRAIN))
        return fitted

    def ours(self, subset: str, structure: str) -> bnnlaplace.Laplace:
        """Fit by this package."""
        noise = {"sigma_noise": SIGMA_NOISE} if self.likelihood == "regression" else {}
        unfitted = bnnlaplace.Laplace(
            self.network,
            self.likelihood,
            subset_of_weights=subset,
            hessian_structure=structure,
            prior_precision=PRIOR_PRECISION,
            **noise,
        )
        return unfitted.fit((self.inputs[:TRAIN], self.targets), microbatch=16)

    @property
    def torch_test(self) -> torch.Tensor:
        """Inputs to predict at, for the peer."""
        return self.torch_inputs[TRAIN:]

    @property
    def test(self) -> np.ndarray:
        """The same for this package."""
        return self.inputs[TRAIN:]


class Perceptron(nn.Module):
    """Two hidden layers."""

    outputs: int

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(9)(x))
        x = nn.tanh(nn.Dense(8)(x))
        return nn.Dense(self.outputs)(x)


class Convolutional(nn.Module):
    """Two convolutions, the second with a stride and padding, and a dense layer."""

    outputs: int

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Conv(3, (3, 3), padding="VALID")(x))
        x = nn.tanh(nn.Conv(4, (3, 3), strides=2, padding=1)(x))
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # channels first, as the peer flattens images
        return nn.Dense(self.outputs)(x)


def perceptron(outputs: int) -> tuple[torch.nn.Sequential, nn.Module]:
    """A perceptron with six inputs, in PyTorch and in Flax."""
    layers = torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs)
    return torch.nn.Sequential(*layers), Perceptron(outputs)


def convolutional(outputs: int) -> tuple[torch.nn.Sequential, nn.Module]:
    """A convolutional network for images of 7 x 7 pixels and two channels, in PyTorch and in Flax."""
    layers = (
        torch.nn.Conv2d(2, 3, 3),
        torch.nn.Tanh(),
        torch.nn.Conv2d(3, 4, 3, stride=2, padding=1),
        torch.nn.Tanh(),
        torch.nn.Flatten(),
        torch.nn.Linear(36, outputs),
    )
    return torch.nn.Sequential(*layers), Convolutional(outputs)


def flax_variables(module: torch.nn.Sequential) -> dict:
    """The weights of a PyTorch network under the names that Flax gives them."""
    params, count = {}, {"Conv": 0, "Dense": 0}
    for layer in module:
        if not isinstance(layer, (torch.nn.Linear, torch.nn.Conv2d)):
            continue
        kind = "Dense" if isinstance(layer, torch.nn.Linear) else "Conv"
        kernel = layer.weight.T if kind == "Dense" else layer.weight.permute(2, 3, 1, 0)
        leaves = {"kernel": kernel, "bias": layer.bias}
        params[f"{kind}_{count[kind]}"] = {name: jnp.asarray(leaf.detach().numpy()) for name, leaf in leaves.items()}
        count[kind] += 1
    return {"params": params}


def build(kind: str, likelihood: str) -> Pair:
    """A pair of networks at random weights, in double precision if that is the default of both packages."""
    torch.manual_seed(3)
    rng = np.random.default_rng(4)
    outputs = 4 if likelihood == "classification" else 2
    make, shape = {"mlp": (perceptron, (6,)), "cnn": (convolutional, (2, 7, 7))}[kind]
    module, flax_module = make(outputs)
    inputs = rng.normal(size=(TRAIN + TEST, *shape))
    targets = rng.integers(0, outputs, TRAIN) if likelihood == "classification" else rng.normal(size=(TRAIN, outputs))
    network = bnnlaplace.Network.from_linen(flax_module, flax_variables(module))
    channels_last = np.moveaxis(inputs, 1, -1) if kind == "cnn" else inputs
    return Pair(likelihood, module, network, torch.as_tensor(inputs), channels_last, targets)
