"""A fitted Laplace on disk: which parts of it are written, and how they are put together again."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bnnlaplace.checkpoint import declared
from bnnlaplace.checkpoint.errors import CheckpointError, Damage, shown
from bnnlaplace.checkpoint.pytree import as_path, damaged, load_version, restructure, save_pytree
from bnnlaplace.core import checks
from bnnlaplace.core.tree import leaf_names, size
from bnnlaplace.evidence.log_likelihood import LogLikelihood
from bnnlaplace.evidence.lower_bound import Bound
from bnnlaplace.fitted import Fitted, Settings
from bnnlaplace.model.likelihood import (
    Likelihood,
    categorical,
    gaussian,
    is_ours,
    options_of,
    parameters_of,
    tempered,
    untempered,
    with_options,
)
from bnnlaplace.model.network import Network
from bnnlaplace.prior.gaussian import Prior, by_layer, is_by_group, is_scalar
from bnnlaplace.structure import BY_NAME, DenseStructure, Structure

# The fields of `LogLikelihood` under the names that the files have had since the first release.
_LOG_LIKELIHOOD = {
    "value": "log_likelihood",
    "gradient": "log_likelihood_gradient",
    "num_targets": "num_outputs",
    "squared_residuals": "squared_residuals",
}


@dataclass(frozen=True)
class StoredGroups:
    """Prior groups by the paths of the weights. A function cannot be written; this is what can be read back of it."""

    names: tuple[tuple[str, str], ...]

    def __call__(self, path: str) -> str:
        return dict(self.names)[path]


def save(path: Path | str, fitted: Fitted, settings: Settings) -> None:
    """Write a fitted Laplace: of the network its arrays, not the user's module. See `save_pytree`."""
    path = as_path(path, "save(path=...)")
    checks.known("save", fitted, settings)
    network, likelihood, prior = fitted.network, fitted.likelihood, fitted.prior
    precision, groups = settings.prior_precision, settings.prior_groups
    names = leaf_names(network.params)
    by_group = not is_scalar(precision) and is_by_group(precision, network.params, groups)
    tree = {
        "network": {"params": network.params, "frozen": network.frozen},
        # A likelihood of the user's own may hold Python numbers.
        "likelihood": [jnp.asarray(leaf) for leaf in jax.tree.leaves(likelihood)],
        "prior_precision": np.asarray(prior.precision),
        "structure": _arrays(fitted.structure),
        "fitted": {_LOG_LIKELIHOOD[name]: value for name, value in fitted.log_likelihood._asdict().items()},
    }
    if not prior.is_isotropic and not by_group:
        tree["relative_precision"] = prior.relative
    if np.ndim(prior.mean):
        tree["prior_mean"] = prior.mean
    if fitted.bound is not None:
        tree["bound"] = fitted.bound._asdict()
    if prior.curvature is not None:
        tree["prior_curvature"] = _arrays(prior.curvature)
    metadata = {
        "hessian_structure": settings.hessian_structure,
        "structure": type(fitted.structure).__name__,
        "likelihood": likelihood.name,
        "likelihood_is_ours": is_ours(likelihood),
        "likelihood_options": options_of(likelihood),
        "weights": names,
        "linearised": network.is_linearised,
        "groups": {name: groups(name) for name in names},
    }
    if by_group:
        metadata["prior_precision"] = {name: float(value) for name, value in precision.items()}
    save_pytree(path, tree, metadata)


def _arrays(structure: Structure) -> Any:
    """What is written of a structure. As a pytree a matrix is the words of its numbers, which serve `jit` alone."""
    if isinstance(structure, DenseStructure):
        return {"matrix": structure.matrix, "rounding": np.float64(structure.rounding)}
    return structure


def load(path: Path | str, network: Network, likelihood: Likelihood | None = None) -> tuple[Fitted, Settings]:
    """Read what `save` wrote.

    Parameters
    ----------
    path
        The directory.
    network
        A network of the same structure; its arrays are replaced by the saved ones.
    likelihood
        Needed if it is not one of the package's; its leaves are replaced by the saved ones.

    Raises
    ------
    CheckpointError
        If a file is damaged or holds no posterior, the likelihood is missing, or the network has another structure: the
        message names the file or the leaf.
    """
    if not isinstance(network, Network):
        raise TypeError(f"load(network=...) must be a bnnlaplace.Network; got {type(network).__name__}")
    path = as_path(path, "load(path=...)")
    stored, metadata, version = load_version(path)
    try:
        declared.check_parts(stored, metadata, version)
        return _posterior(path, stored, metadata, network, likelihood, version)
    except CheckpointError:
        raise
    except Damage as damage:
        raise damaged(path, str(damage)) from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        # Nothing that was saved leads here, but files can be made that the checks above do not foresee.
        words = str(error).split("\n")[0]
        raise damaged(path, f"it does not hold a posterior ({type(error).__name__}: {words:.80})") from None


def _posterior(
    path: Path,
    stored: dict[str, Any],
    metadata: dict[str, Any],
    network: Network,
    likelihood: Likelihood | None,
    version: int,
) -> tuple[Fitted, Settings]:
    """Put the parts together, each checked against the weights."""
    with_posterior = set(metadata.get("weights", ())) & set(leaf_names(network.params))
    if with_posterior:
        network = network.subset(with_posterior.__contains__)
    if metadata.get("linearised", False) and not network.is_linearised:
        network = network.linearised()
    arrays = restructure(path, stored["network"], {"params": network.params, "frozen": network.frozen})
    network = Network(network.forward, **arrays)
    names = leaf_names(network.params)
    if set(metadata.get("weights", names)) != set(names) or set(metadata.get("groups", names)) != set(names):
        raise Damage("its weights have other names in the metadata than in the tree")
    for name, leaf in zip(names, jax.tree.leaves(network.params), strict=True):
        declared.vector(leaf.reshape(-1), leaf.size, f"weights {name!r:.80}")
    settings = _settings(stored, metadata, size(network.params))
    structures = {cls.__name__: cls for cls in BY_NAME[metadata["hessian_structure"]]}
    kind = structures[metadata.get("structure", next(iter(structures)))]

    def structure(arrays: Any) -> Structure:
        restored = kind.from_arrays(arrays)
        declared.check_structure(restored, arrays, network.params, version)
        return restored

    curvature = structure(stored["prior_curvature"]) if "prior_curvature" in stored else None
    fitted = Fitted(
        network=network,
        likelihood=_likelihood(path, stored, metadata, likelihood),
        prior=_prior(stored, settings, network)._replace(curvature=curvature),
        structure=structure(stored["structure"]),
        log_likelihood=_log_likelihood(stored["fitted"], size(network.params), version),
        bound=_bound(stored["bound"]) if "bound" in stored else None,
    )
    return fitted, settings


def _prior(stored: dict[str, Any], settings: Settings, network: Network) -> Prior:
    """The prior of the settings, with its numbers as they were stored rather than computed again."""
    prior, precision = settings.prior(network), float(stored["prior_precision"])
    if not np.isclose(float(prior.precision), precision, rtol=1e-4):
        raise Damage("its prior precisions of weights or groups have another mean than its prior precision")
    if "relative_precision" in stored:
        prior = prior._replace(relative=jnp.asarray(stored["relative_precision"]))
    return prior._replace(precision=precision)


def _log_likelihood(stored: dict[str, Any], num_weights: int, version: int) -> LogLikelihood:
    # An earlier release did not write all numbers; they are needed to choose the noise of a regression.
    unknown = {"num_outputs": np.float64("nan"), "squared_residuals": np.float64("nan")} if version == 1 else {}
    numbers = {**unknown, **stored}
    if set(numbers) != set(_LOG_LIKELIHOOD.values()):
        raise Damage("it has not the numbers of a log likelihood")
    declared.number(numbers["log_likelihood"], "log likelihood")
    declared.vector(numbers["log_likelihood_gradient"], num_weights, "gradients of the log likelihood")
    declared.number(numbers["num_outputs"], "number of targets", least=0, may_be_unknown=True)
    declared.number(numbers["squared_residuals"], "sum of squared residuals", least=0, may_be_unknown=True)
    return LogLikelihood.from_arrays(**{name: numbers[_LOG_LIKELIHOOD[name]] for name in LogLikelihood._fields})


def _bound(stored: dict[str, Any]) -> Bound:
    if set(stored) != set(Bound._fields):
        raise Damage("it has not the numbers of an evidence lower bound")
    iterations = np.asarray(stored["iterations"])
    if iterations.shape != () or iterations.dtype.kind not in "iu" or iterations < 1:
        raise Damage(f"its number of iterations is {iterations!r:.80}")
    return Bound(
        np.float64(declared.number(stored["expected_log_likelihood"], "expected log likelihood")),
        np.float64(declared.number(stored["sem"], "standard error of the bound", least=0)),
        np.int64(iterations),
        np.float64(declared.number(stored["precision"], "prior precision of the bound", least=0, may_be_unknown=True)),
    )


def _likelihood(
    path: Path, stored: dict[str, Any], metadata: dict[str, Any], likelihood: Likelihood | None
) -> Likelihood:
    name = metadata["likelihood"]
    if likelihood is None:
        if not metadata.get("likelihood_is_ours", True):
            raise CheckpointError(
                f"{shown(path)} was fitted with the likelihood {name!r:.80} of your own; pass it: "
                "Laplace.load(path, network, likelihood)"
            )
        try:
            likelihood = with_options(name, metadata.get("likelihood_options", ()))
        except ValueError:
            raise Damage(f"its likelihood is {name!r:.80}, which there is not") from None
    leaves = [jnp.asarray(leaf) for leaf in stored.get("likelihood", [])]
    if likelihood.name != name or len(leaves) != len(jax.tree.leaves(likelihood)):
        raise CheckpointError(
            f"{shown(path)} was fitted with the likelihood {name!r:.80} of {len(leaves)} parameters; got "
            f"{likelihood.name!r} of {len(jax.tree.leaves(likelihood))}; pass the one it was fitted with"
        )
    restored = jax.tree.unflatten(jax.tree.structure(likelihood), leaves)
    if is_ours(restored):
        _check_parameters(restored)
    return restored


def _check_parameters(likelihood: Likelihood) -> None:
    """Check the parameters of a likelihood of the package, which several of its functions hold."""
    noise, parameters = likelihood.sigma_noise, parameters_of(likelihood)
    ignored, weights = parameters["ignore_index"], parameters["class_weights"]
    inner, temperature = untempered(likelihood)
    if ignored is not None and (ignored.shape or not jnp.issubdtype(ignored.dtype, jnp.integer)):
        raise Damage("its label of unknown classes is not an integer")
    if weights is not None and (declared.vector(weights, weights.size, "weights of classes") < 0).any():
        raise Damage("its weights of classes are negative")
    if temperature is not None and not declared.number(temperature, "temperature") > 0:
        raise Damage("its temperature is not positive")
    if noise is not None:
        if noise.ndim > 1:
            raise Damage("its standard deviations of the noise are not the same everywhere")
        declared.vector(noise.reshape(-1), noise.size, "standard deviations of the noise", positive=True)
    given = {name: value if value is None else np.asarray(value) for name, value in parameters.items()}
    expected = gaussian(noise) if noise is not None else inner
    if inner.name == "classification":
        expected = categorical(None if ignored is None else int(ignored), given["class_weights"])
    expected = expected if temperature is None else tempered(expected, temperature)
    if not all(map(np.array_equal, jax.tree.leaves(likelihood), jax.tree.leaves(expected))):
        what = "standard deviations of the noise" if noise is not None else "parameters of the likelihood"
        raise Damage(f"its {what} are not the same everywhere")


def _settings(stored: dict[str, Any], metadata: dict[str, Any], num_weights: int) -> Settings:
    precision: Any = declared.number(stored["prior_precision"], "prior precision")
    if precision <= 0:
        raise Damage(f"its prior precision is {precision!r}")
    if "prior_precision" in metadata:
        precision = metadata["prior_precision"]
    elif "relative_precision" in stored:
        what = "relative prior precisions"
        precision = precision * declared.vector(stored["relative_precision"], num_weights, what, positive=True)
    groups = StoredGroups(tuple(sorted(metadata["groups"].items()))) if "groups" in metadata else by_layer
    mean: Any = 0.0
    if "prior_mean" in stored:
        mean = jnp.asarray(declared.vector(stored["prior_mean"], num_weights, "prior means"))
    return Settings(
        subset_of_weights="all",  # the saved network is that of the subset
        hessian_structure=metadata["hessian_structure"],
        prior_precision=precision,
        prior_mean=mean,
        prior_groups=groups,
    )
