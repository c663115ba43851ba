"""The command: options, the two processes and their progress bars, what is written and printed."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from crbp._command import Parser, reserve
from crbp.demo import report, training
from crbp.demo.recipe import FULL, QUICK, Recipe
from crbp.errors import CrbpError

if TYPE_CHECKING:
    from multiprocessing.sharedctypes import Synchronized

    from crbp.demo.training import Outcome

_shared: Synchronized[float]


def main(arguments: list[str]) -> None:
    """Run the demo.

    Raises:
        CrbpError: if the options are wrong or the folder cannot be written to.
    """
    options = _options(arguments)
    recipe = QUICK if options.quick else FULL
    folder, console, start = Path(options.out), Console(), time.perf_counter()
    reserve(folder, [folder / "report.html", *([Path(options.json)] if options.json else [])])
    console.print(
        f"Training a recurrent model to trace contours on {recipe.images:,} generated images, once with [bold]C-RBP[/] "
        "and for as long with [bold]BPTT[/], each on one core."
    )
    outcomes = _train(recipe, options.seed, console)
    with console.status("Drawing the report …"):
        numbers = report.write(folder, recipe, outcomes, seed=options.seed, quick=options.quick, since=start)
    if options.json:
        Path(options.json).write_text(json.dumps(numbers, indent=2) + "\n")
    console.print(report.summary(numbers, recipe))
    console.print(f"Open [bold]{folder / 'report.html'}[/] to see the contours being traced.", soft_wrap=True)


def parser() -> argparse.ArgumentParser:
    """The command's parser."""
    made = Parser(prog="crbp demo", description="Train a small model with C-RBP beside one with BPTT; write a report.")
    made.add_argument("--quick", action="store_true", help="the same path in under 90 seconds, at lower quality")
    made.add_argument("--out", default="demo", metavar="DIR", help="folder of the report (default: demo)")
    made.add_argument("--json", metavar="FILE", help="write the numbers to this file as well")
    made.add_argument("--seed", type=int, default=0, help="of weights and images (default: 0)")
    return made


def _options(arguments: list[str]) -> argparse.Namespace:
    options = parser().parse_args(arguments)
    if options.seed < 0:
        raise CrbpError(f"--seed must be at least 0, not {options.seed}")
    return options


def _train(recipe: Recipe, seed: int, console: Console) -> dict[str, Outcome]:
    """Both models at the same time, so that each has one core and exactly the same time."""
    jobs = {"C-RBP": training.crbp_model, "BPTT": training.bptt_model}
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when a process starts, so it holds for these two
    context = multiprocessing.get_context("spawn")
    progress = context.Value("d", 0.0)
    with ProcessPoolExecutor(len(jobs), context, initializer=_share, initargs=(progress,)) as pool:
        futures = {name: pool.submit(_call, job, recipe, seed) for name, job in jobs.items()}
        try:
            _show(progress, list(futures.values()), console)
        except BaseException:
            progress.value = 1.0  # ends the training of the process that is still at it
            for process in multiprocessing.active_children():
                process.terminate()
            raise
        return {name: future.result() for name, future in futures.items()}


def _share(progress: Synchronized[float]) -> None:
    global _shared
    _shared = progress


def _call(job: Callable[..., Outcome], recipe: Recipe, seed: int) -> Outcome:
    return job(recipe, _shared, seed)


def _show(progress: Synchronized[float], futures: list[Future[Any]], console: Console) -> None:
    """Draw the progress until both are done; raise what either of them raised."""
    columns = [TextColumn("{task.description}"), BarColumn(), TaskProgressColumn()]
    with Progress(
        *columns, TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=console, refresh_per_second=2
    ) as bars:
        bar = bars.add_task("training", total=1.0)
        while not all(future.done() for future in futures):
            wait(futures, timeout=0.5, return_when=FIRST_EXCEPTION)
            for future in futures:
                if future.done():
                    future.result()
            bars.update(bar, completed=progress.value)
            if progress.value >= 1:
                bars.update(bar, description="measuring")
