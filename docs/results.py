"""Write the tables of results: `make results`, or `python docs/results.py [WORKDIR ...]`.

Reads what the benchmarks wrote to `benchmarks/results` and what runs of `training.fit_van` wrote to their work
directories. Keeps the numbers in `docs/results.json` and figures in `docs/images`, and writes `docs/results.md` and two
tables of `README.md` from there. If this machine lacks the record of a table, or the record is not of a whole
benchmark, its numbers stay as they stand, and the script says so.

To add a table, add a `Table` to `TABLES` in `docs/result_tables.py`.
"""

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import in_short
from result_numbers import cost
from result_table import Record, Table, row_of
from result_tables import TABLES
from run_results import METRICS

ROOT = Path(__file__).resolve().parents[1]
NUMBERS, PAGE, README = ROOT / "docs/results.json", ROOT / "docs/results.md", ROOT / "README.md"
IMAGES = ROOT / "docs/images"
RUNS = ("checkpoints/van_digits", "checkpoints/van_digits_1", "checkpoints/van_digits_2")

# --- the tables of README.md ----------------------------------------------------------------------------------------


_BY_TRAINING_IMAGES = ("(evidence, probit)", "(training, probit)")


def headline(numbers: Record) -> list[str]:
    """Return the rows of the experiment: point predictions, and the Lanczos posteriors by the evidence, one link."""
    rows = {row[0]: row for row in numbers["methods"]["rows"]}
    shown = [0, *(2 + METRICS.index(name) for name in ("accuracy", "nll", "ece", "auroc"))]
    cells = [
        [rows[name][0], *(f"{rows[name][index][0]:.3f}" for index in shown[1:])]
        for name in rows
        if name.startswith("MAP") or (name.startswith("Lanczos") and name.endswith(_BY_TRAINING_IMAGES))
    ]
    return markdown(("method", "accuracy", "NLL", "ECE", "AUROC, foreign images"), cells)


def benchmarks(numbers: Record) -> list[str]:
    """Return one row of each comparison."""
    krylov = row_of(numbers["krylov"]["rows"], "Lanczos, depth 100, value and gradient")
    torch = row_of(numbers["laplace_torch"]["rows"], "MLP 64-128-128, all, kron")
    evidence = numbers["evidence"]["rows"][0]
    cells = [
        ["Lanczos, 10,000 rows, depth 100, with gradient (`krylov.py`)", cost(krylov[1], None), "matfree 0.6.3"]
        + [cost(krylov[3], None)],
        ["fit, evidence, predictions of an MLP, Kronecker (`laplace_torch.py`)", f"{1e3 * torch[1]:.0f} ms"]
        + ["laplace-torch 0.3", f"{1e3 * torch[2]:.0f} ms"],
        ["evidence of a VAN with 273,578 weights, with gradient (`evidence.py`)", cost(evidence[1], None)]
        + ["the paper's formulation, with matfree", cost(evidence[3], None)],
    ]
    return markdown(("task", "bnnlaplace", "peer", "its time"), cells)


# --- reading and writing --------------------------------------------------------------------------------------------


def markdown(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return ["| " + " | ".join(cells) + " |" for cells in (columns, ["---"] * len(columns), *rows)]


def environment_of(record: Record) -> Record:
    """Return the versions and the device that a record names."""
    if "environment" in record:  # metrics.json of a run
        return record["environment"]
    peers = {"matfree": record["matfree"]} if record.get("matfree") else record.get("peers", {})
    return {**record["versions"], **peers, "device": record["device"], "cores": record["cores"]}


def read_record(path: Path) -> Record:
    """Read a record, and compare it with its digest if it has one: `training.sealed` says what that is of.

    The digest is computed here, because `make results` needs no installed package.
    """
    record = json.loads(path.read_text(encoding="utf-8"))
    if "sha256" in record:
        sealed = record.pop("sha256")
        content = json.dumps(record, sort_keys=True, separators=(",", ":"))
        if sealed != hashlib.sha256(content.encode()).hexdigest():
            raise SystemExit(
                f"{path} must be as it was written; its entry sha256 is not the digest of the rest; write it anew"
            )
    return record


def update(numbers: Record, runs: Sequence[Path]) -> list[str]:
    """Put the records of this machine into `numbers`; return one line about each table."""
    report = []
    for table in TABLES:
        paths = [run / "metrics.json" for run in runs]
        if table.record:
            paths = [ROOT / (table.record if "/" in table.record else f"benchmarks/results/{table.record}")]
        if missing := [path for path in paths if not path.exists()]:
            names = ", ".join(str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path) for path in missing)
            report.append(f"{table.name}: kept, as this machine has no {names}")
            continue
        records = [read_record(path) for path in paths]
        try:
            rows = table.read(records)
        except (KeyError, TypeError) as error:
            report.append(f"{table.name}: kept, as the record lacks {error}; run all parts of `{table.command}`")
            continue
        numbers[table.name] = {"environment": environment_of(records[0]), "rows": rows}
        for figure in table.figures:
            if (paths[0].parent / figure).exists():
                shutil.copyfile(paths[0].parent / figure, IMAGES / table.image(figure))
        report.append(f"{table.name}: written from the records of this machine")
    return report


def measured_with(environment: Record) -> str:
    """Write the versions and the device as a sentence."""
    device = ("platform", "device", "cores", "cpu_count")
    versions = [f"{name} {value}" for name, value in environment.items() if name not in device and value]
    cores = environment.get("cores", environment.get("cpu_count"))
    where = f"{environment['device']}, {cores} cores"
    # See `bnnlaplace/core/compiler.py`.
    doubt = " With this release of jaxlib sums on CPUs can be wrong." if environment.get("jax") == "0.10.2" else ""
    return f"*Measured on {where}{', with ' if versions else ''}{', '.join(versions)}.{doubt}*"


def page(numbers: Record) -> str:
    """Return `results.md`."""
    tables = [line for table in TABLES if table.name in numbers for line in section(table, numbers[table.name])]
    lines = [
        "# Results",
        "",
        "<!-- Written by docs/results.py from docs/results.json; edit those. -->",
        "",
        "The command above a table writes the record from which its numbers come. `make measure` runs all of them, in "
        "about nine hours on 2 cores, and goes on where it was stopped. `make results` then writes this page again.",
        "",
        "Which posterior to take where images are few, by 95 % intervals of differences in NLL:",
        "",
        *in_short.lines(numbers),
    ]
    return "\n".join(lines + tables) + "\n"


def section(table: Table, kept: Record) -> list[str]:
    """Return the lines of a table with all that belongs to it."""
    lines = ["", f"## {table.heading}", "", table.text, "", f"    {table.command}", ""]
    lines += markdown(table.columns, [table.write(row) for row in kept["rows"]])
    lines += ["", measured_with(kept["environment"])]
    lines += ["", *table.remarks_on(kept["rows"])] if table.remarks else []
    for figure, caption in table.figures.items():
        if (IMAGES / table.image(figure)).exists():
            lines += ["", f"![{caption}](images/{table.image(figure)})", "", f"*{caption}*"]
    return lines


def readme(text: str, numbers: Record) -> str:
    """Return `README.md` with its two tables written again."""
    for name, table in (("headline", headline), ("benchmarks", benchmarks)):
        start, end = f"<!-- {name}: make results -->", f"<!-- end of {name} -->"
        lines = "\n".join([start, *table(numbers), end])
        text, count = re.subn(f"{start}.*?{end}", lambda _, lines=lines: lines, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"README.md must have one place for the table {name!r}, between {start} and {end}")
    return text


def main(arguments: Sequence[str]) -> None:
    """Write the numbers, the page and the tables of the README."""
    runs = [Path(run).resolve() for run in arguments] or [ROOT / run for run in RUNS]
    numbers = json.loads(NUMBERS.read_text(encoding="utf-8"))
    print("\n".join(update(numbers, runs)))
    written = {NUMBERS: in_rows(numbers), PAGE: page(numbers)}
    written[README] = readme(README.read_text(encoding="utf-8"), numbers)
    for path, text in written.items():  # all of them or, where a remark is contradicted, none
        path.write_text(text, encoding="utf-8")


def in_rows(numbers: Record) -> str:
    """Write JSON with one line for each row of a table."""
    parts = []
    for name, table in numbers.items():
        rows = ",\n  ".join(json.dumps(row, ensure_ascii=False) for row in table["rows"])
        environment = json.dumps(table["environment"], ensure_ascii=False)
        parts.append(f'{json.dumps(name)}: {{\n "environment": {environment},\n "rows": [\n  {rows}\n ]\n}}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


if __name__ == "__main__":
    main(sys.argv[1:])
