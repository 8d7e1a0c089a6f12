"""How much memory a command may take, and what is kept within it."""

import os
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

MACHINE_SHARE = 0.6  # of the machine's memory, where nothing else is said


def memory_budget(gib: float | None) -> int:
    """Bytes of `run.memory`, or of MACHINE_SHARE of the machine."""
    if gib is not None:
        return int(gib * 2**30)
    return int(MACHINE_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


@dataclass(eq=False)
class _Entry:
    value: Future = field(default_factory=Future)
    size: int = 0
    used: int = 0


class Cache:
    """Values that can be made again: kept while they fit a budget, the longest unused dropped first.

    Values belong to an owner and go with it. What is being made by one thread is waited for by the others.

    Args:
        budget: bytes of arrays.
    """

    def __init__(self, budget: int) -> None:
        self.budget, self._clock, self._lock = budget, 0, threading.Lock()
        self._owned: weakref.WeakKeyDictionary[Any, dict[Hashable, _Entry]] = weakref.WeakKeyDictionary()

    def get(self, owner: Any, key: Hashable, make: Callable[[], Any]) -> Any:
        """The value of an owner's key, made where it is not kept."""
        with self._lock:
            held = self._owned.setdefault(owner, {})
            entry = held.get(key)
            ours = entry is None
            if entry is None:
                entry = held[key] = _Entry()
            self._clock += 1
            entry.used = self._clock
        if not ours:
            return entry.value.result()
        try:
            value = make()
        except BaseException as error:
            with self._lock:
                held.pop(key, None)
            entry.value.set_exception(error)
            raise
        entry.size = array_bytes(value)
        entry.value.set_result(value)
        self._shrink()
        return value

    def _shrink(self) -> None:
        with self._lock:
            entries = [(entry, held, key) for held in self._owned.values() for key, entry in held.items()]
            total = sum(entry.size for entry, _, _ in entries)
            for entry, held, key in sorted(entries, key=lambda x: x[0].used):
                if total <= self.budget:
                    return
                if entry.value.done():
                    total -= entry.size
                    del held[key]


def array_bytes(value: Any) -> int:
    """Bytes of the arrays in a value: an array, or tuples and mappings of such."""
    if isinstance(value, Mapping):
        return sum(map(array_bytes, value.values()))
    if isinstance(value, (tuple, list)):
        return sum(map(array_bytes, value))
    return getattr(value, "nbytes", 0)
