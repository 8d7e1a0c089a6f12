"""Names beside the ends of lines, moved apart where they would cover each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float


def spread_apart(places: Float[np.ndarray, " n"], gap: float) -> Float[np.ndarray, " n"]:
    """Places at least `gap` apart in the order of the given ones, their mean kept."""
    order = np.argsort(places, kind="stable")
    moved = places[order].astype(np.float64)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    moved -= np.mean(moved - places[order])
    found = np.empty_like(moved)
    found[order] = moved
    return found


def name_ends(ax: Any, ends: Sequence[tuple[str, float, float, Any]], side: str) -> None:
    """Writes names beside points.

    Args:
        ax: axes whose limits are set.
        ends: (name, x, y, colour) of each.
        side: "left" or "right" of the points.
    """
    log = ax.get_yscale() == "log"
    heights = np.array([np.log10(y) if log else y for *_, y, _ in ends])
    height = float(np.ptp([np.log10(v) if log else v for v in ax.get_ylim()]))
    for (name, x, _, colour), y in zip(ends, spread_apart(heights, 0.055 * height), strict=True):
        ax.annotate(
            name, (x, 10**y if log else y), xytext=(4 if side == "right" else -4, 0), textcoords="offset points",
            fontsize=6, ha="left" if side == "right" else "right", va="center", color=colour,
        )
