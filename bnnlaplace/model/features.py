"""The features of a network: what enters the part of it that depends on the weights with a posterior."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import NamedTuple

import jax
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core import memory
from bnnlaplace.core.tree import examples
from bnnlaplace.model.jaxpr import Equations, run, trace
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Outline, Shapes


class Head(NamedTuple):
    """A network cut in two, so that network(params, features(x)) is what it gives.

    Attributes
    ----------
    whole
        The network that was cut; for a linearised one, of which it is the expansion.
    network
        The head: a network with the same weights, whose inputs are features; linearised where the whole one was.
    """

    whole: Network
    network: Network

    def features(self, inputs: PyTree[Float[Array, "B ..."]]) -> Float[Array, "B ..."]:
        """What enters the head: one array, examples along its leading axis. Call it inside `jit`."""
        equations = trace(self.whole, inputs)
        parts = _cut(equations)
        given = zip(equations.inputs, jax.tree.leaves(inputs), strict=True)
        known = _known(equations, frozen=self.whole.frozen) | dict(given)
        return run(equations, parts.before, known, parts.features)[0]


def cut(network: Network, inputs: PyTree[Float[Array, "N ..."]]) -> Head | None:
    """Cut a network where its weights enter, so that what comes before is computed once for all uses.

    Parameters
    ----------
    network
        One of whose weights some are frozen.
    inputs
        Of these shape and dtype are used alone.

    Returns
    -------
    Head or None
        None where nothing comes before, more than one array crosses the cut, or one that does not belong to single
        examples.
    """
    base = network.unlinearised()
    outline = Outline.of(base, inputs)
    if _crossing(outline) is None:
        return None
    head = Network(_HeadForward(base.forward, outline.example), base.params, base.frozen)
    return Head(base, head.linearised().with_params(network.params) if network.is_linearised else head)


@partial(jax.jit, static_argnames="microbatch")
def compute(head: Head, inputs: PyTree[Float[Array, "N ..."]], *, microbatch: int) -> Float[Array, "N ..."]:
    """The features of many inputs; two heads that are cut from the same network at other weights share a program.

    Cost: one forward pass. Memory: the activations of a microbatch, and the result.

    Parameters
    ----------
    head
        From `cut`.
    inputs
        All N examples.
    microbatch
        Examples at a time.
    """
    return jax.lax.map(lambda one: head.features(examples(one, None))[0], inputs, batch_size=microbatch)


def bytes_each(network: Network, inputs: PyTree[Float[Array, "N ..."]]) -> int:
    """Of the features of one example; 0 where a network cannot be cut.

    Parameters
    ----------
    network, inputs
        As for `cut`.
    """
    found = _crossing(Outline.of(network.unlinearised(), inputs))
    return 0 if found is None else math.prod(found.shape) * found.dtype.itemsize


def most_bytes() -> int:
    """Of features that are kept between their uses: a quarter of what is free, or 1 GiB where that cannot be told."""
    free = memory.free_bytes()
    return 2**30 if free is None else free // 4


@lru_cache(maxsize=64)
def _crossing(outline: Outline) -> jax.ShapeDtypeStruct | None:
    """What crosses the cut of one example; None where that is not one array that belongs to single examples."""
    crossing = [_cut(trace(outline.network(), outline.example.batch(size))) for size in (2, 3)]
    if any(len(parts.features) != 1 or not parts.before for parts in crossing):
        return None
    small, large = (parts.features[0].aval for parts in crossing)
    belongs = small.shape[:1] == (2,) and large.shape[:1] == (3,) and small.shape[1:] == large.shape[1:]
    return jax.ShapeDtypeStruct(small.shape[1:], small.dtype) if belongs else None


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
    example: Shapes

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
