"""Runs a function over many items, in this process or in several, results always in order.

Imports nothing heavy: a worker sets its number of threads before polars is loaded.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import Protocol, TypeVar

A = TypeVar("A")
R = TypeVar("R")


class OrderedMap(Protocol):
    """`ordered_map(function, items)` yields the results in the order of the items."""

    def __call__(self, function: Callable[[A], R], items: Iterable[A], /) -> Iterator[R]:
        """The results of `function`, in the order of `items`."""


@contextmanager
def workers(num_processes: int) -> Iterator[OrderedMap]:
    """An ordered map over `num_processes` new processes; 1 is this process itself.

    Items are drawn as workers get free, so an endless source holds no more than two items per worker in memory.
    """
    if num_processes == 1:
        yield _map_here
        return
    num_threads = max(1, (os.cpu_count() or 1) // num_processes)
    pool = ProcessPoolExecutor(
        num_processes, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(num_threads,)
    )
    try:
        yield partial(_map_in_pool, pool, 2 * num_processes)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _map_here(function: Callable[[A], R], items: Iterable[A]) -> Iterator[R]:
    return map(function, items)


def _start_worker(num_threads: int) -> None:
    os.environ["POLARS_MAX_THREADS"] = str(num_threads)
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


def _map_in_pool(
    pool: ProcessPoolExecutor, max_pending: int, function: Callable[[A], R], items: Iterable[A]
) -> Iterator[R]:
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) >= max_pending:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()
