"""A fitted Laplace on disk: which parts of it are written, and how they are put together again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.checkpoint.pytree import CheckpointError, load_pytree, restructure, save_pytree
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.evidence.log_likelihood import LogLikelihood
from bnnlaplace.fitted import Fitted, Settings
from bnnlaplace.model.likelihood import Likelihood, is_ours, resolve
from bnnlaplace.model.network import Network
from bnnlaplace.prior.gaussian import by_layer, is_by_group, is_scalar
from bnnlaplace.structure import BY_NAME

# The fields of `LogLikelihood` under the names that the files have had since the first release.
_LOG_LIKELIHOOD = {
    "value": "log_likelihood",
    "gradient": "log_likelihood_gradient",
    "num_targets": "num_outputs",
    "squared_residuals": "squared_residuals",
}


@dataclass(frozen=True)
class StoredGroups:
    """Prior groups by the paths of the weights. A function cannot be written; this is what can be read back of it."""

    names: tuple[tuple[str, str], ...]

    def __call__(self, path: str) -> str:
        return dict(self.names)[path]


def save(path: Path, fitted: Fitted, settings: Settings) -> None:
    """Write a fitted Laplace: of the network its arrays, not the user's module. See `save_pytree`."""
    network, likelihood, prior = fitted.network, fitted.likelihood, fitted.prior
    precision, groups = settings.prior_precision, settings.prior_groups
    names = leaf_names(network.params)
    by_group = not is_scalar(precision) and is_by_group(precision, network.params, groups)
    tree = {
        "network": {"params": network.params, "frozen": network.frozen},
        # A likelihood of the user's own may hold Python numbers.
        "likelihood": [jnp.asarray(leaf) for leaf in jax.tree.leaves(likelihood)],
        "prior_precision": np.asarray(prior.precision),
        "structure": fitted.structure,
        "fitted": {_LOG_LIKELIHOOD[name]: value for name, value in fitted.log_likelihood._asdict().items()},
    }
    if not prior.is_isotropic and not by_group:
        tree["relative_precision"] = prior.relative
    if np.ndim(prior.mean):
        tree["prior_mean"] = prior.mean
    metadata = {
        "hessian_structure": settings.hessian_structure,
        "structure": type(fitted.structure).__name__,
        "likelihood": likelihood.name,
        "likelihood_is_ours": is_ours(likelihood),
        "weights": names,
        "linearised": network.is_linearised,
        "groups": {name: groups(name) for name in names},
    }
    if by_group:
        metadata["prior_precision"] = {name: float(value) for name, value in precision.items()}
    save_pytree(path, tree, metadata)


def load(path: Path, network: Network, likelihood: Likelihood | None = None) -> tuple[Fitted, Settings]:
    """Read what `save` wrote.

    Parameters
    ----------
    path
        The directory.
    network
        A network of the same structure; its arrays are replaced by the saved ones.
    likelihood
        Needed if it is not one of the package's; its leaves are replaced by the saved ones.

    Raises
    ------
    CheckpointError
        If a file is damaged, the likelihood is missing, or the network has another structure: the message names the
        file or the leaf.
    """
    if not isinstance(network, Network):
        raise TypeError(f"load(network=...) must be a bnnlaplace.Network; got {type(network).__name__}")
    stored, metadata = load_pytree(path)
    with_posterior = set(metadata.get("weights", ())) & set(leaf_names(network.params))
    if with_posterior:
        network = network.subset(with_posterior.__contains__)
    if metadata.get("linearised", False) and not network.is_linearised:
        network = network.linearised()
    arrays = restructure(path, stored["network"], {"params": network.params, "frozen": network.frozen})
    network = Network(network.forward, **arrays)
    settings = _settings(stored, metadata)
    structures = {cls.__name__: cls for cls in BY_NAME[metadata["hessian_structure"]]}
    structure = structures[metadata.get("structure", next(iter(structures)))]
    # An earlier release did not write all numbers; they are needed to choose the noise of a regression.
    numbers = {"num_outputs": np.nan, "squared_residuals": np.nan, **stored["fitted"]}
    log_likelihood = LogLikelihood(*(jnp.asarray(numbers[_LOG_LIKELIHOOD[name]]) for name in LogLikelihood._fields))
    fitted = Fitted(
        network=network,
        likelihood=_likelihood(path, stored, metadata, likelihood),
        prior=settings.prior(network),
        structure=structure.from_arrays(stored["structure"]),
        log_likelihood=log_likelihood,
    )
    return fitted, settings


def _likelihood(
    path: Path, stored: dict[str, Any], metadata: dict[str, Any], likelihood: Likelihood | None
) -> Likelihood:
    if likelihood is None:
        if not metadata.get("likelihood_is_ours", True):
            raise CheckpointError(
                f"{path} was fitted with the likelihood {metadata['likelihood']!r} of your own; pass it: "
                "Laplace.load(path, network, likelihood)"
            )
        likelihood = resolve(metadata["likelihood"])
    leaves = [jnp.asarray(leaf) for leaf in stored.get("likelihood", [])]
    if likelihood.name != metadata["likelihood"] or len(leaves) != len(jax.tree.leaves(likelihood)):
        raise CheckpointError(
            f"{path} was fitted with the likelihood {metadata['likelihood']!r} of {len(leaves)} parameters; got "
            f"{likelihood.name!r} of {len(jax.tree.leaves(likelihood))}; pass the one it was fitted with"
        )
    return jax.tree.unflatten(jax.tree.structure(likelihood), leaves)


def _settings(stored: dict[str, Any], metadata: dict[str, Any]) -> Settings:
    precision: Any = float(stored["prior_precision"])
    if "prior_precision" in metadata:
        precision = metadata["prior_precision"]
    elif "relative_precision" in stored:
        precision = precision * np.asarray(stored["relative_precision"])
    groups = StoredGroups(tuple(sorted(metadata["groups"].items()))) if "groups" in metadata else by_layer
    return Settings(
        subset_of_weights="all",  # the saved network is that of the subset
        hessian_structure=metadata["hessian_structure"],
        prior_precision=precision,
        prior_mean=jnp.asarray(stored["prior_mean"]) if "prior_mean" in stored else 0.0,
        prior_groups=groups,
    )
