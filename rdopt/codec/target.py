"""The base step that makes a file of a wanted size: a secant search on log2 of the step.

At high rate a step twice as large saves one bit/weight, so bits/weight against log2(c) is near a line of slope -1
and a few trials are enough.
"""

import math
from collections.abc import Callable
from typing import TypeVar

from rdopt.config.errors import UserError

TOLERANCE = 0.02
T = TypeVar("T")


def search_step(
    encode: Callable[[float], T],
    bpw: Callable[[T], float],
    target: float,
    start: float,
    *,
    tolerance: float = TOLERANCE / 4,
    trials: int = 12,
) -> T:
    """The result of `encode(c)` whose bits/weight lies within the tolerance of the target.

    Args:
        encode: from a base step to a file.
        bpw: bits/weight of a file.
        target: wanted bits/weight.
        start: first base step.
        tolerance: aimed-at distance; the closest trial within TOLERANCE is accepted.
        trials: at most.

    Raises:
        UserError: no trial came within TOLERANCE (the target lies below the side information).
    """
    log_c, slope = math.log2(start), -1.0
    best: tuple[float, T] | None = None
    last: tuple[float, float] | None = None
    for _ in range(trials):
        result = encode(2.0**log_c)
        miss = bpw(result) - target
        if best is None or abs(miss) < abs(best[0]):
            best = (miss, result)
        if abs(miss) <= tolerance:
            break
        if last is not None and log_c != last[0] and (found := (miss - last[1]) / (log_c - last[0])) < -0.05:
            slope = found
        last = (log_c, miss)
        log_c -= max(-4.0, min(4.0, miss / slope))
    assert best is not None
    if abs(best[0]) > TOLERANCE:
        raise UserError(
            f"{target:g} bits/weight cannot be reached: the closest file has {target + best[0]:.3f}; "
            "ask for more (tables and scales alone cost some)."
        )
    return best[1]
