"""Memory that a curvature takes, known before it is computed, and what the device has free."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax


class MemoryEstimate(NamedTuple):
    """What fitting takes at its peak, without the activations of a microbatch.

    Attributes
    ----------
    needed
        Bytes.
    free
        Bytes that the device has free; None where that cannot be told.
    shrink
        The options that make `needed` smaller.
    """

    needed: int
    free: int | None
    shrink: str

    def check(self) -> None:
        """Raise MemoryError where more is needed than there is."""
        if self.free is not None and self.needed > self.free:
            raise MemoryError(
                f"this fit needs about {in_words(self.needed)} of memory and {in_words(self.free)} are free; "
                f"{self.shrink}"
            )


def in_words(count: float) -> str:
    """A number of bytes for people."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {units[power]}"


def free_bytes(device: jax.Device | None = None) -> int | None:
    """What a device has free; of the host, the smaller of what the machine and its control group have.

    None where neither says.
    """
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min((count for count in (_host_available(), _control_group_available()) if count is not None), default=None)


def _host_available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


class _Files(NamedTuple):
    """What a version of control groups calls the limit, the use, and of that the cached files, which make room."""

    limit: str
    used: str
    cached: str


_VERSIONS = {
    1: _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: _Files("memory.max", "memory.current", "inactive_file"),
}


def _control_group_available(
    groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The least that the control group of this process and those around it have left; None without a limit."""
    found = [_left(group, files) for group, files in _control_groups(groups, mounted)]
    return min((count for count in found if count is not None), default=None)


def _control_groups(groups: Path, mounted: Path) -> Iterator[tuple[Path, _Files]]:
    """The group of this process in each hierarchy that may limit memory, and those around it."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            version, tree = 2, mounted
        elif "memory" in controllers.split(","):
            version, tree = 1, mounted / "memory"
        else:
            continue
        group = tree / path.lstrip("/")
        # In a container the path may be that outside of it: then the root of the tree alone is there.
        for place in (group, *group.parents):
            yield place, _VERSIONS[version]
            if place == tree:
                break


def _left(group: Path, files: _Files) -> int | None:
    try:
        left = int((group / files.limit).read_text()) - int((group / files.used).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return left + int(counts.get(files.cached, 0))
    except (OSError, ValueError):  # not there, or "max"
        return None
