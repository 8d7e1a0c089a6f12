"""Three pictures of an analysis, readable at column width."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from rdopt.study.labels import name_ends

COLOURS = {
    "identity": "#222222", "hadamard": "#8a8a8a", "random": "#b5b5b5", "pca": "#0072b2", "pca-act": "#56b4e9",
    "joint": "#cc79a7", "learned": "#d55e00", "dct": "#009e73", "fourier": "#7a9a01",
}
OTHER = "#e69f00"
SIZE = (3.4, 2.6)


def plot_analysis(result: Mapping[str, Any], folder: Path) -> None:
    """Writes outliers.png, concentration.png and rounding.png.

    Args:
        result: of `analyze`.
        folder: an existing one.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, draw in (("outliers", _outliers), ("concentration", _concentration), ("rounding", _rounding)):
        with plt.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
            fig, ax = plt.subplots(figsize=SIZE, dpi=200, layout="constrained")
            draw(ax, result)
            ax.grid(True, color="#ececec", linewidth=0.5)
            ax.set_axisbelow(True)
            fig.savefig(folder / f"{name}.png")
            plt.close(fig)


def _rows(result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["tensors"]:
        if row["layer"] is not None:
            found.setdefault(row["basis"], []).append(row)
    return found


def _outliers(ax: Any, result: Mapping[str, Any]) -> None:
    """The largest weight of every matrix, sorted; a line a basis, named at its end."""
    rows = _rows(result)
    ends = []
    for basis, own in rows.items():
        peaks = -np.sort([-r["peak"] for r in own])
        x = np.arange(1, len(peaks) + 1)
        ax.plot(x, peaks, color=COLOURS.get(basis, OTHER), linewidth=1.1)
        ends.append((basis, x[0], peaks[0], COLOURS.get(basis, OTHER)))
    ax.set_yscale("log")
    name_ends(ax, ends, "left")
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
    ax.set_xlim(-0.22 * len(peaks), None)
    ax.set_xticks([x for x in ax.get_xticks() if 0 <= x <= len(peaks)])
    ax.set_xlabel("matrix, by its largest weight")
    ax.set_ylabel("largest weight over rms")


def _concentration(ax: Any, result: Mapping[str, Any]) -> None:
    """Energy that the strongest columns hold."""
    ends, shares = [], (1, 5, 10, 25)
    for basis, own in _rows(result).items():
        y = [float(np.mean([r["columns"][f"top {k}"] for r in own])) for k in shares]
        ax.plot(shares, y, "o-", color=COLOURS.get(basis, OTHER), linewidth=1.1, markersize=2.5)
        ends.append((basis, shares[-1], y[-1], COLOURS.get(basis, OTHER)))
    name_ends(ax, ends, "right")
    ax.set_xlim(0, 33)
    ax.set_xlabel("strongest columns, % of the columns")
    ax.set_ylabel("share of the energy, mean of matrices")


def _rounding(ax: Any, result: Mapping[str, Any]) -> None:
    """KL of rounding at fixed length, plain (line) and with protected outliers (ring)."""
    ends: list[tuple[str, float, float, str]] = []
    for basis in _rows(result):
        own = [n for n in result["networks"] if n["basis"] == basis and n["kind"] == "rounded"]
        plain = {int(n["about"].split()[0]): n["kl"] for n in own if "protected" not in n["about"]}
        kept = {int(n["about"].split()[0]): n["kl"] for n in own if "protected" in n["about"]}
        colour = COLOURS.get(basis, OTHER)
        ax.plot(list(plain), list(plain.values()), "o-", color=colour, linewidth=1.1, markersize=2.5)
        ax.plot(list(kept), list(kept.values()), "o", color=colour, markersize=4.5, fillstyle="none", linewidth=0.6)
        ends.append((basis, max(plain), plain[max(plain)], colour))
    ax.set_yscale("log")
    name_ends(ax, ends, "right")
    longest = max(x for _, x, _, _ in ends)
    ax.set_xlim(None, longest + 1.6)
    ax.set_xticks([x for x in ax.get_xticks() if x <= longest and x == round(x)])
    ax.set_xlabel("bits/weight, rounded; rings: 0.5 % kept in 16 bit")
    ax.set_ylabel("KL(original || rounded), nats/token")
