"""The features of a network: what enters the part of it that depends on the weights with a posterior."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, Float, PyTree

from bnnlaplace.equations import Equations, run, trace
from bnnlaplace.network import Network


class Head(NamedTuple):
    """A network cut in two, so that network(params, x) = head(params, features(x)).

    Attributes
    ----------
    features
        x -> what enters the head: one array, examples along its leading axis. Call it inside `jit`.
    network
        The head: a network with the same weights and these inputs.
    """

    features: Callable[[Float[Array, "B ..."]], Float[Array, "B ..."]]
    network: Network


def cut(network: Network, inputs: Float[Array, "N ..."]) -> Head | None:
    """Cut a network where its weights enter, so that what comes before is computed once for all uses.

    Returns
    -------
    Head or None
        None where nothing comes before, more than one array crosses the cut, or one that does not belong to single
        examples. Of `inputs` shape and dtype are used alone.
    """
    shape, dtype = tuple(inputs.shape[1:]), jnp.result_type(inputs)
    crossing = [_cut(trace(network, jax.ShapeDtypeStruct((size, *shape), dtype))) for size in (2, 3)]
    if any(len(parts.features) != 1 or not parts.before for parts in crossing):
        return None
    small, large = (parts.features[0].aval.shape for parts in crossing)
    if small[:1] != (2,) or large[:1] != (3,) or small[1:] != large[1:]:
        return None

    def features(inputs: Float[Array, "B ..."]) -> Float[Array, "B ..."]:
        equations = trace(network, inputs)
        parts = _cut(equations)
        known = _known(equations, frozen=network.frozen) | {equations.inputs[0]: inputs}
        return run(equations, parts.before, known, parts.features)[0]

    return Head(features, Network(_HeadForward(network.forward, shape, dtype), network.params, network.frozen))


def precompute(
    network: Network, inputs: Float[Array, "N ..."], *, microbatch: int
) -> tuple[Network, Float[Array, "N ..."]]:
    """The head of a network and the features of all inputs; the network and the inputs where it has none.

    Cost: one forward pass. Memory: the features of all N examples.
    """
    head = cut(network, inputs)
    if head is None:
        return network, inputs
    features = jax.jit(lambda x: jax.lax.map(lambda one: head.features(one[None])[0], x, batch_size=microbatch))
    return head.network, features(inputs)


class _Parts(NamedTuple):
    """Both halves, each with the equations that depend on neither inputs nor weights, and what crosses between them."""

    before: list[JaxprEqn]
    after: list[JaxprEqn]
    features: list[Var]


def _cut(equations: Equations) -> _Parts:
    after_cut, before_cut = set(equations.params), set(equations.inputs)
    parts = _Parts([], [], [])

    def consume(atoms: list[Var | Literal]) -> None:
        for atom in atoms:
            if not isinstance(atom, Literal) and atom in before_cut and atom not in parts.features:
                parts.features.append(atom)

    for equation in equations.steps:
        taken = {atom for atom in equation.invars if not isinstance(atom, Literal)}
        if taken & after_cut:
            consume(equation.invars)
            parts.after.append(equation)
            after_cut.update(equation.outvars)
        elif taken & before_cut:
            parts.before.append(equation)
            before_cut.update(equation.outvars)
        else:
            parts.before.append(equation)
            parts.after.append(equation)
    consume(equations.outputs)
    nothing_before = len(before_cut) == len(equations.inputs)
    return parts._replace(before=[]) if nothing_before else parts


@dataclass(frozen=True)
class _HeadForward:
    """Runs what follows the cut; equal where the forward pass that was cut is, so compiled code is shared."""

    forward: Callable[[PyTree, PyTree, Array], Array]
    shape: tuple[int, ...]
    dtype: Any

    def __call__(self, frozen: PyTree, params: PyTree, features: Array) -> Array:
        inputs = jax.ShapeDtypeStruct((len(features), *self.shape), self.dtype)
        equations = trace(Network(self.forward, params, frozen), inputs)
        parts = _cut(equations)
        known = _known(equations, frozen=frozen, params=params) | {parts.features[0]: features}
        return run(equations, parts.after, known, equations.outputs)[0]


def _known(equations: Equations, **trees: PyTree) -> dict[Var, Array]:
    """The values of constants and of the leaves of arguments, by variable."""
    known = dict(equations.constants)
    for name, tree in trees.items():
        known.update(zip(getattr(equations, name), jax.tree.leaves(tree), strict=True))
    return known
