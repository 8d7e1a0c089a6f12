"""Three pictures of an analysis, readable at column width."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from rdopt.study.analyze.figures import TOP
from rdopt.study.analyze.networks import Network
from rdopt.study.analyze.report import Analysis
from rdopt.study.labels import name_ends

COLOURS = {
    "identity": "#222222", "hadamard": "#8a8a8a", "random": "#b5b5b5", "pca": "#0072b2", "pca-act": "#56b4e9",
    "joint": "#cc79a7", "learned": "#d55e00", "dct": "#009e73", "fourier": "#7a9a01",
}
OTHER = "#e69f00"
SIZE = (3.4, 2.6)


def plot_analysis(analysis: Analysis, folder: Path) -> None:
    """Writes outliers.png, concentration.png and rounding.png into an existing folder."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    for name, draw in (("outliers", _outliers), ("concentration", _concentration), ("rounding", _rounding)):
        with plt.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
            fig, ax = plt.subplots(figsize=SIZE, dpi=200, layout="constrained")
            draw(ax, analysis)
            ax.grid(True, color="#ececec", linewidth=0.5)
            ax.set_axisbelow(True)
            fig.savefig(folder / f"{name}.png")
            plt.close(fig)


def _outliers(ax: Any, analysis: Analysis) -> None:
    """The largest weight of every matrix, sorted; a line a basis, named at its end."""
    ends = []
    for basis in analysis.bases:
        peaks = -np.sort([-r["peak"] for r in analysis.rows_of("blocks", basis)])
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


def _concentration(ax: Any, analysis: Analysis) -> None:
    """Energy that the strongest columns hold."""
    ends = []
    for basis in analysis.bases:
        rows = analysis.rows_of("blocks", basis)
        y = [float(np.mean([r["columns"][f"top {k}"] for r in rows])) for k in TOP]
        ax.plot(TOP, y, "o-", color=COLOURS.get(basis, OTHER), linewidth=1.1, markersize=2.5)
        ends.append((basis, TOP[-1], y[-1], COLOURS.get(basis, OTHER)))
    name_ends(ax, ends, "right")
    ax.set_xlim(0, 33)
    ax.set_xlabel("strongest columns, % of the columns")
    ax.set_ylabel("share of the energy, mean of matrices")


def _rounding(ax: Any, analysis: Analysis) -> None:
    """KL of rounding at fixed length, plain (line) and with protected outliers (ring)."""
    ends: list[tuple[str, float, float, str]] = []
    for basis in analysis.bases:
        plain, protected = (
            {r.bits: analysis.kl[Network(basis, r)] for r in analysis.roundings if (r.protected is None) == unprotected}
            for unprotected in (True, False)
        )
        colour = COLOURS.get(basis, OTHER)
        ax.plot(list(plain), list(plain.values()), "o-", color=colour, linewidth=1.1, markersize=2.5)
        rings = {"markersize": 4.5, "fillstyle": "none", "linewidth": 0.6}
        ax.plot(list(protected), list(protected.values()), "o", color=colour, **rings)
        ends.append((basis, max(plain), plain[max(plain)], colour))
    ax.set_yscale("log")
    name_ends(ax, ends, "right")
    longest = max(x for _, x, _, _ in ends)
    ax.set_xlim(None, longest + 1.6)
    ax.set_xticks([x for x in ax.get_xticks() if x <= longest and x == round(x)])
    ax.set_xlabel("bits/weight, rounded; rings: 0.5 % kept in 16 bit")
    ax.set_ylabel("KL(original || rounded), nats/token")
