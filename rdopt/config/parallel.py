"""Work on all cores that holds only a few results at a time."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

A = TypeVar("A")
B = TypeVar("B")
_AHEAD = 4


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
