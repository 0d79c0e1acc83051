"""The arguments of `marglik_training`, checked, and what the loop makes of them."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described, num_examples, on_one_line, size
from bnnlaplace.marglik.objective import EvidenceOptions
from bnnlaplace.marglik.steps import MarglikSettings, MarglikState, TrainForward
from bnnlaplace.model import likelihood as likelihoods
from bnnlaplace.model.data import Data, as_data, check_fits_model
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.model.spec import Shapes, call_refused, output_shape
from bnnlaplace.prior import Groups, by_layer, group_names, resolve

CALLER = "marglik_training"


class Plan(NamedTuple):
    """What one call of `marglik_training` does in each epoch."""

    settings: MarglikSettings
    network: Network
    likelihood: Likelihood
    data: Data
    key: Array
    burn_in: int
    last: int  # the last epoch in which the evidence counts
    every: int
    batch_size: int
    curvature_size: int
    is_array: bool


def checked_plan(
    key: Any,
    network: Network,
    data: Any,
    optimizer: Any,
    *,
    num_epochs: int,
    likelihood: Any,
    sigma_noise: Any,
    method: str,
    hessian_structure: str,
    prior_structure: str,
    prior_precision: Any,
    prior_groups: Groups,
    burn_in_epochs: int,
    settle_epochs: int,
    evidence_every: int | None,
    evidence_memory: int | None,
    batch_size: int | None,
    curvature_batch_size: int | None,
    num_matvecs: int | None,
    num_probes: int | None,
    gradient: str,
    prior_optimizer: Any,
    train_forward: TrainForward | None,
    microbatch: int,
    start: Any,
    on_epoch: Any,
) -> Plan:
    """Check all arguments and fill in what was left out."""
    checks.key(key, f"{CALLER}(key=...)")
    _check_types(network, prior_groups, train_forward, start, on_epoch)
    _check_choices(method, hessian_structure, prior_structure, gradient)
    _check_products(hessian_structure, num_matvecs, num_probes, gradient)
    of_joint = {"prior_optimizer": prior_optimizer, "evidence_memory": evidence_memory}
    _check_method(method, of_joint | {"gradient": None if gradient == "adjoint" else gradient})
    for name, value in (("optimizer", optimizer), ("prior_optimizer", prior_optimizer)):
        is_left_out = value is None and name == "prior_optimizer"
        if not is_left_out and not (hasattr(value, "init") and hasattr(value, "update")):
            raise ValueError(
                f"{CALLER}({name}=...) must be an optax optimiser; got {described(value)}; try optax.adam(1e-3)"
            )
    _check_epochs(num_epochs, burn_in_epochs, settle_epochs)
    checks.count(microbatch, f"{CALLER}(microbatch=...)", advice="try 128")
    with checks.renamed(CALLER, "Laplace", "fit"):
        likelihood = likelihoods.resolve(likelihood, sigma_noise)
        _check_prior(prior_precision, prior_structure, network, prior_groups)
        data = _checked_data(data, network, likelihood)
    is_array = data.length is not None
    first = data.num_examples if is_array else num_examples(data.first)
    batch_size = _batch_size(batch_size, first, is_array)
    if train_forward is not None:
        _check_train_forward(train_forward, network, Shapes.of_example(data.first).batch(batch_size), key)
    used = batch_size if curvature_batch_size is None else curvature_batch_size
    checks.count(used, f"{CALLER}(curvature_batch_size=...)", most=first, advice=f"the data give {first} at a time")
    every = evidence_every if evidence_every is not None else 10 if method == "joint" else 1
    checks.count(every, f"{CALLER}(evidence_every=...)", advice="try 10")
    _check_evidence_is_due(method, every, num_epochs, burn_in_epochs, settle_epochs)
    memory = 10 if evidence_memory is None else evidence_memory
    checks.count(memory, f"{CALLER}(evidence_memory=...)", advice="try 10")
    if prior_optimizer is None:
        import optax  # whoever trains with an optax optimiser has it

        prior_optimizer = optax.adam(0.03)
    depth, probes = (10, 1) if method == "joint" else (20, 8)
    depth = _depth(num_matvecs, depth, network, data, used)
    options = EvidenceOptions(hessian_structure, depth, num_probes or probes, gradient, microbatch)
    num_data = float(data.num_examples)
    settings = MarglikSettings(
        optimizer, prior_optimizer, num_data, method, options, prior_groups, train_forward, memory
    )
    if start is not None:
        _check_start(start, settings, network, prior_structure, num_epochs)
    last = num_epochs - settle_epochs
    return Plan(settings, network, likelihood, data, key, burn_in_epochs, last, every, batch_size, used, is_array)


def _check_types(network: Any, groups: Any, train_forward: Any, start: Any, on_epoch: Any) -> None:
    """Raise TypeError or ValueError for what is of another type than it must be, before anything is asked of it."""
    if not isinstance(network, Network):
        raise TypeError(
            f"{CALLER}(network=...) must be a bnnlaplace.Network; got {type(network).__name__}; wrap a Flax model by "
            "Network.from_linen(module, variables) or Network.from_nnx(model), a function by from_function"
        )
    checks.function(groups, f"{CALLER}(prior_groups=...)", "lambda path: path.split('/')[0]")
    checks.function(on_epoch, f"{CALLER}(on_epoch=...)", "results.append")
    if train_forward is not None:
        checks.function(train_forward, f"{CALLER}(train_forward=...)", "lambda params, frozen, x, key: ...")
    state, history = getattr(start, "state", None), getattr(start, "history", None)
    is_history = isinstance(history, list) and all(isinstance(record, dict) for record in history)
    if start is not None and not (isinstance(state, MarglikState) and is_history):
        raise ValueError(
            f"{CALLER}(start=...) must be a MarglikResult, with a MarglikState and a list of dictionaries; got "
            f"{type(start).__name__}; pass what {CALLER} returned or gave to on_epoch"
        )


def _checked_data(data: Any, network: Network, likelihood: Likelihood) -> Data:
    """Return data that can be read again, after a pass that checks them and counts the examples."""
    data = as_data(data)
    data.check_repeatable(f"{CALLER}(data=...) must be arrays or batches that can be read again")
    data = data.checked(lambda inputs, targets: check_fits_model(network, likelihood, inputs, targets))
    for _ in data:
        pass
    return data


def _check_train_forward(train_forward: TrainForward, network: Network, inputs: PyTree, key: Array) -> None:
    """Raise ValueError unless the network in training mode has the outputs of `network` and gives `frozen` back."""
    where = f"{CALLER}(train_forward=...)"
    try:
        result = jax.eval_shape(train_forward, network.params, network.frozen, inputs, key)
    except Exception as error:  # whatever a user's function raises
        raise call_refused(f"{where} must take (params, frozen, x, key)", inputs, error) from error
    wanted = output_shape(network, inputs)
    is_pair = isinstance(result, tuple) and len(result) == 2
    if not is_pair or getattr(result[0], "shape", None) != wanted or not _are_alike(result[1], network.frozen):
        got = jax.tree.map(lambda leaf: leaf.shape, result)
        raise ValueError(
            f"{where} must return (outputs, frozen), with outputs {wanted} for a batch and arrays like those "
            f"of network.frozen; got shapes {on_one_line(got)}; return frozen as it is if nothing in it changes"
        )


def _depth(num_matvecs: int | None, default: int, network: Network, data: Data, curvature_size: int) -> int:
    """The Krylov depth: at most the length of the shorter vectors, which are those of weights and of outputs."""
    outputs = curvature_size * math.prod(output_shape(network, data.first)[1:])
    most = min(size(network.params), outputs)
    if num_matvecs is not None:
        advice = f"a curvature batch has {outputs} outputs, the network {size(network.params)} weights"
        checks.count(num_matvecs, f"{CALLER}(num_matvecs=...)", most=most, advice=advice)
    return min(default, most) if num_matvecs is None else num_matvecs


def _check_choices(method: str, hessian_structure: str, prior_structure: str, gradient: str) -> None:
    checks.choice(method, f"{CALLER}(method=...)", ("joint", "online"))
    checks.choice(hessian_structure, f"{CALLER}(hessian_structure=...)", ("lanczos", "diag"))
    checks.choice(prior_structure, f"{CALLER}(prior_structure=...)", ("scalar", "layerwise"))
    checks.choice(gradient, f"{CALLER}(gradient=...)", ("adjoint", "quadrature"))


def _check_products(hessian_structure: str, num_matvecs: int | None, num_probes: int | None, gradient: str) -> None:
    """Raise ValueError if an option of "lanczos" was given to "diag"."""
    for name, value in (("num_matvecs", num_matvecs), ("num_probes", num_probes)):
        if value is not None:
            checks.count(value, f"{CALLER}({name}=...)", advice="try 10")
    given = {"num_matvecs": num_matvecs, "num_probes": num_probes}
    given["gradient"] = None if gradient == "adjoint" else gradient
    for name, value in given.items():
        if value is not None and hessian_structure == "diag":
            raise ValueError(
                f"{CALLER}({name}=...) must be left out unless hessian_structure='lanczos'; got {value!r} with 'diag'; "
                "the diagonal and its gradient are exact"
            )


def _check_method(method: str, of_joint: dict[str, Any]) -> None:
    """Raise ValueError if an option of "joint" was given to "online"."""
    for name, value in of_joint.items():
        if value is not None and method == "online":
            raise ValueError(
                f"{CALLER}({name}=...) must be left out unless method='joint'; got it with 'online', which sets the "
                "prior to the maximiser of the evidence and does not differentiate the log-determinant in the weights"
            )


def _batch_size(batch_size: int | None, first: int, is_array: bool) -> int:
    """The number of examples in a batch: by default 64 of arrays, or as many as there are."""
    if batch_size is not None:
        checks.count(batch_size, f"{CALLER}(batch_size=...)", advice="try 64")
        if not is_array:
            raise ValueError(
                f"{CALLER}(batch_size=...) must be left out unless the data are arrays; got {batch_size} with batches, "
                "which are taken as they come; give the size to what makes them"
            )
    return min(batch_size or 64, first) if is_array else first


def _check_epochs(num_epochs: int, burn_in_epochs: int, settle_epochs: int) -> None:
    checks.count(num_epochs, f"{CALLER}(num_epochs=...)", advice="try 100")
    checks.count(burn_in_epochs, f"{CALLER}(burn_in_epochs=...)", least=0, advice="try 0")
    checks.count(settle_epochs, f"{CALLER}(settle_epochs=...)", least=0, advice="try 0")
    if burn_in_epochs + settle_epochs >= num_epochs:
        raise ValueError(
            f"{CALLER}(num_epochs=...) must leave epochs between burn_in_epochs and settle_epochs; got {num_epochs} "
            f"with {burn_in_epochs} and {settle_epochs}; train longer"
        )


def _check_evidence_is_due(method: str, every: int, num_epochs: int, burn_in_epochs: int, settle_epochs: int) -> None:
    """Raise ValueError if no epoch is due for an evidence step. "joint" takes its first in the first of them."""
    between = num_epochs - burn_in_epochs - settle_epochs
    if method == "online" and every > between:
        raise ValueError(
            f"{CALLER}(evidence_every=...) must be at most the number of epochs between burn_in_epochs and "
            f"settle_epochs, {between}, or the prior would stay as it is; got {every} with num_epochs={num_epochs}, "
            f"burn_in_epochs={burn_in_epochs} and settle_epochs={settle_epochs}; lower it, or train longer"
        )


def _check_prior(precision: Any, structure: str, network: Network, groups: Groups) -> None:
    """Raise ValueError unless the precisions to start from are those of the structure."""
    names = group_names(network.params, groups)
    if structure == "scalar" and groups is not by_layer:
        raise ValueError(
            f"{CALLER}(prior_groups=...) must be left out unless prior_structure='layerwise'; got groups {names} with "
            "'scalar', which has one precision for all weights"
        )
    if isinstance(precision, dict) and (structure == "scalar" or set(precision) != set(names)):
        raise ValueError(
            f"{CALLER}(prior_precision=...) must be one number, or for 'layerwise' one for each of {names}; got the "
            f"names {sorted(precision)} with {structure!r}"
        )
    if not isinstance(precision, dict) and np.ndim(precision) != 0:
        raise ValueError(
            f"{CALLER}(prior_precision=...) must be one number or a dictionary; got {described(precision)}; try 1.0"
        )
    resolve(precision, 0.0, network.params, groups, CALLER)


def _check_start(
    start: Any, settings: MarglikSettings, network: Network, prior_structure: str, num_epochs: int
) -> None:
    """Raise ValueError unless a result is one of the same training, which is not longer than `num_epochs`."""
    state, history = start.state, start.history
    if len(history) > num_epochs:
        raise ValueError(
            f"{CALLER}(num_epochs=...) must count the epochs of start, too; got {num_epochs} with a start of "
            f"{len(history)}; try {2 * len(history)}"
        )
    method = history[-1].get("method", settings.method) if history else settings.method
    if method != settings.method:
        raise ValueError(f"{CALLER}(method=...) must be that of start, {method!r}; got {settings.method!r}")
    layerwise = isinstance(state.log_precision, Mapping)
    if layerwise != (prior_structure == "layerwise"):
        trained = "layerwise" if layerwise else "scalar"
        raise ValueError(
            f"{CALLER}(prior_structure=...) must be that of start, {trained!r}; got {prior_structure!r}; to change it "
            "begin anew from start.network, with prior_precision=..."
        )
    names = group_names(network.params, settings.groups)
    if layerwise and set(state.log_precision) != set(names):
        raise ValueError(
            f"{CALLER}(prior_groups=...) must give the groups of start, {sorted(state.log_precision)}; got {names}"
        )
    logs = state.log_precision
    for name, kept, wanted in (
        ("network", (state.params, state.frozen), (network.params, network.frozen)),
        ("optimizer", state.opt_state, jax.eval_shape(settings.optimizer.init, network.params)),
        ("prior_optimizer", state.prior_opt_state, jax.eval_shape(settings.prior_optimizer.init, logs)),
    ):
        if not _are_alike(kept, wanted):
            raise ValueError(
                f"{CALLER}({name}=...) must be that of start; got one whose arrays have other names or shapes; begin "
                "anew from start.network"
            )


def _are_alike(one: PyTree, other: PyTree) -> bool:
    """Whether two pytrees have the same structure, and arrays of the same shapes."""
    shapes = [[np.shape(leaf) for leaf in jax.tree.leaves(tree)] for tree in (one, other)]
    return jax.tree.structure(one) == jax.tree.structure(other) and shapes[0] == shapes[1]
