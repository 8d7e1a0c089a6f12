"""Work on all cores that holds only a few results at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

from threadpoolctl import threadpool_limits

A = TypeVar("A")
B = TypeVar("B")
_AHEAD = 4


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def on_cores(threads: int) -> Iterator[ThreadPoolExecutor]:
    """A pool of so many threads, of all cores this process may use where it is 0.

    Meanwhile BLAS keeps to the thread that calls it: threads of its own in each of ours wait for one another, and the
    small products of feedback took ten times as long.
    """
    with threadpool_limits(1, user_api="blas"), ThreadPoolExecutor(threads or cores()) as pool:
        yield pool


def bounded_map(pool: Executor, work: Callable[[A], B], items: Iterable[A], limit: int = _AHEAD) -> Iterator[B]:
    """work(item) of every item in order; at most `limit` items are taken before their results are asked for.

    An executor's own map takes all items at once, which holds them all.
    """
    waiting: deque[Future[B]] = deque()
    for item in items:
        waiting.append(pool.submit(work, item))
        if len(waiting) >= limit:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
