"""The forward passes of users' models: how each kind is called, and under which key its compiled code is found."""

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree


@dataclass(frozen=True)
class LinenForward:
    """Calls a Linen module. Equal modules share compiled code, because they are compared by a key of their values."""

    key: Hashable
    module: Any = field(compare=False)
    call_arguments: Mapping[str, Any] = field(compare=False)

    def __call__(self, frozen: PyTree, params: PyTree, x: Any) -> Any:
        arguments = self.call_arguments
        method = arguments.get("method") or "__call__"
        method = getattr(type(self.module), method) if isinstance(method, str) else method
        signature = method if hasattr(method, "__self__") else partial(method, self.module)
        return call(partial(self.module.apply, {"params": params, **frozen}), x, arguments, signature)


@dataclass(frozen=True)
class NNXForward:
    """Calls a fresh NNX model built from its graph definition, which is compared by value."""

    key: Hashable
    graph: Any = field(compare=False)
    call_arguments: Mapping[str, Any] = field(compare=False)

    def __call__(self, frozen: PyTree, params: PyTree, x: Any) -> Any:
        return self.instance(frozen, params)(x)

    def instance(self, frozen: PyTree, params: PyTree) -> Callable[[Any], Any]:
        """Build the model. If it is not deterministic, every call of it changes its state."""
        from flax import nnx

        model = nnx.merge(self.graph, params, frozen)
        return lambda x: call(model, x, self.call_arguments, model)


@dataclass(frozen=True)
class PlainForward:
    """Calls a function that has nothing frozen, with its weights in the boxes in which the user has them."""

    key: Hashable
    function: Callable[[PyTree, Any], Any] = field(compare=False)
    boxes: Any = field(compare=False)

    @classmethod
    def of(cls, function: Callable[[PyTree, Any], Any], boxes: Any = None) -> "PlainForward":
        """The call of a function. `boxes` is the structure of its weights with boxes; None if there are none."""
        # Tuples of two lengths: a structure cannot be compared with None.
        return cls(key_of((function,) if boxes is None else (function, boxes)), function, boxes)

    def __call__(self, frozen: PyTree, params: PyTree, x: Any) -> Any:
        if self.boxes is not None:
            params = self.boxes.unflatten(jax.tree.leaves(params))
        return self.function(params, x)


# --- one input or several ---------------------------------------------------------------------------------------


def call(function: Callable[..., Any], inputs: Any, arguments: Mapping[str, Any], signature: Callable[..., Any]) -> Any:
    """Call a module with inputs and further keyword arguments.

    A module that needs two or more inputs is called with the entries of a tuple or list in their order, or of a
    dictionary by their names. A dictionary whose keys are names of two or more of its parameters is taken apart, too,
    so that optional inputs can be given. Anything else is the one input, whatever pytree it is.

    Parameters
    ----------
    function
        What is called.
    inputs
        One input, or several in a tuple, a list or a dictionary.
    arguments
        Keyword arguments that are the same in every call. They are not inputs.
    signature
        The function whose parameters are those of the module, without `self`.
    """
    names, needed = _parameters(signature, arguments)
    if isinstance(inputs, Mapping) and len(names) > 1 and needed <= set(inputs) <= set(names):
        return function(**inputs, **arguments)
    if isinstance(inputs, (tuple, list)) and not hasattr(inputs, "_fields") and len(needed) > 1:
        return function(*inputs, **arguments)
    return function(inputs, **arguments)


def _parameters(signature: Callable[..., Any], arguments: Mapping[str, Any]) -> tuple[list[str], set[str]]:
    """The names of the parameters that inputs may be given to, and of those that have no default."""
    try:
        parameters = inspect.signature(signature).parameters.values()
    except (TypeError, ValueError):  # a builtin
        return [], set()
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    free = [each for each in parameters if each.kind in kinds and each.name not in arguments]
    return [each.name for each in free], {each.name for each in free if each.default is inspect.Parameter.empty}


# --- keys of compiled code ---------------------------------------------------------------------------------------


def key_of(value: Any) -> Hashable:
    """A hashable key of a module or an argument: equal for equal values, so that they share compiled code.

    What cannot be hashed is taken apart, such as lists, dictionaries, arrays, and dataclasses that hold them. An object
    that cannot be taken apart is compared by identity.
    """
    try:
        hash(value)
    except TypeError:
        return _key_of_unhashable(value)
    return value


def _key_of_unhashable(value: Any) -> Hashable:
    kind = type(value)
    if isinstance(value, (list, tuple)):
        return kind, tuple(map(key_of, value))
    if isinstance(value, (set, frozenset)):
        return kind, frozenset(map(key_of, value))
    if isinstance(value, partial):
        return kind, key_of(value.func), key_of(value.args), key_of(value.keywords)
    if hasattr(value, "items"):  # a dictionary, or a configuration that is like one
        return kind, tuple((key_of(name), key_of(entry)) for name, entry in sorted(value.items(), key=_repr_of_first))
    if hasattr(value, "__array__"):
        try:
            array = np.asarray(value)
        except Exception:  # random keys, for one
            return _Identity(value)
        if array.dtype != object:
            return kind, array.shape, array.dtype.name, array.tobytes()
    if dataclasses.is_dataclass(value):
        # `parent` and `name` of an unbound Linen module say nothing of what it computes.
        fields = [field.name for field in dataclasses.fields(value) if field.compare]
        return kind, tuple((name, key_of(getattr(value, name))) for name in fields if hasattr(value, name))
    return _Identity(value)


def _repr_of_first(item: tuple[Any, Any]) -> str:
    """Order keys that need not be comparable."""
    return repr(item[0])


class _Identity:
    """An object that is equal to itself alone. The reference keeps its identity from being used again."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Identity) and other.value is self.value

    def __hash__(self) -> int:
        return id(self.value)
