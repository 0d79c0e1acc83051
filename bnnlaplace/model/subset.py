"""Which weights have a posterior: all, those of the last layer, or those whose paths a function selects."""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import Bool, PyTree

from bnnlaplace.core.tree import leaf_names
from bnnlaplace.model.jaxpr import trace
from bnnlaplace.model.network import Network
from bnnlaplace.model.reach import reached_outputs
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
    if subset == "last_layer":
        return network.subset(last_layer(network, inputs).__contains__)
    chosen = network if subset == "all" else network.subset(subset)
    _check_reaches_outputs(chosen, inputs)
    return chosen


def _check_reaches_outputs(chosen: Network, inputs: PyTree) -> None:
    """Raise ValueError if outputs depend on weights, but on none of those that have a posterior."""
    if not chosen.is_subset:
        return
    spec = NetworkSpec.of(chosen.whole(), inputs)
    names, kept = leaf_names(spec.network().params), set(leaf_names(chosen.params))
    missing = _missing(spec, frozenset(leaf for leaf, name in enumerate(names) if name in kept))
    if missing.any():
        others = _reaching(spec, missing, kept, names)
        raise ValueError(
            f"subset_of_weights=... must select weights that reach every output; those it selects, {sorted(kept)}, do "
            f"not reach {_in_words(missing)}, whose variance would be 0; select one of {others} too, or 'last_layer'"
        )


def last_layer(network: Network, inputs: PyTree) -> frozenset[str]:
    """Return the paths of the weights of the last layer, or of all last layers if heads stand side by side.

    The last layer is the weight of two or more dimensions that enters the forward pass last, with the weights that
    enter after it and the other weights of its module. A weight that is used several times enters at its first use. If
    it does not reach all outputs, the last layer among the weights that reach only the others is chosen too, and so on:
    heads side by side are chosen together.

    Parameters
    ----------
    network
        The network, whose forward pass is traced once. If it was linearised: that of the network before.
    inputs
        Examples; only their shapes are used.

    Raises
    ------
    ValueError
        If several weights enter at once, as in a scan over layers. Also if outputs depend on weights that are not a
        head of their own; the message lists them.
    """
    # A linearised network computes with its weights in another order: its derivatives enter one by one.
    names = frozenset(leaf_names(network.params))
    return _last_layer(NetworkSpec.of(network.whole().subset(names.__contains__), inputs))


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
    chosen = {leaf for leaf, name in enumerate(names) if entered[leaf] >= entered[last] or _is_in(name, module)}
    # A scale after the heads reaches all outputs, but is not a head. So the matrices are to reach the outputs by
    # themselves, as far as there are such.
    while (missing := _missing(spec, frozenset(chosen & set(matrices)))).any():
        head = _next_head(spec, missing, chosen, names, entered, matrices)
        if not head:
            break
        chosen |= head
    while (missing := _missing(spec, frozenset(chosen))).any():
        head = _next_head(spec, missing, chosen, names, entered, matrices)
        if not head:
            raise _no_head(spec, missing, chosen, names)
        chosen |= head
    return frozenset(names[leaf] for leaf in chosen)


def _next_head(
    spec: NetworkSpec,
    missing: Bool[np.ndarray, "..."],
    chosen: set[int],
    names: list[str],
    entered: list[int],
    matrices: list[int],
) -> set[int]:
    """The last layer of another head: of weights that reach some of the missing outputs and no other; empty if none."""
    reached = {leaf: reached_outputs(spec, frozenset([leaf])) for leaf in range(len(names)) if leaf not in chosen}
    candidates = [leaf for leaf, outputs in reached.items() if outputs.any() and not (outputs & ~missing).any()]
    if not candidates:
        return set()
    last = max([leaf for leaf in candidates if leaf in matrices] or candidates, key=entered.__getitem__)
    module = names[last].rpartition("/")[0]
    return {leaf for leaf in candidates if entered[leaf] >= entered[last] or _is_in(names[leaf], module)}


def _no_head(spec: NetworkSpec, missing: Bool[np.ndarray, "..."], chosen: set[int], names: list[str]) -> ValueError:
    """The error for outputs without a last layer of their own."""
    found = sorted(names[leaf] for leaf in chosen)
    others = _reaching(spec, missing, set(found), names)
    return ValueError(
        f"subset_of_weights='last_layer' must find a layer for every output; {found} do not reach "
        f"{_in_words(missing)}, whose variance would be 0; pass a predicate that also selects one of {others}, such as "
        f"lambda path: path in {sorted([*found, others[-1]])}"
    )


def _missing(spec: NetworkSpec, chosen: frozenset[int]) -> Bool[np.ndarray, "..."]:
    """Outputs of one example that depend on weights, but on none of the chosen ones."""
    reached = reached_outputs(spec, chosen)
    return ~reached if reached.all() else ~reached & reached_outputs(spec)


def _reaching(spec: NetworkSpec, missing: Bool[np.ndarray, "..."], kept: set[str], names: list[str]) -> list[str]:
    """The paths of the weights that reach some missing output, except those that are kept."""
    others = [leaf for leaf, name in enumerate(names) if name not in kept]
    return [names[leaf] for leaf in others if (reached_outputs(spec, frozenset([leaf])) & missing).any()]


def _in_words(missing: Bool[np.ndarray, "..."]) -> str:
    """Name some of the outputs where the mask is true, such as "output 1 of 3"."""
    indices = [index[0] if len(index) == 1 else tuple(index) for index in np.argwhere(missing).tolist()]
    listed = ", ".join(map(str, indices[:5])) + (" and others" if len(indices) > 5 else "")
    return f"output{'s' if len(indices) > 1 else ''} {listed} of {' x '.join(map(str, missing.shape))}"


def _has_inner_equations(equation: JaxprEqn) -> bool:
    """Whether the equation runs a program of its own, as a loop does."""
    return any(isinstance(leaf, (Jaxpr, ClosedJaxpr)) for leaf in jax.tree.leaves(equation.params))


def _is_in(name: str, module: str) -> bool:
    return bool(module) and name.rpartition("/")[0] == module
