"""Four pictures of one model's comparison of transforms, readable at column width."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from peers.report import Cell

from rdopt.study.labels import name_ends

_BASES = {"identity": "#222222", "hadamard": "#8a8a8a", "joint": "#0072b2", "all gauges": "#d55e00"}
_SIZE = (3.4, 2.7)


def plot_transforms(cells: Sequence[Cell], folder: Path) -> None:
    """Writes MODEL-spectrum, -angles, -training and -relaxed.png.

    Args:
        cells: of one model, as `transform_arms` measures them.
        folder: made when missing.
    """
    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    model = cells[0]["model"]
    for name, draw in (("spectrum", _spectrum), ("angles", _angles), ("training", _training), ("relaxed", _relaxed)):
        _save(folder / f"{model}-{name}.png", draw, cells)


def _save(path: Path, draw: Any, cells: Sequence[Cell]) -> None:
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
        fig, ax = plt.subplots(figsize=_SIZE, dpi=200, layout="constrained")
        draw(ax, cells)
        ax.grid(True, color="#ececec", linewidth=0.5)
        ax.set_axisbelow(True)
        fig.savefig(path)
        plt.close(fig)


def _spectrum(ax: Any, cells: Sequence[Cell]) -> None:
    """Mean square of the columns in every basis, falling."""
    for name, colour in _BASES.items():
        found = [c for c in cells if c["variant"] == name and "columns" in c]
        if found:
            power = np.array(found[len(found) // 2]["columns"])
            ax.plot(np.arange(1, len(power) + 1), power, color=colour, linewidth=1.2, label=name)
    ax.set_yscale("log")
    ax.set_xlabel("column of the matrices that read the stream, by its power")
    ax.set_ylabel("mean square over that of the matrix")
    ax.legend(frameon=False, fontsize=6)


def _angles(ax: Any, cells: Sequence[Cell]) -> None:
    """By how much training turned the residual stream away from its start."""
    curves = [(c["target"], c["angles"][::2]) for c in cells if c["variant"] == "all gauges" and "angles" in c]
    _by_slope(ax, curves, "left")  # a plane has two conjugate eigenvalues
    ax.set_xlabel("invariant plane of (start)ᵀ (trained), by its angle")
    ax.set_ylabel("angle, degrees")


def _training(ax: Any, cells: Sequence[Cell]) -> None:
    """J over the steps, less that of the first step."""
    found = [c for c in cells if c["variant"] == "all gauges" and "history" in c]
    _by_slope(ax, [(c["target"], np.array(c["history"]) - c["history"][0]) for c in found], "right")
    ax.set_xlabel("step")
    ax.set_ylabel("J less J at the start, bits/weight")


def _by_slope(ax: Any, curves: Sequence[tuple[float, Any]], side: str) -> None:
    """A line a slope, named at its left or right end."""
    ends = []
    for (lam, y), shade in zip(sorted(curves, key=lambda c: c[0]), np.linspace(0.75, 0.1, max(len(curves), 1)),
                               strict=True):
        colour = matplotlib.colormaps["viridis"](shade)
        ax.plot(np.arange(1, len(y) + 1), y, color=colour, linewidth=1.1)
        at = 0 if side == "left" else len(y) - 1
        ends.append((f"λ = {lam:g}", at + 1, float(y[at]), colour))
    if ends:
        low, high = ax.get_xlim()
        room = 0.14 * (high - low)
        ax.set_xlim(low - room * (side == "left"), high + room * (side == "right"))
        ax.set_xticks([x for x in ax.get_xticks() if 0 <= x <= high])
        name_ends(ax, ends, side)


def _relaxed(ax: Any, cells: Sequence[Cell]) -> None:
    """Relaxed against hard bits of the codes: how far each lies from the diagonal."""
    found = [c for c in cells if c.get("relaxed")]
    hard = np.array([c["hard"]["codes"] for c in found])
    error = np.array([100 * (c["relaxed"]["rate"] / c["hard"]["codes"] - 1) for c in found])
    trained = np.array(["history" in c for c in found], bool)
    ax.axhline(0, color="#bbbbbb", linewidth=0.8)
    for some, colour, label in ((~trained, "#8a8a8a", "fixed bases, other criteria"), (trained, "#d55e00", "trained")):
        ax.plot(hard[some], error[some], "o", markersize=2.5, color=colour, label=label)
    ax.set_xlabel("bits/weight of the codes, hard encoder")
    ax.set_ylabel("relaxed rate above it, %")
    ax.legend(frameon=False, fontsize=6)
