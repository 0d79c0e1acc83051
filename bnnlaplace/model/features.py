"""The features of a network: the array that enters the part of it whose weights have a posterior.

If only some weights have a posterior, such as those of the last layer, everything before them is the same in every pass
over the data. It is computed once.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
from jax.extend.core import JaxprEqn, Literal, Var
from jaxtyping import Array, ArrayLike, PyTree, Shaped

from bnnlaplace.core import memory
from bnnlaplace.core.tree import examples
from bnnlaplace.model.jaxpr import FlatJaxpr, run, trace
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec, Shapes


class Head(NamedTuple):
    """A network that is cut in two: network(params, features(x)) are the outputs of the whole.

    Attributes
    ----------
    whole
        The network that was cut. If it was linearised: the network that it is the expansion of.
    network
        The second half: a network with the same weights whose inputs are features. It is linearised if the network
        that was cut was linearised.
    """

    whole: Network
    network: Network

    def features(self, inputs: PyTree[Shaped[ArrayLike, "B ..."]]) -> Shaped[Array, "B ..."]:
        """Compute what enters the head: one array, examples along its leading axis. Call it inside `jit`."""
        jaxpr = trace(self.whole, inputs)
        halves = _halves(jaxpr)
        known = _values(jaxpr, frozen=self.whole.frozen, inputs=inputs)
        return run(jaxpr, halves.before, known, halves.crossing)[0]


def cut(network: Network, inputs: PyTree) -> Head | None:
    """Cut a network where its weights enter, so that everything before is computed once for all uses.

    Parameters
    ----------
    network
        A network with frozen weights.
    inputs
        Examples; only their shapes and types are used.

    Returns
    -------
    Head or None
        None if nothing comes before the weights, if more than one array crosses the cut, or if that array does not
        belong to single examples.
    """
    base = network.unlinearised()
    spec = NetworkSpec.of(base, inputs)
    if _crossing(spec) is None:
        return None
    head = Network(_HeadForward(base.forward, spec.example), base.params, base.frozen)
    return Head(base, head.linearised().with_params(network.params) if network.is_linearised else head)


@partial(jax.jit, static_argnames="microbatch")
def compute(head: Head, inputs: PyTree[Shaped[ArrayLike, "N ..."]], *, microbatch: int) -> Shaped[Array, "N ..."]:
    """Compute the features of many inputs. Heads of the same network at other weights share a program.

    Cost: one forward pass. Memory: the activations of a microbatch, and the result.

    Parameters
    ----------
    head
        The result of `cut`.
    inputs
        All N examples.
    microbatch
        How many examples are computed at a time.
    """
    return jax.lax.map(lambda example: head.features(examples(example, None))[0], inputs, batch_size=microbatch)


def bytes_per_example(network: Network, inputs: PyTree) -> int:
    """Size of the features of one example in bytes; 0 if `cut` cannot cut the network."""
    crossing = _crossing(NetworkSpec.of(network.unlinearised(), inputs))
    return 0 if crossing is None else math.prod(crossing.shape) * crossing.dtype.itemsize


def memory_limit() -> int:
    """How many bytes of features are kept between their uses: a quarter of the free memory, 1 GiB if it is unknown."""
    free = memory.free_bytes()
    return 2**30 if free is None else free // 4


@lru_cache(maxsize=64)
def _crossing(spec: NetworkSpec) -> jax.ShapeDtypeStruct | None:
    """Shape and type of one example's features. None unless exactly one array crosses, with a row for each example."""
    small, large = (_halves(trace(spec.network(), spec.example.batch(size))) for size in (2, 3))
    if any(len(halves.crossing) != 1 or not halves.before for halves in (small, large)):
        return None
    two, three = small.crossing[0].aval, large.crossing[0].aval  # for two and for three examples
    # An array belongs to single examples if its leading axis, and no other, follows their number.
    has_row_each = two.shape[:1] == (2,) and three.shape[:1] == (3,) and two.shape[1:] == three.shape[1:]
    return jax.ShapeDtypeStruct(two.shape[1:], two.dtype) if has_row_each else None


class _Halves(NamedTuple):
    """The equations before and after the cut, and the variables that cross it.

    Equations that depend on neither inputs nor weights are in both halves.
    """

    before: list[JaxprEqn]
    after: list[JaxprEqn]
    crossing: list[Var]


def _halves(jaxpr: FlatJaxpr) -> _Halves:
    weight_variables, feature_variables = set(jaxpr.params), set(jaxpr.inputs)
    halves = _Halves([], [], [])

    def cross(atoms: Sequence[Var | Literal]) -> None:
        for atom in atoms:
            if not isinstance(atom, Literal) and atom in feature_variables and atom not in halves.crossing:
                halves.crossing.append(atom)

    for equation in jaxpr.equations:
        operands = {atom for atom in equation.invars if not isinstance(atom, Literal)}
        if operands & weight_variables:
            cross(equation.invars)
            halves.after.append(equation)
            weight_variables.update(equation.outvars)
        elif operands & feature_variables:
            halves.before.append(equation)
            feature_variables.update(equation.outvars)
        else:
            halves.before.append(equation)
            halves.after.append(equation)
    cross(jaxpr.outputs)
    computes_nothing = len(feature_variables) == len(jaxpr.inputs)
    return halves._replace(before=[]) if computes_nothing else halves


@dataclass(frozen=True)
class _HeadForward:
    """Runs the second half of a forward pass. Equal forward passes have equal heads, which share compiled code."""

    forward: Callable[[PyTree, PyTree, Any], Any]
    example: Shapes

    def __call__(self, frozen: PyTree, params: PyTree, features: Shaped[Array, "B ..."]) -> Any:
        jaxpr = trace(Network(self.forward, params, frozen), self.example.batch(len(features)))
        halves = _halves(jaxpr)
        known = _values(jaxpr, frozen=frozen, params=params) | {halves.crossing[0]: features}
        return run(jaxpr, halves.after, known, jaxpr.outputs)[0]


def _values(jaxpr: FlatJaxpr, **arguments: PyTree) -> dict[Var, Any]:
    """The values of constants and of the leaves of some arguments of the forward pass, by variable."""
    values = dict(jaxpr.constants)
    for name, tree in arguments.items():
        values.update(zip(getattr(jaxpr, name), jax.tree.leaves(tree), strict=True))
    return values
