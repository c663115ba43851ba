"""Work divided among processes that start afresh, end with their parent, and show a bar."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import TypeVar

from crbp._threads import usable_cores

Job = TypeVar("Job")
Result = TypeVar("Result")


def cores() -> int:
    """Return the number of cores that this process may use."""
    return usable_cores() or os.cpu_count() or 1


def run(work: Callable[[Job], Result], jobs: Sequence[Job], workers: int) -> Iterator[Result]:
    """Yield what `work`, a function of a module, makes of each job, in the order in which they are done.

    One worker, or one job, works in this process.
    """
    if workers == 1 or len(jobs) < 2:
        for job in jobs:
            yield work(job)
        return
    context = get_context("spawn")  # a forked child of a process with threads may hang
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_end_with_parent) as pool:
        futures = [pool.submit(work, job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@contextmanager
def bar(show: bool, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on standard error; gives the function that moves it on."""
    from rich.console import Console
    from rich.progress import Progress, TimeRemainingColumn

    columns = (*Progress.get_default_columns()[:-1], TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not show) as progress:
        task = progress.add_task(what, total=total)
        yield lambda made: progress.advance(task, made)


def _end_with_parent() -> None:
    """Make a worker process end when its parent is killed, which cannot tell it to."""
    parent = parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            connection.wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()
