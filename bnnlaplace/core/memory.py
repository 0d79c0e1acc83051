"""How much memory a fit needs, known before it starts, and how much the device has free."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax


class MemoryEstimate(NamedTuple):
    """Memory that a fit needs at its peak, without the activations of a microbatch.

    Attributes
    ----------
    needed
        Bytes that the fit needs.
    free
        Bytes that the device has free; None if that is not known.
    shrink
        The options that lower `needed`, for the message of `check`.
    """

    needed: int
    free: int | None
    shrink: str

    def check(self) -> None:
        """Raise MemoryError if more is needed than is free."""
        if self.free is not None and self.needed > self.free:
            raise MemoryError(
                f"this fit needs about {in_words(self.needed)} of memory and {in_words(self.free)} are free; "
                f"{self.shrink}"
            )


def in_words(count: float) -> str:
    """Write a number of bytes with a unit that people read: ``1.5 GB``."""
    units = ("bytes", "kB", "MB", "GB", "TB")
    power = 0
    while count >= 1000 and power < len(units) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {units[power]}"


def free_bytes(device: jax.Device | None = None) -> int | None:
    """Bytes that a device has free, by default the first local one; None if that is not known.

    For the host it is the smaller of two numbers: what the machine has left, and what this process's control group has.
    """
    device = jax.local_devices()[0] if device is None else device
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return int(stats["bytes_limit"] - stats.get("bytes_in_use", 0))
    return min((count for count in (_host_available(), _control_group_available()) if count is not None), default=None)


def _host_available() -> int | None:
    """Bytes that this machine has available; on a system without /proc all of its memory."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


class _GroupFiles(NamedTuple):
    """Names that a version of control groups gives to its limit, its use, and its entry for cached files."""

    limit: str
    used: str
    cached: str


_VERSIONS = {
    1: _GroupFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: _GroupFiles("memory.max", "memory.current", "inactive_file"),
}


def _control_group_available(
    groups: Path = Path("/proc/self/cgroup"), mounted: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """Least number of bytes that the control group of this process and its parents have left; None without a limit."""
    remaining = [_remaining(group, files) for group, files in _control_groups(groups, mounted)]
    return min((count for count in remaining if count is not None), default=None)


def _control_groups(groups: Path, mounted: Path) -> Iterator[tuple[Path, _GroupFiles]]:
    """Yield the group of this process in each hierarchy that may limit memory, and the parents of that group."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            version, root = 2, mounted
        elif "memory" in controllers.split(","):
            version, root = 1, mounted / "memory"
        else:
            continue
        group = root / path.lstrip("/")
        # A container may be told its path on the host, which does not exist inside it. The root then still counts.
        for place in (group, *group.parents):
            yield place, _VERSIONS[version]
            if place == root:
                break


def _remaining(group: Path, files: _GroupFiles) -> int | None:
    """Bytes between the limit and the use of a group; None without a limit."""
    try:
        unused = int((group / files.limit).read_text()) - int((group / files.used).read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Cached files count as free: the kernel drops them when a process asks for memory.
        return unused + int(counts.get(files.cached, 0))
    except (OSError, ValueError):  # a file is missing, or the limit is "max"
        return None
