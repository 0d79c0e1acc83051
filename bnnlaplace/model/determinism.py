"""A network has to be a function of weights and one example: no randomness, nothing taken from the rest of a batch."""

import inspect
from functools import lru_cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.tree import examples, num_examples, number_type
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Outline, check_outputs

# Names that modules give to the switch between training and evaluation.
SWITCHES = ("train", "training", "is_training", "deterministic", "use_running_average")
MOST_EXAMPLES = 8
PASSED = "deterministic"


def check_deterministic(network: Network, inputs: PyTree[Float[Array, "N ..."]]) -> None:
    """Call a network twice on a few examples, and on one of them alone; once for all fits of a network.

    Raises
    ------
    ValueError
        If outputs are not (N, ..., C), or differ, as with dropout that is live or batch statistics computed from the
        batch, or a Linen module asks for a random key or writes its statistics; the message says how to mend it.
    """
    from flax.errors import InvalidRngError, ModifyScopeVariableError  # a user of plain functions needs no Flax

    few = examples(inputs, slice(MOST_EXAMPLES))
    known = _remembered(Outline.of(network, few))
    if PASSED in known:
        return
    forward = network.forward
    make = forward.instance if hasattr(forward, "instance") else partial(partial, forward)
    call = make(network.frozen, network.params)
    try:
        first, second, alone = call(few), call(few), call(examples(few, slice(1)))
    except (InvalidRngError, ModifyScopeVariableError) as error:
        raise ValueError(
            f"a network must be deterministic; the module raised {type(error).__name__}, as dropout that is live or "
            f"batch normalisation in training mode does; {_fix(forward)}"
        ) from error
    check_outputs(getattr(first, "shape", type(first).__name__), num_examples(few))
    precision = max((first.dtype, number_type(network.params)), key=lambda dtype: jnp.finfo(dtype).eps)
    first, second, alone = (np.asarray(outputs, np.float64) for outputs in (first, second, alone))
    negligible = float(jnp.finfo(precision).eps) ** 0.5 * np.abs(first).max()
    # Outputs that are not finite pass: they are found elsewhere.
    if (difference := np.abs(second - first).max()) > negligible:
        raise ValueError(
            "a network must give the same outputs at every call; two calls differ by "
            f"{difference:.2g}, as with dropout that is live; {_fix(forward)}"
        )
    if (difference := np.abs(alone - first[:1]).max()) > negligible:
        raise ValueError(
            "a network must give the same outputs for an example whatever else is in its batch; alone it gets others, "
            f"by {difference:.2g}, as with batch normalisation in training mode; {_fix(forward)}"
        )
    # Where all examples have the same outputs nothing could have been found.
    if np.isfinite(first).all() and np.abs(first - first[:1]).max() > negligible:
        known.add(PASSED)


@lru_cache(maxsize=64)
def _remembered(outline: Outline) -> set[str]:
    """What is known of a network, to be added to: whether it is deterministic does not depend on its weights."""
    return set()


def _fix(forward: Any) -> str:
    module = getattr(forward, "module", None)
    if module is not None:
        names = [name for name in inspect.signature(type(module).__call__).parameters if name in SWITCHES]
        values = [f"{name}={name in ('deterministic', 'use_running_average')}" for name in names]
        example = ", ".join(values) or "train=False"
        return f"pass what switches it off to Network.from_linen(module, variables, ...), such as {example}"
    if hasattr(forward, "graph"):
        return "call model.eval() before Network.from_nnx(model)"
    return "let the function evaluate the model as for predictions"
