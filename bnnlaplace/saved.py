"""A fitted Laplace on disk: which parts of it are written, and how they are put together again."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace import checkpoint
from bnnlaplace.evidence import DataTerms
from bnnlaplace.likelihood import Likelihood, resolve
from bnnlaplace.network import Network
from bnnlaplace.structure import BY_NAME, Structure
from bnnlaplace.tree import leaf_names


def save(
    path: Path,
    *,
    network: Network,
    likelihood: Likelihood,
    hessian_structure: str,
    prior_precision: float,
    structure: Structure,
    fitted: DataTerms,
) -> None:
    """Write the parts of a fitted Laplace; of the network its arrays, not the user's module. See `save_pytree`."""
    tree = {
        "network": {"params": network.params, "frozen": network.frozen},
        "likelihood": jax.tree.leaves(likelihood),
        "prior_precision": np.asarray(prior_precision),
        "structure": structure,
        "fitted": fitted,
    }
    metadata = {
        "hessian_structure": hessian_structure,
        "likelihood": likelihood.name,
        "weights": leaf_names(network.params),
    }
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
        If a file is damaged, or the network has another structure: the message names the file or the leaf.
    """
    stored, metadata = checkpoint.load_pytree(path)
    with_posterior = set(metadata.get("weights", ())) & set(leaf_names(network.params))
    if with_posterior:
        network = network.subset(with_posterior.__contains__)
    here = {"params": network.params, "frozen": network.frozen}
    there = checkpoint.restructure(path, stored["network"], here)
    likelihood = likelihood or resolve(metadata["likelihood"])
    leaves = [jnp.asarray(leaf) for leaf in stored.get("likelihood", [])]
    return {
        "network": Network(network.forward, **there),
        "likelihood": jax.tree.unflatten(jax.tree.structure(likelihood), leaves),
        "hessian_structure": metadata["hessian_structure"],
        "prior_precision": float(stored["prior_precision"]),
        "structure": BY_NAME[metadata["hessian_structure"]].from_arrays(stored["structure"]),
        "fitted": DataTerms(*(jnp.asarray(stored["fitted"][name]) for name in DataTerms._fields)),
    }
