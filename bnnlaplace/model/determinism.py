"""A check that a network is a function of weights and one example: not random, and not dependent on the batch."""

import inspect
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike, PyTree, Shaped

from bnnlaplace.core.tree import examples, num_examples, number_type
from bnnlaplace.model.forward import PlainForward
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import NetworkSpec, call_refused, check_outputs, shape_or_fault

# Names that modules give to the switch between training and evaluation.
SWITCHES = ("train", "training", "is_training", "deterministic", "use_running_average")
MAX_EXAMPLES = 8
PASSED = "deterministic"
# Outputs for an example alone must agree with those in a batch to this part of their own size.
SIZE_TOLERANCE = 0.5


def check_deterministic(network: Network, inputs: PyTree[Shaped[ArrayLike, "N ..."]]) -> None:
    """Call a network on a few examples: twice, with the first one among other examples, and on the first one alone.

    A network that has passed is not called again, whatever its weights are.

    Raises
    ------
    ValueError
        If outputs are not (N, ..., C), or differ between the calls, as they do with live dropout or with batch
        statistics that are computed from the batch. Also if a Linen module asks for a random key or writes its
        statistics. The message says how to mend it.
    """
    from flax.errors import InvalidRngError, ModifyScopeVariableError  # a user of plain functions needs no Flax

    few = examples(inputs, slice(MAX_EXAMPLES))
    remembered = _remembered(NetworkSpec.of(network, few))
    if PASSED in remembered:
        return
    forward, count, seen = network.forward, num_examples(few), []
    others = examples(few, np.zeros(count, int)), examples(few, slice(1))
    try:
        first, second, copied, alone = _calls(network, few, *others, seen)
    except (InvalidRngError, ModifyScopeVariableError) as error:
        raise ValueError(
            f"a network must be deterministic; the module raised {type(error).__name__}, as dropout that is live or "
            f"batch normalisation in training mode does; {_fix(forward)}"
        ) from error
    except Exception as error:  # whatever a user's model raises, and JAX where outputs are not arrays
        if seen:
            check_outputs(seen[0], count)
        if "unbound axis name" in str(error):
            raise ValueError(
                "a network must be called without pmap or shard_map; the module raised "
                f"{type(error).__name__}: {error}, as batch normalisation with axis_name in training mode does; "
                f"{_fix(forward)}"
            ) from error
        raise call_refused("fit(data=(x, y)): x must be what the network takes", few, error) from error
    check_outputs(seen[0], count)
    precision = max((first.dtype, number_type(network.params)), key=lambda dtype: jnp.finfo(dtype).eps)
    first, second, copied, alone = (np.asarray(outputs, np.float64) for outputs in (first, second, copied, alone))
    largest = np.abs(first).max()
    # Calls of one shape run one program, which rounds the first row in one way whatever the numbers in other rows are.
    # So the length of the sums in the network does not matter. What is left is a device that adds up in any order.
    negligible = float(jnp.finfo(precision).eps) ** 0.5 * largest
    # Comparisons with NaN are false: outputs that are not finite pass here and are found by the fit.
    if (difference := np.abs(second - first).max()) > negligible:
        raise ValueError(
            "a network must give the same outputs at every call; two calls differ by "
            f"{difference:.2g}, as with dropout that is live; {_fix(forward)}"
        )
    # The other examples are replaced by copies of the first one, so that only a dependence on them shows.
    if (difference := np.abs(copied[0] - first[0]).max()) > negligible:
        raise _depends_on_batch("among copies of itself", difference, forward)
    # A batch of one runs another program, which may add up a long sum in another order: the outputs alone do not bound
    # that rounding. But a dependence on the size of the batch, such as a factor 1 / N, is as large as the outputs.
    difference = np.abs(alone - first[:1]).max()
    if difference > max(negligible, SIZE_TOLERANCE * np.abs(first[0]).max()):
        raise _depends_on_batch("alone", difference, forward)
    # If all examples have the same outputs, a dependence on the batch could not have shown.
    if np.isfinite(first).all() and np.abs(first - first[:1]).max() > negligible:
        remembered.add(PASSED)


def _calls(network: Network, few: PyTree, copies: PyTree, alone: PyTree, seen: list[Any]) -> tuple[Any, ...]:
    """Return the outputs for some examples, for them again, for copies of the first one, and for it alone.

    `seen` gets the shape of the outputs, or what they are in place of an array.
    """
    forward, frozen, params = network.forward, network.frozen, network.params
    # A function may keep state of its own, in which a trace would leave what is of no use outside of it.
    if isinstance(forward, PlainForward):
        call = partial(forward, frozen, params)
        first = call(few)
        seen.append(shape_or_fault(first))
        return first, call(few), call(copies), call(alone)

    # A module is called in two programs, one for each shape. Operation by operation, a convolutional one would be
    # compiled into hundreds. The second call is made while the first is traced: a state that it changes shows there,
    # and what is the same is computed once.
    @jax.jit
    def twice(frozen: PyTree, params: PyTree, x: PyTree) -> tuple[Any, Any]:
        call = forward.instance(frozen, params) if hasattr(forward, "instance") else partial(forward, frozen, params)
        first = call(x)
        seen.append(shape_or_fault(first))
        return first, call(x)

    (first, second), (copied, _), (single, _) = (twice(frozen, params, x) for x in (few, copies, alone))
    return first, second, copied, single


@lru_cache(maxsize=64)
def _remembered(spec: NetworkSpec) -> set[str]:
    """Return the findings so far. Determinism does not depend on the weights, so all networks of a spec share it."""
    return set()


def _depends_on_batch(where: str, difference: float, forward: Any) -> ValueError:
    return ValueError(
        "a network must give the same outputs for an example whatever else is in its batch; the outputs of the first "
        f"example differ by {difference:.2g} {where}, as with batch normalisation in training mode; {_fix(forward)}"
    )


def _fix(forward: Any) -> str:
    """Say how to mend a network, by the kind of its forward pass."""
    module = getattr(forward, "module", None)
    if module is not None:
        names = [name for name in inspect.signature(type(module).__call__).parameters if name in SWITCHES]
        values = [f"{name}={name in ('deterministic', 'use_running_average')}" for name in names]
        example = ", ".join(values) or "train=False"
        return f"pass what switches it off to Network.from_linen(module, variables, ...), such as {example}"
    if hasattr(forward, "graph"):
        return "call model.eval() before Network.from_nnx(model)"
    return "let the function evaluate the model as for predictions"
