"""How a long computation tells what it does: lines of text, counts of what is done, steps of a training."""

import time
from collections.abc import Callable
from typing import Protocol

Say = Callable[[str], None]
"""Takes one line for the user."""
Tick = Callable[[int, int], None]
"""Takes (done, of how many) after every unit of work."""


class Step(Protocol):
    """One step of a training, counted from 1; as text, its number and figures."""

    @property
    def step(self) -> int:
        """Its number."""
        ...

    @property
    def steps(self) -> int:
        """How many there are."""
        ...


def ticker(say: Say, what: str) -> Tick:
    """Says a count in quarters, with the time left; starts anew when the count does."""
    begun, last = time.perf_counter(), 0

    def tick(done: int, total: int) -> None:
        nonlocal begun, last
        if done <= last:
            begun, last = time.perf_counter(), 0
        if done * 4 // total != last * 4 // total:
            left = (time.perf_counter() - begun) / done * (total - done)
            say(f"{what} {done} of {total}  {left:.0f} s left")
        last = done

    return tick


def milestones(say: Say, times: int, prefix: str = "") -> Callable[[Step], None]:
    """Says about `times` evenly spaced steps of a training and the last one, with the time left."""
    first: tuple[int, float] | None = None

    def report(p: Step) -> None:
        nonlocal first
        now = time.perf_counter()
        # The first step compiles, so the pace is counted from its end.
        first = first or (p.step, now)
        if p.step % max(1, p.steps // times) == 0 or p.step == p.steps:
            left = (now - first[1]) / max(1, p.step - first[0]) * (p.steps - p.step)
            say(f"{prefix}{p}  {left:.0f} s left")

    return report
