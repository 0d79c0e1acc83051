"""The arguments of `marglik_training`, checked, and what the loop makes of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, PyTree

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described, num_examples
from bnnlaplace.marglik.objective import EvidenceOptions
from bnnlaplace.marglik.steps import MarglikSettings, TrainForward
from bnnlaplace.model import likelihood as likelihoods
from bnnlaplace.model.data import Data, as_data, check_fits_model
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
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
) -> Plan:
    """Check all arguments and fill in what was left out."""
    checks.key(key, f"{CALLER}(key=...)")
    _check_choices(method, hessian_structure, prior_structure, gradient)
    _check_products(hessian_structure, num_matvecs, num_probes, gradient)
    of_joint = {"prior_optimizer": prior_optimizer, "evidence_memory": evidence_memory}
    _check_method(method, of_joint | {"gradient": None if gradient == "adjoint" else gradient})
    for name, value in (("optimizer", optimizer), ("prior_optimizer", prior_optimizer)):
        if value is not None and not (hasattr(value, "init") and hasattr(value, "update")):
            raise ValueError(
                f"{CALLER}({name}=...) must be an optax optimiser; got {described(value)}; try optax.adam(1e-3)"
            )
    _check_epochs(num_epochs, burn_in_epochs, settle_epochs)
    likelihood = likelihoods.resolve(likelihood, sigma_noise)
    _check_prior(prior_precision, prior_structure, network, prior_groups)
    data = as_data(data)
    data.check_repeatable(f"{CALLER}(data=...) must be arrays or batches that can be read again")
    is_array = data.length is not None
    data = data.checked(lambda inputs, targets: check_fits_model(network, likelihood, inputs, targets))
    for _ in data:  # a pass that checks the data and counts the examples
        pass
    first = num_examples(data.first)
    batch_size = _batch_size(batch_size, first, is_array)
    size = batch_size if curvature_batch_size is None else curvature_batch_size
    checks.count(size, f"{CALLER}(curvature_batch_size=...)", most=first, advice=f"the data give {first} at a time")
    every = evidence_every if evidence_every is not None else 10 if method == "joint" else 1
    checks.count(every, f"{CALLER}(evidence_every=...)", advice="try 10")
    _check_evidence_is_due(method, every, num_epochs, burn_in_epochs, settle_epochs)
    memory = 10 if evidence_memory is None else evidence_memory
    checks.count(memory, f"{CALLER}(evidence_memory=...)", advice="try 10")
    if prior_optimizer is None:
        import optax  # whoever trains with an optax optimiser has it

        prior_optimizer = optax.adam(0.03)
    defaults = (10, 1) if method == "joint" else (20, 8)
    options = EvidenceOptions(
        hessian_structure, num_matvecs or defaults[0], num_probes or defaults[1], gradient, microbatch
    )
    num_data = float(data.total_weight)
    settings = MarglikSettings(
        optimizer, prior_optimizer, num_data, method, options, prior_groups, train_forward, memory
    )
    if start is not None:
        _check_start(start, settings, network, prior_structure, num_epochs)
    last = num_epochs - settle_epochs
    return Plan(settings, network, likelihood, data, key, burn_in_epochs, last, every, batch_size, size, is_array)


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
