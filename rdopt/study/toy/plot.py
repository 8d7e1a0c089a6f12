"""toy.png: bits against signal-to-noise ratio, and concentration, at column width."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from rdopt.study.toy.curve import Point, bits_at
from rdopt.study.toy.predictions import Seed

_COLOURS = {"fourier": "#0072b2", "mlp": "#222222", "hadamard": "#8a8a8a", "pca": "#cc79a7", "learned": "#d55e00"}
_LINES = {"fourier": "-", "mlp": "-", "hadamard": "--", "pca": "-.", "learned": ":"}
_NAMES = {
    "mlp": "MLP (solid)",
    "hadamard": "Hadamard (dashed)",
    "pca": "principal axes (dash-dotted)",
    "learned": "learned axes (dotted)",
}
_LEVELS = np.linspace(5.0, 23.0, 37)  # dB


def plot_toy(seeds: Sequence[Seed], counts: Sequence[int], path: Path) -> None:
    """Draws both panels.

    Args:
        seeds: records of `run_toy`.
        counts: the numbers of coefficients that their energy curves are given at.
        path: the PNG to write.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = toy_figure(seeds, counts)
    fig.savefig(path)
    plt.close(fig)


def toy_figure(seeds: Sequence[Seed], counts: Sequence[int]) -> Any:
    """The figure: medians over the seeds, the range between the quartiles shaded for Fourier and the plain MLP."""
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
        fig, (above, below) = plt.subplots(2, 1, figsize=(3.4, 4.6), dpi=200, layout="constrained")
        _draw_bits(above, seeds)
        _draw_energy(below, seeds, counts)
        for ax in (above, below):
            ax.grid(True, color="#ececec", linewidth=0.5)
            ax.set_axisbelow(True)
    return fig


def bits_curves(seeds: Sequence[Seed], arm: str) -> np.ndarray:
    """(seeds, levels) bits; nan where a seed does not reach."""
    rows = []
    for seed in seeds:
        points = [Point(**p) for p in seed["arms"][arm]["points"]]
        rows.append([bits_at(points, level) for level in _LEVELS])
    return np.array(rows)


def _draw_bits(ax: Any, seeds: Sequence[Seed]) -> None:
    for arm, colour in _COLOURS.items():
        rows = bits_curves(seeds, arm)
        common = ~np.isnan(rows).any(axis=0)
        x, rows = _LEVELS[common], rows[:, common]
        if not len(x):
            continue
        ax.plot(x, np.median(rows, axis=0), _LINES[arm], color=colour, linewidth=1.2)
        if arm in ("fourier", "mlp"):
            ax.fill_between(x, *np.quantile(rows, (0.25, 0.75), axis=0), color=colour, alpha=0.15, linewidth=0)
    ax.set_yscale("log")
    ax.set_ylim(200, 60_000)
    ax.set_xlabel("signal-to-noise ratio of the decoded signal, dB")
    ax.set_ylabel("file, bits (price of the axes left out)")
    ax.text(0.98, 0.23, "Fourier", color=_COLOURS["fourier"], transform=ax.transAxes, ha="right", va="bottom")
    _stack(ax, 0.98, 0.66, "right")


def _draw_energy(ax: Any, seeds: Sequence[Seed], counts: Sequence[int]) -> None:
    for arm, colour in _COLOURS.items():
        energy = np.median([seed["arms"][arm]["energy_curve"] for seed in seeds], axis=0)
        ax.plot(counts, energy, _LINES[arm], color=colour, linewidth=1.2)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("largest coefficients or parameters, number")
    ax.set_ylabel("share of the energy (in steps)")
    ax.text(0.20, 0.86, "Fourier", color=_COLOURS["fourier"], transform=ax.transAxes, ha="right", va="bottom")
    _stack(ax, 0.98, 0.58, "right")


def _stack(ax: Any, x: float, y: float, side: str) -> None:
    """The names of the MLP's curves, which lie on one another, below each other in their colours."""
    for row, (arm, name) in enumerate(_NAMES.items()):
        ax.text(x, y - 0.075 * row, name, color=_COLOURS[arm], transform=ax.transAxes, ha=side, va="top")
