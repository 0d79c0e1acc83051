"""A network as the rest of the package sees it: f(params, x), with everything that is not trained frozen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace import precise


@partial(jax.tree_util.register_dataclass, data_fields=("params", "frozen"), meta_fields=("forward",))
@dataclass(frozen=True)
class Network:
    """A deterministic function of weights and inputs, and the weights at which it is expanded.

    Build one with `from_linen` or `from_function`. It is a pytree whose leaves are `params` and `frozen`, so it crosses
    `jit` without recompiling when the weights change.

    Attributes
    ----------
    forward
        (frozen, params, x) -> outputs; hashable, compared by value where the user's module is.
    params
        The weights with a posterior.
    frozen
        Everything else the forward pass reads, batch statistics among it; never changed.
    """

    forward: Callable[[PyTree, PyTree, Array], Array]
    params: PyTree
    frozen: PyTree

    def __call__(self, params: PyTree, x: Float[Array, "B ..."]) -> Float[Array, "B C"]:
        """Outputs (logits, or means of a regression) at `params` for a batch of inputs.

        Matrix products and convolutions that state no precision of their own are computed in full precision, and so are
        their derivatives, of which the curvature is made (`bnnlaplace.precise` says why).
        """
        with precise.all_products():
            return self.forward(self.frozen, params, x)

    @classmethod
    def from_linen(cls, module: Any, variables: Mapping[str, PyTree], **call_arguments: Any) -> "Network":
        """Wrap a Flax Linen module and its variables.

        Parameters
        ----------
        module
            A `flax.linen.Module`.
        variables
            What `module.init` returns, or training left: "params" are the weights; every other collection (batch
            statistics, say) is frozen.
        call_arguments
            Keyword arguments of every call, such as `train=False`: they must make the module deterministic.

        Raises
        ------
        ValueError
            If `variables` has no collection "params".

        Examples
        --------
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> module = nn.Dense(3)
        >>> variables = module.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> network = Network.from_linen(module, variables)
        >>> network(network.params, jnp.ones((5, 2))).shape
        (5, 3)
        """
        if "params" not in variables:
            raise ValueError(
                f"from_linen(variables=...) must hold a collection 'params'; got {sorted(variables)}; "
                "pass {'params': params} where you hold bare parameters"
            )
        frozen = {name: collection for name, collection in variables.items() if name != "params"}
        forward = _LinenForward(module, tuple(sorted(call_arguments.items())))
        return cls(forward, _as_arrays(variables["params"]), _as_arrays(frozen))

    @classmethod
    def from_function(cls, function: Callable[[PyTree, Array], Array], params: PyTree) -> "Network":
        """Wrap a plain function `f(params, x) -> outputs` of shape (B, C).

        Pass the same function object each time: compiled code is kept per function.

        Examples
        --------
        >>> import jax.numpy as jnp
        >>> network = Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))
        >>> network(network.params, jnp.ones((5, 2))).shape
        (5, 3)
        """
        return cls(_PlainForward(function), _as_arrays(params), {})

    def with_params(self, params: PyTree) -> "Network":
        """The same network at other weights."""
        return Network(self.forward, params, self.frozen)


@dataclass(frozen=True)
class _LinenForward:
    """Calls a Linen module; two of them are equal where their modules are, so compiled code is shared."""

    module: Any
    call_arguments: tuple[tuple[str, Any], ...]

    def __call__(self, frozen: PyTree, params: PyTree, x: Array) -> Array:
        return self.module.apply({"params": params, **frozen}, x, **dict(self.call_arguments))


@dataclass(frozen=True)
class _PlainForward:
    function: Callable[[PyTree, Array], Array]

    def __call__(self, frozen: PyTree, params: PyTree, x: Array) -> Array:
        return self.function(params, x)


def _as_arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)
