"""Names beside the ends of lines, moved apart where they would cover each other."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy.optimize import isotonic_regression


def spread_apart(
    places: Float[np.ndarray, " n"], gap: float, low: float = -np.inf, high: float = np.inf
) -> Float[np.ndarray, " n"]:
    """The nearest places (in squares) that are at least `gap` apart, in the order of the given ones, within limits.

    Less gap * number in the order they must not fall: an isotonic regression, and clipping it is best within limits.

    Raises:
        ValueError: so many do not fit within the limits.
    """
    order, steps = np.argsort(places, kind="stable"), gap * np.arange(len(places))
    if high - low < steps[-1]:
        raise ValueError(f"{len(places)} labels {gap:g} apart do not fit into {high - low:g}")
    found = np.empty(len(places))
    found[order] = np.clip(isotonic_regression(places[order] - steps).x, low, high - steps[-1]) + steps
    return found


def name_ends(ax: Any, ends: Sequence[tuple[str, float, float, Any]], side: str) -> None:
    """Writes names to the "left" or "right" of points, (name, x, y, colour) each, into axes whose limits are set."""
    log = ax.get_yscale() == "log"
    heights = np.array([np.log10(y) if log else y for *_, y, _ in ends])
    low, high = (float(np.log10(v) if log else v) for v in ax.get_ylim())
    gap = (high - low) * min(0.055, 0.99 / len(ends))
    moved = spread_apart(heights, gap, low + gap / 2, high - gap / 2)
    for (name, x, _, colour), y in zip(ends, moved, strict=True):
        ax.annotate(
            name, (x, 10**y if log else y), xytext=(4 if side == "right" else -4, 0), textcoords="offset points",
            fontsize=6, ha="left" if side == "right" else "right", va="center", color=colour,
        )
