"""curve.png: KL against bits/weight, one line per arm, named at its end."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

from rdopt.sweep.arms import ARMS
from rdopt.sweep.points import Point
from rdopt.sweep.report import by_arm


def plot_curves(points: Sequence[Point], path: Path, title: str, noise_floor: float) -> None:
    """Draws the curves of all arms; the noise floor, KL of the model's own bfloat16 pass, where it lies among them."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, ax = plt.subplots(figsize=(6.4, 4.4), dpi=160, layout="constrained")
    for name, group in by_arm(points).items():
        colour, marker, line = ARMS[name].line
        x, y = [p.bpw for p in group], [p.kl for p in group]
        ax.plot(x, y, line, color=colour, marker=marker, markersize=4, linewidth=1.4, label=name)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if noise_floor > low:
        ax.axhline(noise_floor, color="#bbbbbb", linewidth=0.8, linestyle=":")
        ax.annotate("bf16 noise floor", (ax.get_xlim()[1], noise_floor), ha="right", va="bottom", fontsize=7)
    ax.set_ylim(low, high)
    ax.set_xlabel("bits/weight in the file (coded matrices, everything that rebuilds them)")
    ax.set_ylabel("KL(original || decoded), nats/token")
    ax.set_title(title, fontsize=9)
    ax.grid(True, which="major", color="#e6e6e6", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8, handlelength=2.6)
    fig.savefig(path)
    plt.close(fig)
