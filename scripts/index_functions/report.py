"""The figures of `index_structure` as a text table and as a picture at column width."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.lines import Line2D

_FAMILIES = {
    "low rank": ("#d55e00", "low rank"),
    "channel index, channels sorted": ("#0072b2", "channel index, sorted"),
    "layer index, hidden channels matched": ("#222222", "layer index, matched"),
}
_SYSTEMS = {
    "identity": ("#222222", "s"), "hadamard": ("#8a8a8a", "D"), "pca": ("#56b4e9", "v"), "joint": ("#0072b2", "o"),
    "dct": ("#cc79a7", "^"), "fourier": ("#009e73", "P"), "random": ("#b0b0b0", "X"), "pca-act": ("#e69f00", "<"),
}  # fmt: skip
_LINES: dict[str, Any] = {"identity": "--", "joint": "-"}
_SIZE = (3.4, 5.4)


def index_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """A block of lines a coordinate system, then every prediction with its verdict."""
    settings = result["settings"]
    yield (
        f"share of energy that f explains, less that of Gaussian matrices with the same rows' and columns' variances "
        f"({settings['seeds']} seeds), +- standard error over units, at shares of the numbers"
    )
    yield (
        f"bits/weight of f + r less r alone, at the error of {settings['bits']:g} bits/weight in the original "
        "coordinates, +- standard error; best size of every unit"
    )
    for basis, system in result["systems"].items():
        alone = system["alone"]
        yield (
            f"{basis}: r alone {alone['mean']:.4f} +- {alone['error']:.4f} bits/weight; "
            f"with one spread a matrix {alone['flat']:.4f}"
        )
        for name, family in system["families"].items():
            best = family["best"]
            yield (
                f"  {name:38s} f + r {best['difference']:+.4f} +- {best['error']:.4f} bits/weight with "
                f"{100 * best['numbers']:.1f} % of the numbers"
            )
            yield "    " + "  ".join(_size(s) for s in family["sizes"] if s["numbers"])
    for p in result["predictions"]:
        yield f"{p['verdict']:11s} {p['claim']}: {p['mean']:+.4f} +- {p['error']:.4f}"


def _size(s: Mapping[str, Any]) -> str:
    return f"{100 * s['numbers']:.2g} %: {s['explained']:.3f} ({s['excess']:+.4f} +- {s['error']:.4f})"


def plot_index(result: Mapping[str, Any], path: Path) -> None:
    """Writes a PNG: explained energy beyond chance against numbers spent, and bits of f + r less those of r.

    Args:
        result: what `index_structure` returned.
        path: to write.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    style: Any = {"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}
    with plt.rc_context(style):
        fig, (top, bottom) = plt.subplots(2, 1, figsize=_SIZE, dpi=200, layout="constrained")
        _energy(top, result["systems"])
        _bits(bottom, result["systems"])
        for ax in (top, bottom):
            ax.grid(True, color="#ececec", linewidth=0.5)
            ax.set_axisbelow(True)
        fig.savefig(path, format="png")
        plt.close(fig)


def _energy(ax: Any, systems: Mapping[str, Any]) -> None:
    """Excess over chance of three families, in original (dashed) and aligned (solid) coordinates."""
    ax.axhline(0, color="#8a8a8a", linewidth=0.6)
    for basis, line in _LINES.items():
        for name, (colour, _) in _FAMILIES.items() if basis in systems else ():
            sizes = [s for s in systems[basis]["families"][name]["sizes"] if s["numbers"] > 0]
            x, y, error = ([s[key] for s in sizes] for key in ("numbers", "excess", "error"))
            x, y, error = ([100 * v for v in part] for part in (x, y, error))
            ax.errorbar(x, y, error, fmt=line, color=colour, linewidth=1.1, elinewidth=0.6, marker=".", markersize=3)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_formatter("")
    ax.set_xlabel("numbers in f, % of the weights")
    ax.set_ylabel("energy explained beyond chance, %")
    handles = [Line2D([], [], color=colour, label=label) for colour, label in _FAMILIES.values()]
    names = {"identity": "original coordinates", "joint": "joint axes"}
    handles += [
        Line2D([], [], color="#8a8a8a", linestyle=line, label=names[basis])
        for basis, line in _LINES.items()
    ]
    ax.legend(handles=handles, frameon=False, fontsize=6, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=2)


def _bits(ax: Any, systems: Mapping[str, Any]) -> None:
    """A row a family, a mark a coordinate system, two standard errors."""
    drawn = [basis for basis in _SYSTEMS if basis in systems]
    families = list(systems[drawn[0]]["families"])
    for k, basis in enumerate(drawn):
        colour, marker = _SYSTEMS[basis]
        best = [systems[basis]["families"][name]["best"] for name in families]
        places = [row + 0.14 * (k - (len(drawn) - 1) / 2) for row in range(len(families))]
        ax.errorbar(
            [b["difference"] for b in best], places, xerr=[2 * b["error"] for b in best], fmt=marker, color=colour,
            markersize=3, elinewidth=0.8, label=basis,
        )  # fmt: skip
    ax.axvline(0, color="#8a8a8a", linewidth=0.6)
    ax.set_yticks(range(len(families)), [name.replace(", ", ",\n").replace("channels ", "") for name in families])
    ax.invert_yaxis()
    ax.set_xlabel("f + r less r alone, bits/weight\n(± 2 standard errors; below 0: f saves bits)")
    ax.legend(
        frameon=False, fontsize=6, loc="lower center", bbox_to_anchor=(0.4, 1), ncols=min(len(drawn), 5),
        handletextpad=0.1, columnspacing=0.8,
    )  # fmt: skip
