"""Which weights get a posterior: all, those of the last layer, or those whose paths a predicate selects."""

from collections.abc import Callable
from functools import lru_cache

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import leaf_names
from bnnlaplace.model.jaxpr import trace
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Outline

Subset = str | Callable[[str], bool]


def check(subset: Subset) -> None:
    """Raise ValueError unless `subset` is "all", "last_layer" or a function of paths."""
    if subset not in ("all", "last_layer") and not callable(subset):
        raise ValueError(
            f"Laplace(subset_of_weights=...) must be 'all', 'last_layer' or a function from the path of a weight to "
            f"whether it gets a posterior; got {subset!r}; try lambda path: 'Dense_0' in path"
        )


def select(network: Network, subset: Subset, inputs: PyTree[Float[Array, "N ..."]]) -> Network:
    """The network as a function of the weights that get a posterior; see `Network.subset`."""
    if subset == "all":
        return network
    if subset == "last_layer":
        return network.subset(last_layer(network, inputs).__contains__)
    return network.subset(subset)


def last_layer(network: Network, inputs: PyTree[Float[Array, "N ..."]]) -> frozenset[str]:
    """The paths of the weights of the last layer.

    It is the weight of two dimensions or more that is the last to enter the forward pass, with those that enter after
    it and those beside it in the same module. A weight that an earlier layer shares enters there.

    Parameters
    ----------
    network
        Whose forward pass is traced, the first time.
    inputs
        Examples, of which the shapes are used.

    Raises
    ------
    ValueError
        If it cannot be told from others, as in a scan over layers.
    """
    return _last_layer(Outline.of(network, inputs))


@lru_cache(maxsize=64)
def _last_layer(outline: Outline) -> frozenset[str]:
    network = outline.network()
    equations = trace(network, outline.example.batch(1))
    entered: dict[object, int] = {}
    for position, equation in enumerate(equations.steps):
        for atom in equation.invars:
            entered.setdefault(id(atom), position)
    names = leaf_names(network.params)
    first = [entered.get(id(variable), -1) for variable in equations.params]
    matrices = [i for i, variable in enumerate(equations.params) if len(variable.aval.shape) >= 2]
    last = max(matrices or range(len(names)), key=first.__getitem__)
    module = names[last].rpartition("/")[0]
    beside = [names[i] for i in matrices if first[i] == first[last] and not _is_in(names[i], module) and i != last]
    if beside and _runs_others(equations.steps[first[last]]):
        raise ValueError(
            f"subset_of_weights='last_layer' cannot tell {names[last]!r} from {beside}, which enter the same loop or "
            f"function with derivatives of its own; pass a predicate, such as lambda path: path == {names[last]!r}"
        )
    return frozenset(
        name for name, position in zip(names, first, strict=True) if position >= first[last] or _is_in(name, module)
    )


def _runs_others(equation: JaxprEqn) -> bool:
    """Whether it has equations of its own, as a loop does."""
    return any(isinstance(leaf, (Jaxpr, ClosedJaxpr)) for leaf in jax.tree.leaves(equation.params))


def _is_in(name: str, module: str) -> bool:
    return bool(module) and name.rpartition("/")[0] == module
