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
from bnnlaplace.tree import examples


class Head(NamedTuple):
    """A network cut in two, so that network(params, x) = head(params, features(x)).

    Attributes
    ----------
    features
        x -> what enters the head: one array, examples along its leading axis. Call it inside `jit`.
    network
        The head: a network with the same weights and these inputs.
    """

    features: Callable[[PyTree[Float[Array, "B ..."]]], Float[Array, "B ..."]]
    network: Network


def cut(network: Network, inputs: PyTree[Float[Array, "N ..."]]) -> Head | None:
    """Cut a network where its weights enter, so that what comes before is computed once for all uses.

    Returns
    -------
    Head or None
        None where nothing comes before, more than one array crosses the cut, or one that does not belong to single
        examples. Of `inputs` shape and dtype are used alone.
    """
    example = _Example.of(inputs)
    crossing = [_cut(trace(network, example.batch(size))) for size in (2, 3)]
    if any(len(parts.features) != 1 or not parts.before for parts in crossing):
        return None
    small, large = (parts.features[0].aval.shape for parts in crossing)
    if small[:1] != (2,) or large[:1] != (3,) or small[1:] != large[1:]:
        return None

    def features(inputs: PyTree[Float[Array, "B ..."]]) -> Float[Array, "B ..."]:
        equations = trace(network, inputs)
        parts = _cut(equations)
        given = zip(equations.inputs, jax.tree.leaves(inputs), strict=True)
        known = _known(equations, frozen=network.frozen) | dict(given)
        return run(equations, parts.before, known, parts.features)[0]

    return Head(features, Network(_HeadForward(network.forward, example), network.params, network.frozen))


def compiled(head: Head, *, microbatch: int) -> Callable[[PyTree[Float[Array, "N ..."]]], Float[Array, "N ..."]]:
    """The features of many inputs, compiled once a shape.

    Cost: one forward pass. Memory: the activations of a microbatch, and the result.
    """

    @jax.jit
    def features(inputs: PyTree[Float[Array, "N ..."]]) -> Float[Array, "N ..."]:
        return jax.lax.map(lambda one: head.features(examples(one, None))[0], inputs, batch_size=microbatch)

    return features


@dataclass(frozen=True)
class _Example:
    """Shapes and types of the inputs of one example; compared by value."""

    structure: Any
    leaves: tuple[tuple[tuple[int, ...], Any], ...]

    @classmethod
    def of(cls, inputs: PyTree[Float[Array, "N ..."]]) -> "_Example":
        leaves, structure = jax.tree.flatten(inputs)
        return cls(structure, tuple((tuple(leaf.shape[1:]), jnp.result_type(leaf)) for leaf in leaves))

    def batch(self, size: int) -> PyTree[jax.ShapeDtypeStruct]:
        return self.structure.unflatten([jax.ShapeDtypeStruct((size, *shape), dtype) for shape, dtype in self.leaves])


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
    example: _Example

    def __call__(self, frozen: PyTree, params: PyTree, features: Array) -> Array:
        equations = trace(Network(self.forward, params, frozen), self.example.batch(len(features)))
        parts = _cut(equations)
        known = _known(equations, frozen=frozen, params=params) | {parts.features[0]: features}
        return run(equations, parts.after, known, equations.outputs)[0]


def _known(equations: Equations, **trees: PyTree) -> dict[Var, Array]:
    """The values of constants and of the leaves of arguments, by variable."""
    known = dict(equations.constants)
    for name, tree in trees.items():
        known.update(zip(getattr(equations, name), jax.tree.leaves(tree), strict=True))
    return known
