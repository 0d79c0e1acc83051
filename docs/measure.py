"""Measure what the tables of results show: `make measure`, or `python docs/measure.py [--list] [--data DIR] [NAME]`.

Runs every command whose record this machine lacks, one after another, because most of them measure time. `--list` says
which these are, and how long each takes; all of them take about nine hours on 2 cores. A record that is there is not
measured again: remove it to do so. Runs and studies go on where they were stopped. `make results` writes the tables.
"""

import argparse
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from results import RUNS

ROOT = Path(__file__).resolve().parents[1]
# Stands for a directory of prepared images in a command.
DATA = "DIR"


class Measurement(NamedTuple):
    """A command, and the record that it writes."""

    name: str
    arguments: str
    """The arguments that Python gets."""
    record: str
    """By its path from the root."""
    minutes: int
    """About how long it takes on 2 cores."""

    def is_there(self) -> bool:
        """Whether this machine has the record."""
        return (ROOT / self.record).exists()


def run(seed: int, workdir: str) -> Measurement:
    """The default run with one seed."""
    arguments = f"-m training.fit_van --seed {seed} --workdir {workdir} --resume"
    return Measurement(Path(workdir).name, arguments, f"{workdir}/metrics.json", 4)


def study(name: str, minutes: int, options: str = "") -> Measurement:
    """A study of `configs/`."""
    workdir = f"checkpoints/{name}"
    arguments = f"-m training.study --config configs/{name}.py --workdir {workdir} --resume{options}"
    return Measurement(name, arguments, f"{workdir}/summary/summary.json", minutes)


def benchmark(name: str, minutes: int, options: str = "", suffix: str = "") -> Measurement:
    """A benchmark of `benchmarks/`."""
    record = f"benchmarks/results/{name}{suffix}.json"
    return Measurement(name, f"benchmarks/{name}.py{options}", record, minutes)


MEASUREMENTS = (
    *(run(seed, workdir) for seed, workdir in enumerate(RUNS)),
    benchmark("variational", 15),
    study("study_digits_short", 100),
    study("study_digits_weights", 90),
    study("study_digits_structures", 30),
    study("study_digits_trainings", 120),
    study("study_digits_folds", 30),
    study("study_cifar10_short", 60, f" --data-dir {DATA}"),
    benchmark("krylov", 5),
    benchmark("ggn_products", 10),
    benchmark("block_krylov", 5, " checkpoints/van_digits", "_van_digits"),
    benchmark("laplace_torch", 10),
    benchmark("evidence", 60),
)


def main(arguments: Sequence[str]) -> int:
    """Run what is missing; return 1 if a command failed."""
    known = {each.name: each for each in MEASUREMENTS}
    parser = argparse.ArgumentParser(description="Measure what the tables of results show.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(known)}; default: all")
    parser.add_argument("--list", action="store_true", help="run nothing, and say what would be run")
    parser.add_argument("--data", metavar="DIR", help="a directory of images that TFDS has prepared")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"names must be of {', '.join(known)}; got {', '.join(unknown)}")
    missing = [each for name, each in known.items() if name in (options.names or known) and not each.is_there()]
    print(f"{len(missing)} to measure, about {sum(each.minutes for each in missing)} minutes on 2 cores")
    failed = []
    for each in missing:
        given = each.arguments.replace(DATA, shlex.quote(options.data)) if options.data else each.arguments
        print(f"{each.name}: python {given} (about {each.minutes} minutes)", flush=True)
        if DATA in each.arguments and not options.data:
            print("  left out: it needs prepared images; pass --data DIR")
            continue
        if options.list:
            continue
        if subprocess.run([sys.executable, *shlex.split(given)], cwd=ROOT, check=False).returncode:
            failed.append(each.name)
    if failed:
        print(f"failed: {', '.join(failed)}; start again to go on", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
