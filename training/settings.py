"""Settings as flat names and values: how two configs differ, and which settings a file on disk was computed with."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from training import sealed
from training.config import Config, to_document, with_present_names
from training.errors import UserError

# Settings that a run may leave to measurement: there None agrees with any saved value.
_MEASURED = {"data.mean", "data.std"}

# Settings with which nothing on disk is computed.
_NEVER_USED = ("evaluation.", "curvature.microbatch", "data.dir")


def describe_difference(there: Config, here: Config) -> list[str]:
    """Write one line for each field that differs, such as ``optimizer.learning_rate: 0.003 there, 0.001 here``.

    Pixel statistics that are None here are left to measurement, so they agree with any there.
    """
    ours = dict(_fields(here))
    return [
        f"{name}: {value} there, {ours[name]} here"
        for name, value in _fields(there)
        if value != ours[name] and not (name in _MEASURED and ours[name] is None)
    ]


def record(config: Config) -> dict[str, Any]:
    """Return what a checkpoint keeps of the settings that it was computed with: all of them, and their digest."""
    document = to_document(config)
    return {sealed.ENTRY: sealed.digest(document), "values": document}


def require_recorded(
    recorded: Any, config: Config, path: Path, *, curvature: bool, report: Callable[[str], None]
) -> None:
    """Compare the settings that a file was computed with to those of now.

    Parameters
    ----------
    recorded
        What `record` returned when the file was written. None in files of earlier releases, of which `report` is told.
    config
        The settings of now.
    path
        The file or directory, for messages.
    curvature
        Whether the settings of the curvature count.
    report
        Told in one line what could not be verified.

    Raises
    ------
    UserError
        A setting differs: the message names it with both values. Or the record is not what was written.
    """
    if recorded is None:
        report(f"{path} has no record of its settings: whether they are those of config.json is unverified")
        return
    values = recorded.get("values") if isinstance(recorded, dict) else None
    if not isinstance(values, dict) or sealed.digest(values) != recorded.get(sealed.ENTRY):
        raise UserError(f"{path} must hold the settings as they were recorded; their digest differs; restore it")
    ignored = _NEVER_USED if curvature else (*_NEVER_USED, "curvature.")
    there, here = flattened(with_present_names(values)), flattened(to_document(config))
    differences = [
        f"{name}: {there[name]} there, {here[name]} in config.json"
        for name in there.keys() & here.keys()  # A later release may add settings, or take some away.
        if there[name] != here[name] and not name.startswith(ignored)
    ]
    if differences:
        raise UserError(
            f"{path} must have been computed with the settings of config.json; got {'; '.join(sorted(differences))}; "
            "restore config.json, or start a run with other settings in another --workdir"
        )


def flattened(document: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the settings of all sections by their dotted name."""
    flat: dict[str, Any] = {}
    for name, value in document.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _fields(section: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """List the dotted names and the values of all fields."""
    flat: list[tuple[str, Any]] = []
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        name = prefix + field.name
        flat += _fields(value, f"{name}.") if dataclasses.is_dataclass(value) else [(name, value)]
    return flat
