"""The tables of results: where the numbers of each come from, and how they are written. See `docs/results.py`."""

import evidence_studies
import run_results
import training_studies
import variational_results
from result_numbers import cost, digits, ratio
from result_table import Record, Remark, Row, Table


def measured(cases: Record, name: str) -> list[float | None]:
    """Return seconds and megabytes of one program, or nothing if it was not measured."""
    case = cases.get(name)
    return [None, None] if case is None else [case["seconds"], case["memory_bytes"] / 1e6]


def read_krylov(records: list[Record]) -> list[Row]:
    def row(method: str, depth: int, what: str, label: str) -> Row:
        cases = records[0]["headline"][f"{method.lower()}_{depth}"]["cases"]
        return [
            f"{method}, depth {depth}, {label}",
            *measured(cases, f"ours {what}"),
            *measured(cases, f"matfree {what}"),
        ]

    both, backwards = "value and gradient", "value and gradient, backpropagation"
    return [
        row("Lanczos", 100, "forward", "forward"),
        row("Lanczos", 100, both, both),
        row("Arnoldi", 100, "forward", "forward"),
        row("Arnoldi", 100, both, both),
        row("Lanczos", 50, both, both),
        row("Lanczos", 50, backwards, "value and gradient by backpropagation"),
    ]


def write_costs(row: Row) -> list[str]:
    label, seconds, megabytes, peer_seconds, peer_megabytes = row
    return [label, cost(seconds, megabytes), cost(peer_seconds, peer_megabytes), ratio(seconds, peer_seconds)]


def read_krylov_checks(records: list[Record]) -> list[Row]:
    left = records[0]["overhead"]["targets"]
    rows = [
        [
            "part of the time that is neither products nor one pass of Gram-Schmidt, around a product of over 10 ms",
            max(target["value"] for target in left.values()),
        ]
    ]
    for method in ("lanczos", "arnoldi"):
        target = records[0]["hilbert"]["targets"][f"{method}, largest ratio of errors, projection / backpropagation"]
        rows.append([f"error of the adjoint over that of backpropagation, Hilbert matrices, {method}", target["value"]])
    return rows


def write_number(row: Row) -> list[str]:
    label, value = row
    return [label, f"{value:.1e}" if value < 1e-4 else digits(value)]


def read_products(records: list[Record]) -> list[Row]:
    record = records[0]
    return [
        ["32 x 32 pixels: times as fast as with the library's grouped convolution", record["speedup_over_grouped"]],
        ["32 x 32 pixels: largest relative difference to it", record["largest_relative_difference"]],
        ["8 x 8 pixels: one product over 1,257 images, in ms", 1e3 * record["digits_one_vector"]["seconds"]],
    ]


def read_blocks(records: list[Record]) -> list[Row]:
    return [[row["probes"], row["products"]] for row in records[0]["rows"] if row["converged"]]


def read_laplace_torch(records: list[Record]) -> list[Row]:
    record = records[0]
    networks = {"mlp 64-128-128": "MLP 64-128-128", "cnn 16-3-8-16": "CNN 16 x 16", "mlp 32-24-24": "MLP 32-24-24"}
    rows = []
    for name, case in record["time"].items():
        network, classes, posterior = name.split(", ")
        if classes != "10 classes":
            continue
        larger = name.replace("10 classes", "100 classes")
        seconds = [case[library]["medians"]["total"] for library in ("ours", "laplace-torch")]
        many = record["time"].get(larger, {}).get("ratios", {}).get("medians", {}).get("total")
        memory = record["memory"].get(larger, {})
        subset = "last layer" if "last layer" in posterior else "all"
        label = f"{networks[network]}, {subset}, {posterior.removeprefix('last layer ')}"
        rows.append([label, *seconds, many, memory.get("ours"), memory.get("laplace-torch")])
    return rows


def write_laplace_torch(row: Row) -> list[str]:
    label, seconds, peer_seconds, many, megabytes, peer_megabytes = row
    times = [f"{1e3 * value:,.0f} ms" for value in (seconds, peer_seconds)]
    memory = ["–" if value is None else f"{value:,.0f} MB" for value in (megabytes, peer_megabytes)]
    return [label, *times, ratio(seconds, peer_seconds), digits(many, 2), *memory, ratio(megabytes, peer_megabytes)]


def read_evidence(records: list[Record]) -> list[Row]:
    record = records[0]
    delta, both, steps = "d delta", "d delta and weights", record["steps"]
    batched = "paper, d delta, all images at once"
    programs = [
        ("a scalar prior precision", f"ours, {delta}", f"paper, {delta}"),
        ("the same, 10 images at a time (`remat`)", f"ours by remat, {delta}", f"paper, {delta}"),
        (
            "a prior precision for each weight, theirs for a scalar one",
            "ours, d delta of each weight",
            f"paper, {delta}",
        ),
        ("the prior precision and all weights", f"ours, {both}", f"paper, {both}"),
        ("the same, 10 images at a time (`remat`)", f"ours by remat, {both}", f"paper, {both}"),
        (f"a scalar prior precision, {steps} steps of an optimiser", f"ours, {steps} steps", None),
        ("a scalar prior precision, theirs with all images at once", f"ours, {delta}", batched),
    ]
    rows = []
    for label, ours, theirs in programs:
        row: Row = [label]
        for classes in (10, 1000):
            cases = record[f"classes_{classes}"]["cases"]
            row += measured(cases, ours)
            if theirs is None:
                seconds, _ = measured(cases, f"paper, {delta}")
                row += [None if seconds is None else steps * seconds, None]
            else:
                row += measured(cases, theirs)
        rows.append(row)
    return rows


def write_evidence(row: Row) -> list[str]:
    label, ours, megabytes, theirs, peer_megabytes, *many = row
    cells = [label, cost(ours, megabytes), cost(theirs, peer_megabytes), ratio(theirs, ours)]
    ours, megabytes, theirs, peer_megabytes = many
    cells += [cost(ours, megabytes), cost(theirs, peer_megabytes), ratio(theirs, ours)]
    return [*cells, ratio(megabytes, peer_megabytes)]


TABLES = [
    *run_results.TABLES,
    variational_results.TABLE,
    *evidence_studies.TABLES,
    *training_studies.TABLES,
    Table(
        "krylov",
        "Lanczos, Arnoldi and their adjoints beside matfree",
        "python benchmarks/krylov.py",
        "A sparse matrix with 10,000 rows in float32, with full reorthogonalisation.",
        ("method", "bnnlaplace", "matfree", "ratio of times"),
        read_krylov,
        write_costs,
        "krylov.json",
    ),
    Table(
        "krylov_checks",
        "Overhead and accuracy of the adjoints",
        "python benchmarks/krylov.py",
        "Errors are geometric means over three start vectors, in float64, on Hilbert matrices of 2 to 8 rows; the "
        "largest ratio is shown.",
        ("what", "value"),
        read_krylov_checks,
        write_number,
        "krylov.json",
    ),
    Table(
        "products",
        "Products with the GGN of the VAN",
        "python benchmarks/ggn_products.py",
        "The depthwise convolution of `training.models.depthwise` against the grouped convolution of the library.",
        ("what", "value"),
        read_products,
        write_number,
        "ggn_products.json",
    ),
    Table(
        "blocks",
        "One block decomposition against one run for each probe",
        "python benchmarks/block_krylov.py checkpoints/van_digits",
        "Products with the GGN for 64 posterior samples with a relative error of at most 5 %.",
        ("probes in a block", "products"),
        read_blocks,
        lambda row: [str(row[0]), f"{row[1]:,.0f}"],
        "block_krylov_van_digits.json",
    ),
    Table(
        "laplace_torch",
        "Beside laplace-torch",
        "python benchmarks/laplace_torch.py",
        "Time of fit, evidence and probit predictive of 128 inputs together, with 10 classes; the first call, which "
        "compiles, takes 1 to 6 seconds more. There are 1,000 examples, 300 for the convolutional network. Memory is "
        "the rise of the peak with 100 classes, compilation included.",
        (
            "network, weights, structure",
            "bnnlaplace",
            "laplace-torch",
            "ratio of times",
            "ratio of times, 100 classes",
            "memory, bnnlaplace",
            "memory, laplace-torch",
            "ratio of memory",
        ),
        read_laplace_torch,
        write_laplace_torch,
        "laplace_torch.json",
        remarks=[
            Remark(
                "Time and memory were measured in runs of their own. `full` holds the matrix in float32 and the "
                "inverse of its factor in float64, which is most of its memory."
            )
        ],
    ),
    Table(
        "evidence",
        "The evidence of a VAN and its gradients",
        "python benchmarks/evidence.py",
        "Value and derivative of the log evidence for 50 images of 32 x 32 pixels, 10 Lanczos steps and one probe. The "
        "peer is the formulation of the paper's experiment with matfree, which linearises one image at a time within "
        "each product. The network has 273,578 weights with 10 classes and 369,608 with 1,000. Memory is that of "
        "arguments, results and temporary arrays, as XLA lays them out. The time of many optimiser steps is "
        "extrapolated for the paper's formulation.",
        (
            "derivative in",
            "bnnlaplace, 10 classes",
            "paper",
            "speed-up",
            "bnnlaplace, 1,000 classes",
            "paper",
            "speed-up",
            "ratio of memory",
        ),
        read_evidence,
        write_evidence,
        "evidence.json",
        remarks=[Remark("Compilation takes 15 to 106 s, that of the paper's formulation 44 to 96 s.")],
    ),
]
