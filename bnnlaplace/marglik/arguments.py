"""The arguments of `marglik_training`, checked, and what the loop makes of them."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array

from bnnlaplace.core import checks
from bnnlaplace.core.tree import described, num_examples
from bnnlaplace.marglik.objective import EvidenceOptions
from bnnlaplace.marglik.steps import MarglikSettings, TrainForward
from bnnlaplace.model import likelihood as likelihoods
from bnnlaplace.model.data import Data, as_data, check_fits_model
from bnnlaplace.model.likelihood import Likelihood
from bnnlaplace.model.network import Network
from bnnlaplace.prior import Groups, group_names, resolve

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
    evidence_memory: int,
    batch_size: int,
    curvature_batch_size: int | None,
    num_matvecs: int | None,
    num_probes: int | None,
    gradient: str,
    prior_optimizer: Any,
    train_forward: TrainForward | None,
    microbatch: int,
) -> Plan:
    """Check all arguments and fill in what was left out."""
    checks.key(key, f"{CALLER}(key=...)")
    _check_choices(method, hessian_structure, prior_structure, gradient)
    _check_owners(method, hessian_structure, num_matvecs, num_probes, gradient, prior_optimizer)
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
    batch_size = checks.count(batch_size, f"{CALLER}(batch_size=...)", advice="try 64")
    batch_size = min(batch_size, first) if is_array else first
    size = curvature_batch_size or batch_size
    checks.count(size, f"{CALLER}(curvature_batch_size=...)", most=first, advice=f"the data give {first} at a time")
    every = evidence_every if evidence_every is not None else 10 if method == "joint" else 1
    checks.count(every, f"{CALLER}(evidence_every=...)", advice="try 10")
    _check_evidence_is_due(method, every, num_epochs, burn_in_epochs, settle_epochs)
    checks.count(evidence_memory, f"{CALLER}(evidence_memory=...)", advice="try 10")
    if prior_optimizer is None:
        import optax  # whoever trains with an optax optimiser has it

        prior_optimizer = optax.adam(0.03)
    defaults = (10, 1) if method == "joint" else (20, 8)
    options = EvidenceOptions(
        hessian_structure, num_matvecs or defaults[0], num_probes or defaults[1], gradient, microbatch
    )
    num_data = float(data.total_weight)
    settings = MarglikSettings(
        optimizer, prior_optimizer, num_data, method, options, prior_groups, train_forward, evidence_memory
    )
    last = num_epochs - settle_epochs
    return Plan(settings, network, likelihood, data, key, burn_in_epochs, last, every, batch_size, size, is_array)


def _check_choices(method: str, hessian_structure: str, prior_structure: str, gradient: str) -> None:
    checks.choice(method, f"{CALLER}(method=...)", ("joint", "online"))
    checks.choice(hessian_structure, f"{CALLER}(hessian_structure=...)", ("lanczos", "diag"))
    checks.choice(prior_structure, f"{CALLER}(prior_structure=...)", ("scalar", "layerwise"))
    checks.choice(gradient, f"{CALLER}(gradient=...)", ("adjoint", "quadrature"))


def _check_owners(
    method: str,
    hessian_structure: str,
    num_matvecs: int | None,
    num_probes: int | None,
    gradient: str,
    prior_optimizer: Any,
) -> None:
    """Raise ValueError if an option of one method or structure was given to another."""
    for name, value in (("num_matvecs", num_matvecs), ("num_probes", num_probes)):
        if value is None:
            continue
        checks.count(value, f"{CALLER}({name}=...)", advice="try 10")
        if hessian_structure == "diag":
            raise ValueError(
                f"{CALLER}({name}=...) must be left out unless hessian_structure='lanczos'; got {value} with 'diag'; "
                "the diagonal is exact"
            )
    given = {"prior_optimizer": prior_optimizer is not None, "gradient": gradient != "adjoint"}
    for name in (name for name, is_given in given.items() if is_given and method == "online"):
        raise ValueError(
            f"{CALLER}({name}=...) must be left out unless method='joint'; got it with 'online', which sets the prior "
            "to the maximiser of the evidence and does not differentiate the log-determinant in the weights"
        )


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
