"""Where the work of `packflex pack` runs: in this process, in worker processes, or over a Ray cluster.

A job is a function of a context and a number that reads and writes files and returns a few counts; what it does is the
same wherever it runs.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Protocol

from packflex.data.errors import DataError, one_line

Counts = dict[str, int]
Job = Callable[[Any, int], Counts]


class Engine(Protocol):
    """Runs jobs."""

    def run(self, job: Job, context: Any, numbers: Iterable[int]) -> Iterator[Counts]:
        """What `job(context, number)` returns for each number, in any order."""
        ...


class LocalEngine:
    """This machine: no worker below two processes.

    Workers are started anew instead of forked (threads of the libraries here do not survive a fork), which takes them
    seconds, and end when this process does, even by a kill.

    Args:
        num_proc: worker processes; None for none.
    """

    def __init__(self, num_proc: int | None = None) -> None:
        self.num_proc = num_proc or 1

    def run(self, job: Job, context: Any, numbers: Iterable[int]) -> Iterator[Counts]:
        """Run the jobs; numbers are taken as workers come free."""
        if self.num_proc == 1:
            for number in numbers:
                yield job(context, number)
            return
        pool = ProcessPoolExecutor(
            self.num_proc, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(job, context)
        )
        waiting: set[Future[Counts]] = set()
        left = iter(numbers)
        try:
            while True:
                waiting |= {pool.submit(_work, number) for number in islice(left, 2 * self.num_proc - len(waiting))}
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process was killed, most often for lack of memory; run the same command again with fewer "
                "workers (--num-proc): what is finished is kept"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


class RayEngine:
    """A Ray cluster: the one at RAY_ADDRESS or already started here, else a local one for the time of the run.

    The nodes read and write the work folder, so on several machines the output must be on storage that they share.

    Args:
        num_proc: actors at most; None for one on each CPU of the cluster.

    Raises:
        DataError: Ray is not installed.
    """

    def __init__(self, num_proc: int | None = None) -> None:
        try:
            import ray.data  # noqa: F401
        except ImportError as error:
            raise DataError(
                f"--engine ray needs Ray Data ({one_line(error)}); pip install 'packflex[ray]', or leave --engine at "
                "local"
            ) from error
        self.num_proc = num_proc

    def run(self, job: Job, context: Any, numbers: Iterable[int]) -> Iterator[Counts]:
        """Run the jobs as a Ray data set of their numbers, mapped by actors."""
        import ray

        numbers = list(numbers)
        if not numbers:
            return
        started = not ray.is_initialized()
        if started:
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        try:
            ray.data.DataContext.get_current().enable_progress_bars = False
            cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
            actors = min(self.num_proc or cpus, cpus, len(numbers))
            jobs = ray.data.from_items([{"number": n} for n in numbers], override_num_blocks=len(numbers))
            worker: Any = _RayWorker  # Ray makes one in each actor
            done = jobs.map(worker, fn_constructor_args=(job, context), concurrency=actors)
            for row in done.iter_rows():
                if row["error"]:
                    raise DataError(row["error"])
                yield dict(zip(row["names"], map(int, row["counts"]), strict=True))
        finally:
            if started:
                ray.shutdown()


class _RayWorker:
    """An actor; errors of the user's go back as text, since Ray wraps exceptions in its own."""

    def __init__(self, job: Job, context: Any) -> None:
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self.job, self.context = job, context

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            counts = self.job(self.context, int(row["number"]))
        except (ValueError, OSError) as error:
            return {"names": [], "counts": [], "error": str(error)}
        return {"names": list(counts), "counts": list(counts.values()), "error": ""}


_job: tuple[Job, Any] | None = None  # of a worker process


def _start_worker(job: Job, context: Any) -> None:
    global _job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one process a core already
    _job = (job, context)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(number: int) -> Counts:
    assert _job is not None, "a worker is started with its job"
    job, context = _job
    return job(context, number)
