"""What do Lanczos, Arnoldi and their adjoints cost beside the products, beside backpropagation, and beside matfree?

    python benchmarks/krylov.py [--parts headline depth size overhead hilbert] [--repetitions 9] [--small]

headline   Time, memory and agreement on a sparse Laplacian of 10,000 rows: ours, matfree, backpropagation.
depth      Time and memory for depths from 10 to 100.
size       The same for 10^3 to 10^6 rows and a product that stores no matrix.
overhead   With an expensive product: which part of the time is neither products nor reorthogonalisation?
hilbert    Hilbert matrices: how exact is the Jacobian of A -> Q H Q', which is the identity?

The peer is matfree (Krämer et al. 2024), `pip install matfree==0.6.3`; without it its rows are left out. Alternatives
run in turn in one process; compilation is timed apart. Prints tables and writes `benchmarks/results/krylov.json` and
the figures `krylov_time.png` and `krylov_hilbert.png`; their names hold every option that is not the default. `--small`
only shows that everything runs. About five minutes on 2 cores.
"""

import importlib.metadata
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jax import Array
from krylov_figures import plot_hilbert, plot_time
from krylov_hilbert import jacobian_errors
from krylov_problems import CONVECTION, LIBRARIES, Problem, decomp, factorisation, projected, sparse_grid, stencil_grid
from record import (
    RESULTS,
    Program,
    Results,
    compile_ahead,
    console,
    interleaved,
    judge,
    measure,
    record_name,
    report,
    show,
    write,
)
from rich.table import Table

from bnnlaplace.krylov import gram_schmidt, lanczos
from bnnlaplace.krylov.lanczos import Lanczos

Part = Literal["headline", "depth", "size", "overhead", "hilbert"]

SLOW_PRODUCT = 0.01  # Seconds from which on a product counts as expensive.


def value_and_grad(factorise: Callable) -> Callable:
    """Return the sum of squares of T or H, which depends on every entry, with its gradients in start and parameters."""
    return jax.value_and_grad(lambda *arguments: jnp.sum(projected(factorise(*arguments)) ** 2), argnums=(0, 1))


def programs(
    problem: Problem,
    depth: int,
    method: str = "lanczos",
    gradients: Sequence[str] = ("adjoint",),
    libraries: Sequence[str] = LIBRARIES,
) -> dict[str, Program]:
    """Compile the decomposition, and its value with gradients, of each library for a problem."""
    compiled = {}
    for gradient in gradients:
        suffix = "" if gradient == "adjoint" else ", backpropagation"
        for library in libraries:
            run = factorisation(library, method, problem.matvec, depth, gradient)
            for name, function in (("forward", run), ("value and gradient", value_and_grad(run))):
                compiled[f"{library} {name}{suffix}"] = compile_ahead(function, problem.start, problem.params)
    return compiled


def difference(actual: Array, expected: Array) -> float:
    """Largest difference of two arrays, relative to the largest expected entry."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def agreement(problem: Problem, depth: int, method: str, cases: Mapping[str, Program]) -> Results:
    """Print relative differences of T or H and of the gradients, between libraries and from ours in float64."""

    def parts(result: Any, value: tuple[Array, tuple[Array, Array]]) -> dict[str, Array]:
        start, entries = value[1]
        if method == "lanczos":
            # In a symmetric matrix only the sum of the gradients in an entry and in its mirror image has a meaning.
            entries = entries + entries[problem.mirror]
        return {"T or H": projected(result), "gradient in start": start, "gradient in entries": entries}

    results = {
        library: parts(cases[f"{library} forward"].run(), cases[f"{library} value and gradient"].run())
        for library in LIBRARIES
    }
    with jax.enable_x64(True):
        run = factorisation("ours", method, problem.matvec, depth)
        exact = problem.start.astype(jnp.float64), problem.params.astype(jnp.float64)
        reference = parts(jax.jit(run)(*exact), jax.jit(value_and_grad(run))(*exact))
    pairs = {f"{library} from float64": (values, reference) for library, values in results.items()}
    if "matfree" in results:
        pairs["ours from matfree"] = results["ours"], results["matfree"]
    table = Table("relative largest difference", *reference)
    differences = {}
    for name, (values, expected) in pairs.items():
        differences[name] = {part: difference(values[part], expected[part]) for part in reference}
        table.add_row(name, *(f"{value:.1e}" for value in differences[name].values()))
    console.print(table)
    return differences


def compare(seconds: Mapping[str, float]) -> Results:
    """Print and judge the ratios of a problem's cases."""
    forward, gradient = seconds["ours forward"], seconds["ours value and gradient"]
    targets = {"ours, backward / forward": (gradient / forward - 1, 1.5)}
    if decomp:
        peer_forward, peer_gradient = seconds["matfree forward"], seconds["matfree value and gradient"]
        targets["forward, ours / matfree"] = forward / peer_forward, 0.7
        targets["value and gradient, ours / matfree"] = gradient / peer_gradient, 0.6
        console.print(f"  matfree, backward / forward: {peer_gradient / peer_forward - 1:.3g}")
    through_loop = seconds.get("ours value and gradient, backpropagation")
    if through_loop:
        console.print(f"  ours, value and gradient, adjoint / backpropagation: {gradient / through_loop:.3g}")
    return judge(targets)


def headline(repetitions: int, small: bool) -> Results:
    """Measure both methods at two depths, and backpropagation at the smaller one."""
    both = "adjoint", "autodiff"
    side, depths = (32, {10: both}) if small else (100, {100: ("adjoint",), 50: both})
    answers = {}
    for method, wind in (("lanczos", (0.0, 0.0)), ("arnoldi", CONVECTION)):
        problem = sparse_grid(side, wind)
        for depth, gradients in depths.items():
            cases = programs(problem, depth, method, gradients)
            results = measure(cases, repetitions)
            show(f"{method.capitalize()}, {side * side} rows, depth {depth}, float32", results)
            answers[f"{method}_{depth}"] = {
                "cases": results,
                "differences": agreement(problem, depth, method, cases),
                "targets": compare({name: case["seconds"] for name, case in results.items()}),
            }
    return answers


def growth_with_depth(repetitions: int, small: bool) -> dict[str, Any]:
    """Measure Lanczos on the sparse grid at several depths, and how the memory of the gradients grows."""
    side, depths = (32, (5, 10)) if small else (100, (10, 20, 50, 100))
    problem, rows = sparse_grid(side), {}
    for depth in depths:
        through_loop = value_and_grad(factorisation("ours", "lanczos", problem.matvec, depth, "autodiff"))
        backpropagation = compile_ahead(through_loop, problem.start, problem.params)
        cases = programs(problem, depth) | {"ours value and gradient, backpropagation": backpropagation}
        rows[depth] = measure(cases, repetitions)
        show(f"Lanczos, {side * side} rows, depth {depth}", rows[depth])
    exponents = {}
    for name in (name for name in rows[depths[0]] if "gradient" in name):
        memory = [rows[depth][name]["memory_bytes"] for depth in depths]
        exponents[name] = float(np.polyfit(np.log(depths), np.log(memory), 1)[0])
        console.print(f"  memory of {name}: of order depth^{exponents[name]:.2f}")
    linear = judge({"exponent of the memory of the adjoint": (exponents["ours value and gradient"], 1.1)})
    return {"rows": side * side, "depths": rows, "memory_exponents": exponents, "targets": linear}


def growth_with_size(repetitions: int, small: bool) -> dict[str, Any]:
    """Measure Lanczos on grids of several sizes by shifts, and what Gram-Schmidt in blocks of vectors saves."""
    sides, depth = ((32,), 10) if small else ((32, 100, 316, 1000), 50)
    rows, blocks = {}, {}
    for side in sides:
        problem, size = stencil_grid(side), side * side
        # One call of matfree takes up to half a minute for the largest grid.
        rows[size] = measure(programs(problem, depth), repetitions if side <= 100 else 3 if side < 1000 else 1)
        show(f"Lanczos, {size} rows, depth {depth}, stencil", rows[size])
        if 2 * depth * problem.start.nbytes > gram_schmidt.WHOLE_BYTES:
            compile_ours = partial(programs, problem, 2 * depth, libraries=("ours",))
            whole = {f"{name}, one block": case for name, case in in_one_block(compile_ours).items()}
            blocks[size] = measure(compile_ours() | whole, 5 if side < 1000 else 3)
            for name in ("ours forward", "ours value and gradient"):
                ratio = blocks[size][name]["seconds"] / blocks[size][f"{name}, one block"]["seconds"]
                console.print(f"  {name}, depth {2 * depth}, basis in blocks / in one block: {ratio:.3g}")
    return {"depth": depth, "sizes": rows, "blocks": blocks}


def in_one_block(compile_all: Callable[[], dict[str, Program]]) -> dict[str, Program]:
    """Compile with Gram-Schmidt over the whole basis in each step, whatever its size."""
    limit, gram_schmidt.WHOLE_BYTES = gram_schmidt.WHOLE_BYTES, math.inf
    try:
        return compile_all()
    finally:
        gram_schmidt.WHOLE_BYTES = limit


def slow_matrix(small: bool) -> tuple[Array, Callable[[Array, Array, Array], Array]]:
    """A dense symmetric matrix M of norm about 1 whose product takes 10 ms, and the operator v, s, M -> s M v."""

    def matvec(vector: Array, scale: Array, matrix: Array) -> Array:
        return scale * (matrix @ vector)

    for size in (2048,) if small else (8192, 12288, 16384):
        matrix = jax.random.normal(jax.random.key(1), (size, size)) / np.sqrt(8 * size)
        matrix = jax.block_until_ready(matrix + matrix.T)
        once = jax.jit(lambda matrix, vector: matrix @ vector)
        run = partial(once, matrix, jnp.ones(size))
        jax.block_until_ready(run())
        if interleaved({"": run}, 5)[""] >= SLOW_PRODUCT:
            break
    return matrix, matvec


def unavoidable(matvec: Callable, depth: int) -> dict[str, Callable]:
    """The work that full reorthogonalisation cannot avoid, as loops of (start, scale, matrix, basis)."""

    def products(start: Array, scale: Array, matrix: Array, _: Array) -> Array:
        return jax.lax.fori_loop(0, depth, lambda _, vector: matvec(vector, scale, matrix), start)

    def derivatives(start: Array, scale: Array, matrix: Array, basis: Array) -> Array:
        def term(total: Array, row: Array) -> tuple[Array, None]:
            return total + jax.grad(lambda scale: jnp.vdot(start, matvec(row, scale, matrix)))(scale), None

        return jax.lax.scan(term, jnp.zeros_like(scale), basis)[0]

    def sweep(start: Array, _: Array, __: Array, basis: Array) -> Array:
        blocks, wanted = gram_schmidt.split(basis), jnp.zeros(depth)
        return jax.lax.fori_loop(0, depth, lambda k, v: gram_schmidt.impose(blocks, k, v, wanted)[0], start)

    return {"K products": products, "K derivatives in the scale": derivatives, "one sweep of Gram-Schmidt": sweep}


def fractions_left(results: Results) -> dict[str, list[float]]:
    """Fraction of each round's time that is left after the unavoidable work, forward and with gradient."""
    of_each_round = zip(*(case["rounds"] for case in results.values()), strict=True)
    fractions: dict[str, list[float]] = {"forward": [], "value and gradient": []}
    for forward, gradient, products, derivatives, sweep in of_each_round:
        fractions["forward"].append(1 - (products + sweep) / forward)
        fractions["value and gradient"].append(1 - (2 * products + derivatives + 2 * sweep) / gradient)
    return fractions


def overhead(repetitions: int, small: bool) -> dict[str, Any]:
    """Measure how much of the time is not products, their derivatives, or one pass of Gram-Schmidt in each step."""
    depth = 10 if small else 50
    matrix, matvec = slow_matrix(small)
    arguments = jax.random.normal(jax.random.key(0), (len(matrix),)), jnp.ones(()), matrix

    def run(start: Array, scale: Array, matrix: Array) -> Lanczos:
        return lanczos(matvec, start, scale, matrix, num_matvecs=depth)

    cases = {
        "forward": compile_ahead(run, *arguments),
        "value and gradient": compile_ahead(value_and_grad(run), *arguments),
    }
    basis = cases["forward"].run().basis
    for name, function in unavoidable(matvec, depth).items():
        cases[name] = compile_ahead(function, *arguments, basis)
    results = measure(cases, repetitions)
    product = results["K products"]["seconds"] / depth
    show(f"Lanczos, depth {depth}, dense {len(matrix)} x {len(matrix)}, {1e3 * product:.1f} ms a product", results)
    if product < SLOW_PRODUCT:
        console.print(f"  a product takes less than {1e3 * SLOW_PRODUCT:g} ms here: too little for this question")
    # The gradient is in the scale. One in the matrix would take as much memory again as the matrix.
    formed = results["value and gradient"]["memory_bytes"] > 1.5 * matrix.nbytes
    console.print(f"  a gradient in the matrix {'[bold]is[/bold]' if formed else 'is not'} formed")
    console.print("  counted for forward: K products, one sweep; for value and gradient: 2 K products, K derivatives")
    console.print("  in the scale (a product each), two sweeps. A sweep is one pass of Gram-Schmidt in each step.")
    # A small difference of large times, on a machine that does other things as well, is compared within each round.
    left = fractions_left(results)
    for name, values in left.items():
        low, high = np.quantile(values, (0.25, 0.75))
        console.print(f"  {name}, fraction left over in each round: quartiles {low:.3f} and {high:.3f}")
    targets = judge({f"{name}, fraction left over, median": (float(np.median(left[name])), 0.15) for name in left})
    return {"rows": len(matrix), "depth": depth, "cases": results, "fractions_left": left, "targets": targets}


def hilbert(_repetitions: int, small: bool) -> dict[str, Any]:
    """Measure the errors of all sizes and both methods, in float64."""
    sizes, seeds = (range(2, 4), 1) if small else (range(2, 9), 3)
    log10_errors, targets = {}, {}
    for method in ("lanczos", "arnoldi"):
        with jax.enable_x64(True):
            errors = [jacobian_errors(method, size, seeds) for size in sizes]
        table = Table("size", *errors[0])
        for size, row in zip(sizes, errors, strict=True):
            table.add_row(str(size), *(f"{value:.1f}" for value in row.values()))
        console.print(f"{method.capitalize()}: log10 of the error of the Jacobian of A -> Q H Q', Hilbert matrices")
        console.print(table)
        worst = max(10 ** (row["projection"] - row["backpropagation"]) for row in errors)
        targets |= judge({f"{method}, largest ratio of errors, projection / backpropagation": (worst, 10)})
        log10_errors[method] = {name: [row[name] for row in errors] for name in errors[0]}
    return {"sizes": list(sizes), "log10_errors": log10_errors, "targets": targets}


def main(parts: tuple[Part, ...] = get_args(Part), repetitions: int = 9, small: bool = False) -> None:
    """Run the parts, print, write and plot.

    Args:
        parts: Which questions to answer.
        repetitions: How often to repeat each timing; the median counts. Large problems have fewer.
        small: Small problems and three repetitions, to see that everything runs.
    """
    parts = tuple(part for part in get_args(Part) if part in parts)
    options = {"parts": parts, "repetitions": repetitions, "small": small}
    answer = {
        "headline": headline,
        "depth": growth_with_depth,
        "size": growth_with_size,
        "overhead": overhead,
        "hilbert": hilbert,
    }
    content: dict[str, Any] = {"options": options, "matfree": importlib.metadata.version("matfree") if decomp else None}
    if not decomp:
        console.print("matfree is not installed, and its rows are left out: pip install matfree==0.6.3")
    for part in parts:
        content[part] = answer[part](3 if small else repetitions, small)
    stem = record_name("krylov", main, options)
    write(stem, content)
    if "depth" in parts:
        report(plot_time(content["depth"], RESULTS / f"{stem}_time.png"))
    if "hilbert" in parts:
        report(plot_hilbert(content["hilbert"], RESULTS / f"{stem}_hilbert.png"))


if __name__ == "__main__":
    tyro.cli(main)
