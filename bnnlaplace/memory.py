"""Memory that a curvature takes, known before it is computed, and what the device has free."""

import os
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


def _control_group_available() -> int | None:
    group = Path("/sys/fs/cgroup")
    try:
        free = int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return free + int(counts.get("inactive_file", 0))  # cached files make room
    except (OSError, ValueError):  # not there, or "max"
        return None
