"""A fitted Laplace on disk: which parts of it are written, and how they are put together again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from bnnlaplace import prior as priors
from bnnlaplace.checkpoint import pytree as checkpoint
from bnnlaplace.checkpoint.pytree import CheckpointError
from bnnlaplace.core.tree import leaf_names
from bnnlaplace.evidence.log_likelihood import DataTerms
from bnnlaplace.model.likelihood import Likelihood, is_ours, resolve
from bnnlaplace.model.network import Network
from bnnlaplace.structure import BY_NAME, Structure


@dataclass(frozen=True)
class StoredGroups:
    """Prior groups by the paths of the weights: what is left of a function once it has been written."""

    names: tuple[tuple[str, str], ...]

    def __call__(self, path: str) -> str:
        return dict(self.names)[path]


def save(
    path: Path,
    *,
    network: Network,
    likelihood: Likelihood,
    hessian_structure: str,
    prior_precision: priors.Precision,
    prior_mean: PyTree,
    prior_groups: priors.Groups,
    structure: Structure,
    fitted: DataTerms,
) -> None:
    """Write the parts of a fitted Laplace; of the network its arrays, not the user's module. See `save_pytree`."""
    names = leaf_names(network.params)
    prior = priors.resolve(prior_precision, prior_mean, network.params, prior_groups)
    by_group = not priors.is_scalar(prior_precision) and priors.is_by_group(
        prior_precision, network.params, prior_groups
    )
    tree = {
        "network": {"params": network.params, "frozen": network.frozen},
        "likelihood": [jnp.asarray(leaf) for leaf in jax.tree.leaves(likelihood)],  # one of one's own may hold floats
        "prior_precision": np.asarray(prior.precision),
        "structure": structure,
        "fitted": fitted,
    }
    if prior.relative is not None and not by_group:
        tree["relative_precision"] = prior.relative
    if prior.mean is not None:
        tree["prior_mean"] = prior.mean
    metadata = {
        "hessian_structure": hessian_structure,
        "structure": type(structure).__name__,
        "likelihood": likelihood.name,
        "likelihood_is_ours": is_ours(likelihood),
        "weights": names,
        "linearised": network.is_linearised,
        "groups": {name: prior_groups(name) for name in names},
    }
    if by_group:
        metadata["prior_precision"] = {name: float(value) for name, value in prior_precision.items()}
    checkpoint.save_pytree(path, tree, metadata)


def load(path: Path, network: Network, likelihood: Likelihood | None = None) -> dict[str, Any]:
    """Read what `save` wrote: its arguments by name.

    Parameters
    ----------
    path
        The directory.
    network
        One of the same structure; its arrays are replaced by the saved ones.
    likelihood
        Needed where it is not one of the package's; its leaves are replaced by the saved ones.

    Raises
    ------
    CheckpointError
        If a file is damaged, the likelihood is missing, or the network has another structure: the message names the
        file or the leaf.
    """
    stored, metadata = checkpoint.load_pytree(path)
    with_posterior = set(metadata.get("weights", ())) & set(leaf_names(network.params))
    if with_posterior:
        network = network.subset(with_posterior.__contains__)
    if metadata.get("linearised", False) and not network.is_linearised:
        network = network.linearised()
    here = {"params": network.params, "frozen": network.frozen}
    there = checkpoint.restructure(path, stored["network"], here)
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
    known = {cls.__name__: cls for cls in BY_NAME[metadata["hessian_structure"]]}
    structure = known[metadata.get("structure", next(iter(known)))]
    return {
        "network": Network(network.forward, **there),
        "likelihood": jax.tree.unflatten(jax.tree.structure(likelihood), leaves),
        "hessian_structure": metadata["hessian_structure"],
        "structure": structure.from_arrays(stored["structure"]),
        "fitted": _terms(stored["fitted"]),
        **_prior(stored, metadata),
    }


def _prior(stored: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    precision: Any = float(stored["prior_precision"])
    if "prior_precision" in metadata:
        precision = metadata["prior_precision"]
    elif "relative_precision" in stored:
        precision = precision * np.asarray(stored["relative_precision"])
    found = {"prior_precision": precision}
    if "prior_mean" in stored:
        found["prior_mean"] = jnp.asarray(stored["prior_mean"])
    if "groups" in metadata:
        found["prior_groups"] = StoredGroups(tuple(sorted(metadata["groups"].items())))
    return found


def _terms(stored: dict[str, Any]) -> DataTerms:
    # An earlier release had neither; they are needed to choose the noise of a regression.
    stored = {"num_outputs": np.nan, "squared_residuals": np.nan, **stored}
    return DataTerms(*(jnp.asarray(stored[name]) for name in DataTerms._fields))
