"""Train a Visual Attention Network, fit Laplace and variational posteriors to it, and evaluate all on held-out images.

python -m training.fit_van --config configs/van_digits.py --workdir checkpoints/van_digits --seed 1
"""

import sys

if __name__ == "__main__":  # The imports below take seconds.
    from training.cli.interruption import end_while_loading

    end_while_loading()

import dataclasses
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import jax
import numpy as np
from rich.console import Console

from bnnlaplace import Laplace, Network
from training import posteriors, trained_on
from training.cli import interruption, program
from training.cli.arguments import Arguments, parse
from training.config import Config
from training.data.load import ImageData, load, with_statistics
from training.errors import UserError
from training.models import van
from training.pretrained.start import start_from
from training.report import evaluation
from training.report.html import write_results
from training.train import loop
from training.train.checkpoints import list_steps, seconds_of
from training.train.evidence import check_window
from training.workdir import claimed, continue_command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit status."""
    return program.run(lambda console: fit(sys.argv[1:] if argv is None else argv, console), "--data.dir")


def fit(argv: Sequence[str], console: Console) -> None:
    """Load the data, train, fit the posteriors, evaluate, and write the report."""
    arguments = parse(argv, "python -m training.fit_van")
    report = program.reporter(console)
    watch = program.Stopwatch(console)
    with (
        watch.stage("data"),
        interruption.promptly("stopped in stage data; nothing is written; run the same command again"),
    ):
        data = load(arguments.settings.data)
        section = with_statistics(arguments.settings.data, data.train.images)
        config = dataclasses.replace(arguments.settings, data=section)
        module = van.from_config(config, len(data.class_names))
        is_begun = arguments.resume and bool(list_steps(arguments.workdir / "train"))
        _check(config, data, module, is_begun)
        if not is_begun:  # it may be finished; `train` checks it if it is not
            check_window(config)
        foreign = evaluation.foreign_images(config, data)
    with (
        claimed(arguments.workdir, config, arguments.resume, report) as config,
        program.continued_by(continue_command(arguments.workdir)),
    ):
        _train_and_evaluate(arguments, config, data, foreign, module, watch)


def _train_and_evaluate(
    arguments: Arguments,
    config: Config,
    data: ImageData,
    foreign: np.ndarray,
    module: van.VAN,
    watch: program.Stopwatch,
) -> None:
    """Do what comes after the data, in a work directory that this run has claimed."""
    workdir, console = arguments.workdir, watch.console
    trained_on.claim(workdir, data, config.data.dir)
    with watch.stage("training"):
        trained = loop.train(
            config,
            data,
            module,
            workdir=workdir,
            resume=arguments.resume,
            console=console,
        )
    program.release_programs()  # what follows keeps much in memory
    # If this start resumed the run, the time of earlier starts counts too.
    watch.seconds["training"] = seconds_of(trained)
    network = posteriors.make_network(module, trained.params, trained.batch_stats)
    with watch.stage("posterior"):
        fitted = _load_fitted(config, workdir, network, console) if arguments.resume else None
        if fitted is None:
            started = perf_counter()
            fitted = posteriors.fit(config, data, network, trained.prior, console)
            posteriors.save(workdir, fitted, config, seconds=perf_counter() - started)
    watch.seconds["posterior"] = posteriors.seconds_to_fit(workdir) or watch.seconds["posterior"]
    with watch.stage("evaluation"):
        results = evaluation.evaluate(config, data, foreign, trained, fitted, watch.seconds)
    write_results(workdir, results, console)


def _load_fitted(config: Config, workdir: Path, network: Network, console: Console) -> dict[str, Laplace] | None:
    """Load the posteriors that an earlier start left. If there are none, or one is damaged: None."""
    if not posteriors.are_kept(workdir):
        return None
    try:
        return posteriors.load(workdir, network, config, program.reporter(console))
    except UserError as error:
        console.print(f"fitting again: {error}", style="yellow", highlight=False, markup=False)
        return None


def _check(config: Config, data: ImageData, module: van.VAN, is_begun: bool) -> None:
    """Find what would stop the run later, before a work directory is made for it. Nothing is computed."""
    loop.check_batch_size(config, data)
    image = jax.ShapeDtypeStruct((1, *data.train.images.shape[1:]), np.uint8)
    try:
        variables = jax.eval_shape(partial(module.init, train=False), {"params": jax.random.key(0)}, image)
    except ValueError as error:
        raise UserError(f"`data.name` and `model.variant` do not fit each other: {error}") from None
    if config.init_from is not None and not is_begun:
        start_from(config.init_from, config, variables["params"], variables.get("batch_stats", {}))


if __name__ == "__main__":
    sys.exit(main())
