"""A network as the rest of the package sees it: a function of its weights and inputs, with all else frozen."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, PyTree, Shaped

from bnnlaplace.core import checks
from bnnlaplace.core.linalg import all_products
from bnnlaplace.core.tree import leaf_names, ravel, size, summed_type, unraveler
from bnnlaplace.model.arrays import used_type
from bnnlaplace.model.boxes import unboxed
from bnnlaplace.model.forward import LinenForward, NNXForward, PlainForward, key_of
from bnnlaplace.model.weights import like_weights
from bnnlaplace.model.wide_sums import with_wide_sums


@partial(jax.tree_util.register_dataclass, data_fields=("params", "frozen"), meta_fields=("forward",))
@dataclass(frozen=True, repr=False)
class Network:
    """A deterministic function of weights and inputs, together with the weights at which it is expanded.

    Build one with `from_linen`, `from_nnx` or `from_function`. A network is a pytree whose leaves are those of `params`
    and `frozen`, so that a jitted function of it does not compile again when the weights change.

    Attributes
    ----------
    forward
        The function (frozen, params, x) -> outputs. It is hashable, and compared by value if the user's module is.
    params
        The weights that have a posterior.
    frozen
        All other arrays that the forward pass reads, such as batch statistics. They never change.
    """

    forward: Callable[[PyTree, PyTree, Any], Any]
    params: PyTree
    frozen: PyTree

    def __repr__(self) -> str:
        # JAX prints the arguments of a function that it traces. The weights would have to be copied from the device.
        return f"Network({type(self.forward).__name__.strip('_')}, {size(self.params)} weights)"

    def __call__(self, params: PyTree, x: PyTree[Shaped[ArrayLike, "B ..."]]) -> Float[Array, "B ... C"]:
        """Return the outputs (logits, or means of a regression) at `params` for a batch of inputs.

        Outputs are float32 or wider, even if the model computes in fewer bits. Matrix products and convolutions run in
        full precision unless the model states one, and so do their derivatives, which the curvature is computed from
        (`bnnlaplace.core.linalg` says why).
        """
        with all_products():
            outputs = with_wide_sums(self.forward, self.frozen, params, x)
        # Only a floating-point array is widened. Any other result is returned as it is: `spec` refuses it by name.
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
            The collections that `module.init` returns, as training left them. "params" holds the weights. Every other
            collection, such as the batch statistics, is frozen.
        call_arguments
            Keyword arguments of every call, such as `train=False`. They must make the module deterministic.

        Raises
        ------
        TypeError
            If `module` is not a `flax.linen.Module`, or `variables` is not a dictionary.
        ValueError
            If `variables` has no collection "params", or its weights are not floating-point numbers.

        Notes
        -----
        A module of several inputs takes them in a tuple, in the order of its parameters, or in a dictionary by their
        names: fit(((tokens, mask), y)) or fit(({"tokens": tokens, "mask": mask}, y)). Optional inputs need the
        dictionary. A module whose call has one parameter without a default gets a tuple as it is.

        Examples
        --------
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> module = nn.Dense(3)
        >>> variables = module.init(jax.random.key(0), jnp.ones((1, 2)))
        >>> network = Network.from_linen(module, variables)
        >>> network(network.params, jnp.ones((5, 2))).shape
        (5, 3)
        """
        from flax import linen  # a user of plain functions needs no Flax

        if not isinstance(module, linen.Module):
            raise TypeError(
                f"from_linen(module=...) must be a flax.linen.Module; got {type(module).__name__}; an NNX model is "
                "wrapped by Network.from_nnx(model), a function by from_function"
            )
        if not isinstance(variables, Mapping):
            raise TypeError(
                f"from_linen(variables=...) must be the dictionary that module.init returns; got "
                f"{type(variables).__name__}; pass {{'params': params}} if these are the parameters"
            )
        if "params" not in variables:
            raise ValueError(
                f"from_linen(variables=...) must hold a collection 'params'; got {sorted(variables)}; "
                "pass {'params': params} if these are the parameters themselves"
            )
        frozen = {name: collection for name, collection in variables.items() if name != "params"}
        forward = LinenForward(key_of((module, call_arguments)), module, call_arguments)
        return cls(
            forward,
            _as_weights(variables["params"], "from_linen(variables=...)"),
            _as_arrays(frozen, "from_linen(variables=...)"),
        )

    @classmethod
    def from_nnx(cls, model: Any, **call_arguments: Any) -> "Network":
        """Wrap a Flax NNX model.

        Parameters
        ----------
        model
            A `flax.nnx.Module` in evaluation mode: call `model.eval()` first. The weights are its `nnx.Param`
            variables, including `nnx.LoRAParam`, as nested dictionaries that `nnx.update(model, params)` takes back.
            All other state is frozen. The model is copied: later changes to it have no effect on the network.
        call_arguments
            Keyword arguments of every call. A model of several inputs takes them as in `from_linen`.

        Raises
        ------
        TypeError
            If `model` is not a `flax.nnx.Module`.

        Examples
        --------
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> network = Network.from_nnx(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
        >>> network(network.params, jnp.ones((5, 2))).shape
        (5, 3)
        """
        from flax import nnx  # a user of plain functions needs no Flax

        if not isinstance(model, nnx.Module):
            raise TypeError(
                f"from_nnx(model=...) must be a flax.nnx.Module; got {type(model).__name__}; a Linen module is wrapped "
                "by Network.from_linen(module, variables)"
            )
        graph, params, rest = nnx.split(model, nnx.Param, ...)
        forward = NNXForward(key_of((graph, call_arguments)), graph, call_arguments)
        weights = _as_weights(nnx.to_pure_dict(params), "from_nnx(model=...)")
        return cls(forward, weights, _as_arrays(nnx.to_pure_dict(rest), "from_nnx(model=...)"))

    @classmethod
    def from_function(cls, function: Callable[[PyTree, Any], Any], params: PyTree) -> "Network":
        """Wrap a plain function `f(params, x) -> outputs` of shape (B, ..., C).

        Pass the same function object each time, because compiled code is kept for each object. For the same reason the
        function must not read anything that changes except its arguments.

        Parameters
        ----------
        function
            A deterministic function. Its outputs for one row of x must depend on that row alone.
        params
            The weights: any pytree of arrays. If they are in boxes of Flax, such as those of `nn.with_partitioning` or
            of `nnx.state`, the function gets the boxes, and the paths of the weights leave them out.

        Raises
        ------
        TypeError
            If `function` cannot be called.
        ValueError
            If there are no weights, or they are not floating-point numbers.

        Examples
        --------
        >>> import jax.numpy as jnp
        >>> network = Network.from_function(lambda w, x: x @ w, jnp.ones((2, 3)))
        >>> network(network.params, jnp.ones((5, 2))).shape
        (5, 3)
        """
        if not callable(function):
            raise TypeError(
                f"from_function(function=...) must be a function of weights and inputs; got {type(function).__name__}"
            )
        weights = _as_weights(params, "from_function(params=...)")
        boxes = jax.tree.structure(params)
        return cls(PlainForward.of(function, boxes if boxes != jax.tree.structure(weights) else None), weights, {})

    def with_params(self, params: PyTree) -> "Network":
        """Return the same network at other weights.

        Parameters
        ----------
        params
            Weights with the same paths and shapes, of any floating-point type. ValueError if they are none.
        """
        weights = like_weights(params, self.params, "with_params(params=...)")
        return Network(self.forward, jax.tree.map(jnp.asarray, weights), self.frozen)

    def subset(self, selected: Callable[[str], bool]) -> "Network":
        """Freeze all weights but some: return the same network as a function of these alone.

        Parameters
        ----------
        selected
            A function from the path of a weight, such as "Dense_0/kernel", to whether the weight keeps its posterior.
            `bnnlaplace.core.leaf_names(network.params)` lists the paths.

        Returns
        -------
        Network
            Its `params` have None in place of every frozen weight. `full_params` fills the frozen weights in again.

        Raises
        ------
        ValueError
            If no path is selected. The message lists the paths.
        TypeError
            If `selected` is not a function.
        """
        if not callable(selected):
            raise TypeError(
                f"subset(selected=...) must be a function from the path of a weight to a bool; got {selected!r:.80}; "
                "try lambda path: 'Dense_0' in path"
            )
        names = leaf_names(self.params)
        is_selected = [bool(selected(name)) for name in names]
        if not any(is_selected):
            raise ValueError(f"a subset of weights must match at least one of the paths {names}; it matches none")
        if all(is_selected):
            return self  # a wrapper that freezes nothing would compile everything again
        leaves, structure = jax.tree.flatten(self.params)
        chosen = [leaf if keep else None for leaf, keep in zip(leaves, is_selected, strict=True)]
        others = [None if keep else leaf for leaf, keep in zip(leaves, is_selected, strict=True)]
        frozen = {"frozen": self.frozen, "weights": structure.unflatten(others)}
        return Network(_SubsetForward(self.forward), structure.unflatten(chosen), frozen)

    def scaled(self, factors: Float[Array, " P"]) -> "Network":
        """Change the coordinates of the weights to `params / factors`, at the same point.

        The Jacobian is multiplied by `factors`, column by column. With factors D^-1/2 a prior of precisions tau D
        becomes isotropic. The new weights are float32 or wider, because rounding to fewer bits would move the point.
        """
        wide = jax.tree.map(lambda leaf: leaf.astype(summed_type(leaf.dtype)), self.params)
        unravel = unraveler(wide)
        frozen = {"frozen": self.frozen, "factors": unravel(factors)}
        forward = _ScaledForward(self.forward, tuple(leaf.dtype for leaf in jax.tree.leaves(self.params)))
        return Network(forward, unravel(ravel(wide) / factors), frozen)

    def linearised(self) -> "Network":
        """Return the first-order expansion f(params) + J(params) (theta - params), as a network with weights theta.

        Its Jacobian is J(params) at every theta. Theta is float32 or wider: rounded to 16 bits, small steps would be
        lost.
        """
        wide = jax.tree.map(lambda leaf: leaf.astype(summed_type(leaf.dtype)), self.params)
        return Network(_LinearisedForward(self.forward), wide, {"frozen": self.frozen, "centre": self.params})

    def unlinearised(self) -> "Network":
        """Return the network that was linearised, at the point of the expansion. Any other network returns itself.

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

    def whole(self) -> "Network":
        """Return the network as a function of all weights, at the same point: the one that `subset` was called on."""
        forward, frozen = self.forward, self.frozen
        while isinstance(forward, (_SubsetForward, _LinearisedForward)):
            forward, frozen = forward.forward, frozen["frozen"]
        return Network(forward, self._filled(self.params), frozen)

    @property
    def is_linearised(self) -> bool:
        """Whether this is the first-order expansion of another network."""
        return isinstance(self.forward, _LinearisedForward)

    def full_params(self, params: PyTree) -> PyTree:
        """Fill the frozen weights in: return all weights as the user's model holds them.

        Parameters
        ----------
        params
            A pytree like `self.params`, such as one posterior sample. ValueError if it has other paths or shapes.
        """
        return self._filled(like_weights(params, self.params, "full_params(params=...)"))

    def _filled(self, params: PyTree) -> PyTree:
        forward, frozen = self.forward, self.frozen
        while isinstance(forward, (_SubsetForward, _LinearisedForward)):
            if isinstance(forward, _SubsetForward):
                params = _merged(params, frozen["weights"])
            forward, frozen = forward.forward, frozen["frozen"]
        return params


@dataclass(frozen=True)
class _SubsetForward:
    """Calls another forward pass with the frozen weights filled in."""

    forward: Callable[[PyTree, PyTree, Any], Any]

    def __call__(self, frozen: PyTree, params: PyTree, x: Any) -> Any:
        return self.forward(frozen["frozen"], _merged(params, frozen["weights"]), x)


@dataclass(frozen=True)
class _ScaledForward:
    """Calls another forward pass at the weights times factors, in the types that the model had."""

    forward: Callable[[PyTree, PyTree, Any], Any]
    dtypes: tuple[Any, ...]

    def __call__(self, frozen: PyTree, params: PyTree, x: Any) -> Any:
        leaves, structure = jax.tree.flatten(jax.tree.map(jnp.multiply, params, frozen["factors"]))
        original = [leaf.astype(dtype) for leaf, dtype in zip(leaves, self.dtypes, strict=True)]
        return self.forward(frozen["frozen"], structure.unflatten(original), x)


@dataclass(frozen=True)
class _LinearisedForward:
    """Calls the first-order expansion of another forward pass."""

    forward: Callable[[PyTree, PyTree, Any], Any]

    def __call__(self, frozen: PyTree, params: PyTree, x: Any) -> Any:
        # `jax.jvp` needs no Jacobian. It is linear in the step, so derivatives in `params` are those at the centre.
        step = jax.tree.map(lambda to, centre: (to - centre).astype(centre.dtype), params, frozen["centre"])
        outputs, change = jax.jvp(lambda p: self.forward(frozen["frozen"], p, x), (frozen["centre"],), (step,))
        return outputs + change


def _merged(some: PyTree, others: PyTree) -> PyTree:
    """Merge two trees, each of which holds None where the other one holds a leaf."""
    return jax.tree.map(lambda a, b: b if a is None else a, some, others, is_leaf=lambda leaf: leaf is None)


def _as_weights(tree: PyTree, where: str) -> PyTree:
    """Convert the leaves to arrays. Raise ValueError unless there is one, and every one can be differentiated in."""
    weights = _as_arrays(tree, where)
    named = zip(leaf_names(weights), jax.tree.leaves(weights), strict=True)
    wrong = [f"{name} ({leaf.dtype})" for name, leaf in named if not jnp.issubdtype(leaf.dtype, jnp.floating)]
    if wrong or not jax.tree.leaves(weights):
        got = f"{', '.join(wrong)}; keep those out of the weights" if wrong else "none"
        raise ValueError(f"the weights of {where} must be arrays of real floating-point numbers; got {got}")
    return weights


def _as_arrays(tree: PyTree, where: str) -> PyTree:
    """Convert the leaves to arrays of JAX, outside of the boxes of Flax."""
    tree = unboxed(tree)
    for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True):
        checks.unmasked(leaf, f"{where}: {name!r:.80}")
    wrong = [
        f"{name} ({type(leaf).__name__})"
        for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree), strict=True)
        if not _is_numeric(leaf)
    ]
    if wrong:
        raise ValueError(
            f"{where} must hold arrays of numbers; got {', '.join(wrong[:5])}; a pytree must be registered with JAX"
        )
    return jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf) if np.ma.isMaskedArray(leaf) else leaf), tree)


def _is_numeric(leaf: Any) -> bool:
    """Whether JAX can make an array of numbers or random keys of a leaf."""
    if isinstance(leaf, (jax.Array, bool, int, float, complex)):
        return True
    return hasattr(leaf, "dtype") and hasattr(leaf, "__array__") and used_type(leaf.dtype) is not None
