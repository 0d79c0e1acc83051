"""Programs that are killed, stopped by signals, or run out of disk: one line each, and nothing is lost.

Every case ends with a run that `--resume` continues, whose metrics have to be those of a run that nothing disturbed.
"""

import itertools
import json
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = Path(__file__).with_name("program_host.py")
HOSTS = 2
SEED = 16

CONFIG = """
from training.config import Config, Curvature, Data, Evaluation, Optimizer

config = Config(
    data=Data(name="tiny"),
    optimizer=Optimizer(batch_size=8, epochs=3, warmup_epochs=1, polish_epochs=3),
    curvature=Curvature(num_probes=4, max_vectors=40, microbatch=24),
    evaluation=Evaluation(grid_size=3, resamples=20),
)
"""


class Hosts:
    """Processes that run programs, and a directory for what they write."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TFDS_DATA_DIR": str(directory / "tfds"),
            "JAX_COMPILATION_CACHE_DIR": str(directory / "xla"),
        }
        self.config = directory / "tiny.py"
        self.config.write_text(CONFIG)
        subprocess.run(
            [sys.executable, HOST, "prepare"], env=self.environment, capture_output=True, check=True, timeout=200
        )
        self.free: queue.Queue[subprocess.Popen[str]] = queue.Queue()
        self.numbers = itertools.count()
        for _ in range(HOSTS):
            host = subprocess.Popen(
                [sys.executable, HOST],
                env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
            )  # fmt: skip
            assert host.stdout.readline() == "ready\n"
            self.free.put(host)

    def close(self) -> None:
        while not self.free.empty():
            host = self.free.get()
            host.communicate(timeout=60)

    def run(self, argv: Sequence[Any], *, kill_after: float | None = None, **job: Any) -> "Ended":
        """Run training.fit_van until its end, or kill it some seconds after its start."""
        host = self.free.get()
        try:
            number = next(self.numbers)
            files = {name: str(self.directory / f"{name}{number}") for name in ("out", "err")}
            job = {"program": "fit_van", **job, "argv": [str(word) for word in argv], **files}
            host.stdin.write(json.dumps(job) + "\n")
            host.stdin.flush()
            pid, started = int(host.stdout.readline()), time.time()
            if kill_after is not None:
                killer = threading.Timer(kill_after, lambda: os.kill(pid, signal.SIGKILL))
                killer.start()
            status, ended = host.stdout.readline().split()
            if kill_after is not None:
                killer.cancel()
        finally:
            self.free.put(host)
        return Ended(int(status), Path(files["out"]).read_text(), Path(files["err"]).read_text(), started, float(ended))

    def fresh(self, name: str) -> tuple[Path, list[Any]]:
        """Return a work directory of this name, and the command line of a new run in it."""
        workdir = self.directory / name
        return workdir, ["--config", self.config, "--workdir", workdir]


class Ended:
    """How a program ended."""

    def __init__(self, status: int, out: str, err: str, started: float, ended: float) -> None:
        self.status, self.out, self.err = status, out, err
        self.seconds, self.ended = ended - started, ended

    @property
    def last_line(self) -> str:
        lines = self.err.splitlines()
        return lines[-1] if lines else ""

    @property
    def command(self) -> list[str]:
        """The arguments of the command that the last line says to type."""
        words = shlex.split(self.last_line.split("continue with: ")[1])
        assert words[1:3] == ["-m", "training.fit_van"]
        return words[3:]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    hosts = Hosts(tmp_path_factory.mktemp("programs"))
    yield hosts
    hosts.close()


@pytest.fixture(scope="module")
def undisturbed(hosts: Hosts) -> tuple[Path, float]:
    """A run that nothing disturbed, and its seconds with warm caches."""
    hosts.run(hosts.fresh("cold")[1])
    workdir, argv = hosts.fresh("undisturbed")
    ended = hosts.run(argv)
    assert ended.status == 0, ended.err
    assert numbers(workdir) == numbers(hosts.directory / "cold")
    return workdir, ended.seconds


def numbers(workdir: Path) -> dict[str, Any]:
    """All that a run found, without its times."""
    metrics = json.loads((workdir / "metrics.json").read_text())
    for record in metrics["history"]:
        for name in [name for name in record if name.startswith("seconds")]:
            del record[name]
    return {name: value for name, value in metrics.items() if name not in ("seconds", "sha256")}


def steps(workdir: Path) -> list[int]:
    """The steps whose checkpoints have their final name."""
    return sorted(int(path.name[5:]) for path in (workdir / "train").glob("step_????????"))


def resumed(hosts: Hosts, workdir: Path, argv: Sequence[Any]) -> str:
    """Continue a run, and say whether its numbers are those of the undisturbed one: "same", or what is wrong."""
    before = steps(workdir)
    ended = hosts.run(argv)
    if ended.status != 0 or "Traceback" in ended.err:
        return f"lost: status {ended.status}: {ended.err[-300:]}"
    if before and not re.search(rf"resuming after step {before[-1]} |training is finished: {before[-1]} ", ended.out):
        return f"lost: step {before[-1]} was there; {ended.out[:300]}"
    if numbers(workdir) != numbers(hosts.directory / "undisturbed"):
        return "silent: other numbers"
    if remains := [path for path in workdir.rglob(".*") if path.name != ".lock"]:
        return f"lost: {remains} is left over"
    return "same"


def outcomes(jobs: Sequence[Callable[[], str]]) -> list[str]:
    with ThreadPoolExecutor(HOSTS) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


def tell(tally: Callable[[str, str], None], kind: str, found: Sequence[str]) -> None:
    """Count the outcomes, and fail unless all are "same"."""
    for outcome in found:
        tally(kind, outcome.partition(":")[0])
    assert [outcome for outcome in found if outcome != "same"] == []


# --- kills ----------------------------------------------------------------------------------------------------------


def test_killed_at_any_time_and_resumed_gives_the_same_numbers(hosts, undisturbed, tally) -> None:
    kills = 25
    # A kill in each of as many equal parts of a run.
    times = undisturbed[1] * (np.arange(kills) + np.random.default_rng(SEED).uniform(size=kills)) / kills

    def killed(number: int) -> str:
        workdir, argv = hosts.fresh(f"killed{number}")
        ended = hosts.run(argv, kill_after=times[number])
        if ended.status not in (0, -signal.SIGKILL):
            return f"raw: status {ended.status}: {ended.err[-300:]}"
        begun = (workdir / "config.json").exists()
        return resumed(hosts, workdir, ["--workdir", workdir, "--resume"] if begun else [*argv, "--resume"])

    tell(tally, "kill", outcomes([lambda number=number: killed(number) for number in range(kills)]))


# --- full disks and memory ------------------------------------------------------------------------------------------


def mount(directory: Path, options: str) -> bool:
    """Mount a file system in memory, and say whether this process may."""
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    return shutil.which("mount") is not None and subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk_is_one_line_and_the_run_goes_on(hosts, undisturbed, tally) -> None:
    disks = 5
    used = 1.3 * sum(path.stat().st_size for path in undisturbed[0].rglob("*"))  # blocks are larger than files
    largest = max(path.stat().st_size for path in undisturbed[0].rglob("*"))
    parts = (np.arange(disks) + np.random.default_rng(SEED).uniform(size=disks)) / (disks + 1)

    def full(number: int) -> str:
        disk = hosts.directory / f"disk{number}"
        mounted = mount(disk, f"size={int(parts[number] * used) // 4096 * 4096 + 4096}")
        try:
            workdir, argv = hosts.fresh(f"disk{number}/run")
            # Without the right to mount: files may not grow beyond a size.
            job = {} if mounted else {"largest_file": int(parts[number] * largest)}
            ended = hosts.run(argv, **job)
            if ended.status != 2 or "Traceback" in ended.err or not ended.last_line.startswith("error: "):
                return f"raw: status {ended.status}: {ended.err[-600:]}"
            if ended.err.count("\n") != 1 or not re.search("No space left on device|File too large", ended.err):
                return f"raw: {ended.err}"
            if mounted:
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
            again = ended.command if "continue with: " in ended.last_line else argv
            return resumed(hosts, workdir, again if (workdir / "config.json").exists() else argv)
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=True)

    tell(tally, "full disk", outcomes([lambda number=number: full(number) for number in range(disks)]))


def test_memory_that_is_missing_is_one_line_and_the_training_is_kept(hosts, undisturbed, tally) -> None:
    workdir, argv = hosts.fresh("memory")
    ended = hosts.run(argv, memory=True)
    assert ended.status == 2 and ended.err.count("\n") == 1 and "lower --curvature.max-vectors" in ended.err
    tell(tally, "memory", [resumed(hosts, workdir, ended.command)])


# --- signals --------------------------------------------------------------------------------------------------------

INT, TERM = signal.SIGINT, signal.SIGTERM

# Phase, its call, the signals, and for how many seconds the phase does not answer. Where nothing is to be kept the
# first signal ends it all the same; elsewhere the second.
SIGNALS = [
    ("data", 1, [INT], 0.0),
    ("data", 1, [TERM], 30.0),
    ("training", 2, [INT], 0.0),
    ("training", 11, [TERM], 0.0),
    ("training", 5, [INT, INT], 30.0),
    ("checkpoint", 1, [TERM], 0.0),
    ("checkpoint", 4, [INT], 0.0),
    ("checkpoint", 3, [TERM, INT], 0.0),
    ("fitting", 1, [INT], 0.0),
    ("fitting", 2, [TERM], 30.0),
    ("fitting", 2, [INT, TERM], 0.0),
    ("curves", 1, [INT], 30.0),
    ("curves", 2, [TERM], 0.0),
    ("evaluation", 1, [TERM], 30.0),
    ("evaluation", 2, [INT, INT], 0.0),
    ("figures", 1, [INT], 30.0),
    ("report", 1, [TERM], 0.0),
]
WHILE_LOADING = [[INT], [TERM], [TERM, INT]]
MOST_SECONDS = 3.0


def judged(ended: Ended, seconds: float | None) -> str:
    """Say "same" if a program ended as it should after a signal."""
    if ended.status != 130 or "Traceback" in ended.err or not ended.last_line.startswith("stopped"):
        return f"raw: status {ended.status}: {ended.err[-600:]}"
    return f"raw: it took {seconds:.1f} s" if seconds is not None and seconds > MOST_SECONDS else "same"


def test_a_signal_in_any_phase_ends_in_one_line_and_the_run_goes_on(hosts, undisturbed, tally) -> None:
    def signalled(number: int) -> str:
        phase, call, signals, stuck = SIGNALS[number]
        workdir, argv = hosts.fresh(f"signal{number}")
        if phase not in ("data", "training", "checkpoint"):
            shutil.copytree(undisturbed[0], workdir)
            (workdir / "metrics.json").unlink()
            if phase == "fitting":
                shutil.rmtree(workdir / "laplace")
            argv = ["--workdir", workdir, "--resume"]
        told = hosts.directory / f"told{number}"
        send = {"phase": phase, "call": call, "signals": signals, "stuck": stuck, "told": str(told)}
        ended = hosts.run(argv, send=send)
        # A step and its checkpoint are finished after one signal, however long that takes.
        bounded = len(signals) > 1 or phase not in ("training", "checkpoint")
        outcome = judged(ended, ended.ended - float(told.read_text()) if bounded else None)
        if outcome != "same" or phase == "data":
            return outcome
        return resumed(hosts, workdir, ended.command)

    tell(tally, "signal", outcomes([lambda number=number: signalled(number) for number in range(len(SIGNALS))]))


def test_a_signal_while_the_program_loads_ends_in_one_line(hosts, tally) -> None:
    rng = np.random.default_rng(SEED)

    def loading(signals: list[int]) -> str:
        _, argv = hosts.fresh("loading")
        process = subprocess.Popen(
            [sys.executable, "-m", "training.fit_van", *map(str, argv)],
            cwd=ROOT, env=hosts.environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        while not handles(process.pid, TERM):
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 1))
        for number in signals:
            process.send_signal(number)
        started = time.time()
        _, error = process.communicate(timeout=60)
        return judged(Ended(process.returncode, "", error, started, time.time()), time.time() - started)

    tell(tally, "signal", [loading(signals) for signals in WHILE_LOADING])


def handles(pid: int, number: int) -> bool:
    """Say whether a process has a handler of its own for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[1], 16) >> (number - 1) & 1)


# --- two programs at once -------------------------------------------------------------------------------------------


def test_of_two_programs_in_one_directory_the_second_says_who_has_it(hosts, undisturbed, tally) -> None:
    workdir, argv = hosts.fresh("two")
    told = hosts.directory / "told-two"
    first: list[Ended] = []
    send = {"phase": "training", "call": 2, "signals": [], "stuck": 20.0, "told": str(told)}
    thread = threading.Thread(target=lambda: first.append(hosts.run(argv, send=send)))
    thread.start()
    while not told.exists():
        time.sleep(0.05)
    second = hosts.run(["--workdir", workdir, "--resume"])
    holder = json.loads((workdir / ".lock").read_text())
    assert second.status == 2 and second.err.count("\n") == 1
    assert f"in use by {holder['program']}, process {holder['pid']} on host {holder['host']}" in second.err
    os.kill(holder["pid"], signal.SIGKILL)
    thread.join()
    assert first[0].status == -signal.SIGKILL and (workdir / ".lock").exists()
    third = hosts.run(["--workdir", workdir, "--resume"])
    assert third.status == 0 and "taking over the lock of" in third.out and not (workdir / ".lock").exists()
    tell(tally, "two programs", ["same" if numbers(workdir) == numbers(undisturbed[0]) else "silent"])
