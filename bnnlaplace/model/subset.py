"""Which weights have a posterior: all, those of the last layer, or those whose paths a function selects."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import PyTree

from bnnlaplace.core.tree import leaf_names
from bnnlaplace.model.jaxpr import trace
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec

Subset = str | Callable[[str], bool]


def check(subset: Any) -> None:
    """Raise ValueError unless `subset` is "all", "last_layer" or a function of paths."""
    if subset not in ("all", "last_layer") and not callable(subset):
        raise ValueError(
            f"Laplace(subset_of_weights=...) must be 'all', 'last_layer' or a function from the path of a weight to "
            f"whether it gets a posterior; got {subset!r}; try lambda path: 'Dense_0' in path"
        )


def select(network: Network, subset: Subset, inputs: PyTree) -> Network:
    """Freeze all weights outside of `subset`; see `Network.subset`. Only the shapes of `inputs` are used."""
    if subset == "all":
        return network
    if subset == "last_layer":
        return network.subset(last_layer(network, inputs).__contains__)
    return network.subset(subset)


def last_layer(network: Network, inputs: PyTree) -> frozenset[str]:
    """Return the paths of the weights of the last layer.

    The last layer is the weight of two or more dimensions that enters the forward pass last, with the weights that
    enter after it and the other weights of its module. A weight that is used several times enters at its first use.

    Parameters
    ----------
    network
        The network, whose forward pass is traced once.
    inputs
        Examples; only their shapes are used.

    Raises
    ------
    ValueError
        If several weights enter at once, as in a scan over layers.
    """
    return _last_layer(NetworkSpec.of(network, inputs))


@lru_cache(maxsize=64)
def _last_layer(spec: NetworkSpec) -> frozenset[str]:
    network = spec.network()
    jaxpr = trace(network, spec.example.batch(1))
    first_use: dict[int, int] = {}  # by identity, because literals are not hashable
    for index, equation in enumerate(jaxpr.equations):
        for atom in equation.invars:
            first_use.setdefault(id(atom), index)
    names = leaf_names(network.params)
    entered = [first_use.get(id(variable), -1) for variable in jaxpr.params]
    matrices = [leaf for leaf, variable in enumerate(jaxpr.params) if len(variable.aval.shape) >= 2]
    last = max(matrices or range(len(names)), key=entered.__getitem__)
    module = names[last].rpartition("/")[0]
    # A loop takes the weights of all its layers in one equation, so that their order cannot be told.
    rivals = [
        names[leaf]
        for leaf in matrices
        if entered[leaf] == entered[last] and not _is_in(names[leaf], module) and leaf != last
    ]
    if rivals and _has_inner_equations(jaxpr.equations[entered[last]]):
        raise ValueError(
            f"subset_of_weights='last_layer' cannot tell {names[last]!r} from {rivals}, which enter the same loop or "
            f"function with derivatives of its own; pass a predicate, such as lambda path: path == {names[last]!r}"
        )
    return frozenset(
        name for name, use in zip(names, entered, strict=True) if use >= entered[last] or _is_in(name, module)
    )


def _has_inner_equations(equation: JaxprEqn) -> bool:
    """Whether the equation runs a program of its own, as a loop does."""
    return any(isinstance(leaf, (Jaxpr, ClosedJaxpr)) for leaf in jax.tree.leaves(equation.params))


def _is_in(name: str, module: str) -> bool:
    return bool(module) and name.rpartition("/")[0] == module
