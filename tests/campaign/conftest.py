"""Counts what becomes of each bad input, by its kind, and prints the table at the end."""

from collections import Counter
from collections.abc import Callable

import pytest

OUTCOMES = {
    "error": "a clear error",
    "same": "the right value",
    "silent": "a wrong value without an error",
    "raw": "a raw traceback, or a message of more than a sentence",
    "lost": "data lost",
}
_COUNTS: Counter[tuple[str, str]] = Counter()


@pytest.fixture
def tally() -> Callable[[str, str], None]:
    """Count one outcome of one kind of input: ``tally("bit flip", "error")``. `OUTCOMES` lists what there is."""

    def count(kind: str, outcome: str) -> None:
        if outcome not in OUTCOMES:
            raise ValueError(f"the outcome must be one of {list(OUTCOMES)}; got {outcome!r}")
        _COUNTS[kind, outcome] += 1

    return count


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands its counts to the process that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["tally"] = [[*key, count] for key, count in _COUNTS.items()]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Add the counts of a worker."""
    for kind, outcome, count in getattr(node, "workeroutput", {}).get("tally", []):
        _COUNTS[kind, outcome] += count


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print a row for each kind and a column for each outcome."""
    if not _COUNTS:
        return
    terminalreporter.section("outcomes by kind")
    width = max(len(kind) for kind, _ in _COUNTS)
    terminalreporter.write_line(" " * width + "".join(f"{outcome:>8}" for outcome in OUTCOMES))
    for kind in sorted({kind for kind, _ in _COUNTS}):
        terminalreporter.write_line(f"{kind:{width}}" + _row(_COUNTS[kind, outcome] for outcome in OUTCOMES))
    sums = [sum(count for (_, other), count in _COUNTS.items() if other == outcome) for outcome in OUTCOMES]
    terminalreporter.write_line(f"{'all':{width}}" + _row(sums))


def _row(counts) -> str:
    return "".join(f"{count or '.':>8}" for count in counts)
