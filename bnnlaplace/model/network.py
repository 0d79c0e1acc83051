"""A network as the rest of the package sees it: f(params, x), with everything that is not trained frozen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from bnnlaplace.core.linalg import all_products
from bnnlaplace.core.tree import leaf_names, ravel, size, summed_type, unraveler


@partial(jax.tree_util.register_dataclass, data_fields=("params", "frozen"), meta_fields=("forward",))
@dataclass(frozen=True, repr=False)
class Network:
    """A deterministic function of weights and inputs, and the weights at which it is expanded.

    Build one with `from_linen`, `from_nnx` or `from_function`. It is a pytree whose leaves are `params` and `frozen`,
    so it crosses `jit` without recompiling when the weights change.

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

    def __repr__(self) -> str:
        # JAX prints what it traces, and the numbers would have to come from the device for that.
        return f"Network({type(self.forward).__name__.strip('_')}, {size(self.params)} weights)"

    def __call__(self, params: PyTree, x: Float[Array, "B ..."]) -> Float[Array, "B ... C"]:
        """Outputs (logits, or means of a regression) at `params` for a batch of inputs.

        Matrix products and convolutions that state no precision of their own are computed in full precision, and so are
        their derivatives, of which the curvature is made (`bnnlaplace.core.linalg` says why). The outputs of a model that
        computes in fewer bits are float32.
        """
        with all_products():
            outputs = self.forward(self.frozen, params, x)
        is_short = hasattr(outputs, "dtype") and jnp.issubdtype(outputs.dtype, jnp.floating)
        return outputs.astype(summed_type(outputs.dtype)) if is_short else outputs

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
        _check_hashable(forward, "from_linen")
        return cls(forward, _as_weights(variables["params"], "from_linen(variables=...)"), _as_arrays(frozen))

    @classmethod
    def from_nnx(cls, model: Any, **call_arguments: Any) -> "Network":
        """Wrap a Flax NNX model.

        Parameters
        ----------
        model
            A `flax.nnx.Module` in evaluation mode: call `model.eval()` first. Its `nnx.Param` variables, with those of
            `nnx.LoRAParam`, are the weights, as nested dictionaries that `nnx.update(model, params)` takes back; all
            other state is frozen. The model is copied, neither kept nor changed.
        call_arguments
            Keyword arguments of every call.

        Raises
        ------
        TypeError
            If `model` is no such module.

        Examples
        --------
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> network = Network.from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> network(network.params, jnp.ones((5, 2))).shape
        (5, 3)
        """
        from flax import nnx

        if not isinstance(model, nnx.Module):
            raise TypeError(
                f"from_nnx(model=...) must be a flax.nnx.Module; got {type(model).__name__}; a Linen module is wrapped "
                "by Network.from_linen(module, variables)"
            )
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        forward = _NNXForward(graph, tuple(sorted(call_arguments.items())))
        _check_hashable(forward, "from_nnx")
        weights = _as_weights(nnx.to_pure_dict(params), "from_nnx(model=...)")
        return cls(forward, weights, _as_arrays(nnx.to_pure_dict(rest)))

    @classmethod
    def from_function(cls, function: Callable[[PyTree, Array], Array], params: PyTree) -> "Network":
        """Wrap a plain function `f(params, x) -> outputs` of shape (B, ..., C).

        Pass the same function object each time: compiled code is kept per function. So it must not read anything that
        changes, but for its arguments.

        Parameters
        ----------
        function
            Deterministic, of one example at a time: outputs of a row of x depend on that row alone.
        params
            Its weights, any pytree of arrays.

        Examples
        --------
        >>> import jax.numpy as jnp
        >>> network = Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))
        >>> network(network.params, jnp.ones((5, 2))).shape
        (5, 3)
        """
        return cls(_PlainForward(function), _as_weights(params, "from_function(params=...)"), {})

    def with_params(self, params: PyTree) -> "Network":
        """The same network at other weights.

        Parameters
        ----------
        params
            Weights of the same structure.
        """
        return Network(self.forward, params, self.frozen)

    def subset(self, selected: Callable[[str], bool]) -> "Network":
        """The same function of some of the weights, the others frozen.

        Parameters
        ----------
        selected
            Whether a weight is to have a posterior, from its path, such as "Dense_0/kernel"; `leaf_names` lists them.

        Returns
        -------
        Network
            `params` has None in place of every weight that is frozen now. `full_params` puts them in again.

        Raises
        ------
        ValueError
            If no path is selected; the message lists those that there are.
        """
        names = leaf_names(self.params)
        chosen = [bool(selected(name)) for name in names]
        if not any(chosen):
            raise ValueError(f"a subset of weights must match at least one of the paths {names}; it matches none")
        if all(chosen):
            return self
        leaves, structure = jax.tree.flatten(self.params)
        kept = structure.unflatten([leaf if c else None for leaf, c in zip(leaves, chosen, strict=True)])
        rest = structure.unflatten([None if c else leaf for leaf, c in zip(leaves, chosen, strict=True)])
        return Network(_SubsetForward(self.forward), kept, {"frozen": self.frozen, "weights": rest})

    def scaled(self, factors: Float[Array, " P"]) -> "Network":
        """The same function of other coordinates of the weights, `params / factors`, at the same point.

        Its Jacobian is this one's times `factors`, column by column: with factors D^-1/2 it is the network in whose
        weights a prior of precisions tau D is isotropic. Its weights are float32 at least, as rounding would move them.
        """
        wide = jax.tree.map(lambda leaf: leaf.astype(summed_type(leaf.dtype)), self.params)
        unravel = unraveler(wide)
        frozen = {"frozen": self.frozen, "factors": unravel(factors)}
        forward = _ScaledForward(self.forward, tuple(leaf.dtype for leaf in jax.tree.leaves(self.params)))
        return Network(forward, unravel(ravel(wide) / factors), frozen)

    def linearised(self) -> "Network":
        """The first-order expansion f(params) + J(params) (theta - params) in the weights, as a network of theta.

        Its Jacobian is this one's at `params`, wherever theta is.
        """
        return Network(_LinearisedForward(self.forward), self.params, {"frozen": self.frozen, "centre": self.params})

    def unlinearised(self) -> "Network":
        """The network that this is the first-order expansion of, at the point of the expansion; itself if it is none.

        Both have the same Jacobian.
        """
        if not self.is_linearised:
            return self
        return Network(self.forward.forward, self.frozen["centre"], self.frozen["frozen"])

    @property
    def is_subset(self) -> bool:
        """Whether some weights of the user's model are frozen."""
        forward = self.forward
        while not isinstance(forward, _SubsetForward):
            if not hasattr(forward, "forward"):
                return False
            forward = forward.forward
        return True

    @property
    def is_linearised(self) -> bool:
        """Whether this is the first-order expansion of another network."""
        return isinstance(self.forward, _LinearisedForward)

    def full_params(self, params: PyTree) -> PyTree:
        """All weights, with `params` in the places of those that have a posterior: as the user's model holds them.

        Parameters
        ----------
        params
            A pytree like `self.params`, such as one posterior sample.
        """
        forward, frozen = self.forward, self.frozen
        while isinstance(forward, (_SubsetForward, _LinearisedForward)):
            if isinstance(forward, _SubsetForward):
                params = _merged(params, frozen["weights"])
            forward, frozen = forward.forward, frozen["frozen"]
        return params


@dataclass(frozen=True)
class _LinenForward:
    """Calls a Linen module; two of them are equal where their modules are, so compiled code is shared."""

    module: Any
    call_arguments: tuple[tuple[str, Any], ...]

    def __call__(self, frozen: PyTree, params: PyTree, x: Array) -> Array:
        return self.module.apply({"params": params, **frozen}, x, **dict(self.call_arguments))


@dataclass(frozen=True)
class _NNXForward:
    """Calls a fresh NNX model built from a graph definition, which compares by value."""

    graph: Any
    call_arguments: tuple[tuple[str, Any], ...]

    def __call__(self, frozen: PyTree, params: PyTree, x: Array) -> Array:
        return self.instance(frozen, params)(x)

    def instance(self, frozen: PyTree, params: PyTree) -> Callable[[Array], Array]:
        """The model, which changes its state with every call where it is not deterministic."""
        from flax import nnx

        return partial(nnx.merge(self.graph, params, frozen), **dict(self.call_arguments))


@dataclass(frozen=True)
class _PlainForward:
    function: Callable[[PyTree, Array], Array]

    def __call__(self, frozen: PyTree, params: PyTree, x: Array) -> Array:
        return self.function(params, x)


@dataclass(frozen=True)
class _SubsetForward:
    """Calls another forward pass with the frozen weights filled in."""

    forward: Callable[[PyTree, PyTree, Array], Array]

    def __call__(self, frozen: PyTree, params: PyTree, x: Array) -> Array:
        return self.forward(frozen["frozen"], _merged(params, frozen["weights"]), x)


@dataclass(frozen=True)
class _ScaledForward:
    forward: Callable[[PyTree, PyTree, Array], Array]
    dtypes: tuple[Any, ...]

    def __call__(self, frozen: PyTree, params: PyTree, x: Array) -> Array:
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.multiply, params, frozen["factors"]))
        own = [leaf.astype(dtype) for leaf, dtype in zip(leaves, self.dtypes, strict=True)]
        return self.forward(frozen["frozen"], structure.unflatten(own), x)


@dataclass(frozen=True)
class _LinearisedForward:
    forward: Callable[[PyTree, PyTree, Array], Array]

    def __call__(self, frozen: PyTree, params: PyTree, x: Array) -> Array:
        step = jax.tree.map(jnp.subtract, params, frozen["centre"])
        outputs, change = jax.jvp(lambda p: self.forward(frozen["frozen"], p, x), (frozen["centre"],), (step,))
        return outputs + change


def _merged(some: PyTree, others: PyTree) -> PyTree:
    """Two trees that hold None in each other's places, as one."""
    return jax.tree.map(lambda a, b: b if a is None else a, some, others, is_leaf=lambda leaf: leaf is None)


def _check_hashable(forward: Any, where: str) -> None:
    try:
        hash(forward)
    except TypeError as error:
        raise ValueError(
            f"{where}: the module and its call arguments must be hashable, as compiled code is kept by them; {error}; "
            "make arrays among them tuples, variables of the module, or a part of the inputs"
        ) from None


def _as_weights(tree: PyTree, where: str) -> PyTree:
    """Arrays, of which there is at least one, and all can be differentiated in."""
    found = _as_arrays(tree)
    numbers = zip(leaf_names(found), jax.tree.leaves(found), strict=True)
    wrong = [f"{name} ({leaf.dtype})" for name, leaf in numbers if not jnp.issubdtype(leaf.dtype, jnp.floating)]
    if wrong or not jax.tree.leaves(found):
        got = f"{', '.join(wrong)}; keep those out of the weights" if wrong else "none"
        raise ValueError(f"the weights of {where} must be arrays of real floating-point numbers; got {got}")
    return found


def _as_arrays(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.asarray, tree)
