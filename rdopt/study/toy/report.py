"""What the signal experiment leaves: toy.json, toy.png (at column width), a table, and a sentence a prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float

from rdopt.runs.figures import dumps
from rdopt.study.toy.coding import CodedPoint, bits_at
from rdopt.study.toy.experiment import ENERGY_COUNTS, TOY_ARMS, settings_json
from rdopt.study.toy.predictions import SeedMean, SeedRecord, mean_over_seeds, outcomes
from rdopt.study.toy.settings import SNR_LEVELS, ToySettings

PROTOCOL = (
    "bits: of a file with everything that rebuilds the numbers, at an SNR in dB between the samples of the signal and "
    "the decoded representation; axes are free in pca and learned, rounded and counted in pca-stored and "
    "learned-stored; price: their bits; top: energy share of the largest percents of the numbers in steps; "
    "participation: (sum e)^2 / sum e^2 of the energies; kurtosis, peak and beyond_6_sigma: of the numbers over the "
    "root mean square of their matrix; entropy: bits a number at the steps of 20 dB. Means over the seeds with "
    "standard errors."
)
_FIGURES = {
    "coefficients": lambda arm: float(arm["concentration"]["coefficients"]),
    "snr_unquantized": lambda arm: arm["snr_unquantized"],
    "price": lambda arm: arm["price"],
    **{f"bits_{level:g}dB": lambda arm, key=f"{level:g}": arm["bits"][key] for level in SNR_LEVELS},
    **{f"top_{part}": lambda arm, key=part: arm["concentration"]["top"][key] for part in (1, 5, 10, 25)},
    **{
        name: lambda arm, key=name: arm["concentration"][key]
        for name in ("participation", "entropy_dimension", "kurtosis", "peak", "beyond_6_sigma", "entropy")
    },
}
_COLOURS = {"fourier": "#0072b2", "mlp": "#222222", "hadamard": "#8a8a8a", "pca": "#cc79a7", "learned": "#d55e00"}
_LINES = {"fourier": "-", "mlp": "-", "hadamard": "--", "pca": "-.", "learned": ":"}
_NAMES = {
    "mlp": "MLP (solid)",
    "hadamard": "Hadamard (dashed)",
    "pca": "principal axes (dash-dotted)",
    "learned": "learned axes (dotted)",
}
_DRAWN_LEVELS = np.linspace(5.0, 23.0, 37)  # dB


def summarize(seeds: Sequence[SeedRecord]) -> dict[str, dict[str, SeedMean]]:
    """Arm -> figure -> its mean over the seeds."""
    return {
        arm: {
            name: mean_over_seeds([figure(seed["arms"][arm]) for seed in seeds]) for name, figure in _FIGURES.items()
        }
        for arm in TOY_ARMS
    }


def toy_json(settings: ToySettings, seeds: Sequence[SeedRecord]) -> dict[str, Any]:
    """The content of toy.json."""
    tested = [
        {
            "claim": o.prediction.claim,
            "figure": o.prediction.figure,
            "predicted_sign": o.prediction.sign,
            **o.mean._asdict(),
            "verdict": o.verdict,
        }
        for o in outcomes(seeds)
    ]
    means = {arm: {k: v._asdict() for k, v in own.items()} for arm, own in summarize(seeds).items()}
    return {
        "settings": settings_json(settings),
        "protocol": PROTOCOL,
        "summary": means,
        "predictions": tested,
        "seeds": list(seeds),
    }


def toy_table(seeds: Sequence[SeedRecord]) -> str:
    """Bits, then concentration and outliers of every arm; a count in brackets where not all seeds reach a level."""
    summary, total = summarize(seeds), len(seeds)
    levels = "".join(f"{f'bits at {level:g} dB':>20s}" for level in SNR_LEVELS)
    lines = [f"{'representation':16s}{'numbers':>14s}{'dB uncoded':>14s}{levels}{'of these axes':>15s}"]
    for arm, own in summary.items():
        bits = "".join(f"{mean_cell(own[f'bits_{level:g}dB'], 0, total):>20s}" for level in SNR_LEVELS)
        numbers, level = mean_cell(own["coefficients"], 0, total), mean_cell(own["snr_unquantized"], 1, total)
        lines.append(f"{arm:16s}{numbers:>14s}{level:>14s}{bits}{mean_cell(own['price'], 0, total):>15s}")
    titles = ("top 1 %", "top 10 %", "participation", "kurtosis", "peak/rms", "beyond 6 rms", "entropy, bits")
    lines += ["", f"{'representation':16s}" + "".join(f"{title:>20s}" for title in titles)]
    for arm, own in summary.items():
        places = {"top_1": 3, "top_10": 3, "participation": 1, "kurtosis": 2, "peak": 2, "beyond_6_sigma": 5}
        cells = [mean_cell(own[name], digits, total) for name, digits in (places | {"entropy": 2}).items()]
        lines.append(f"{arm:16s}" + "".join(f"{cell:>20s}" for cell in cells))
    return "\n".join(lines)


def mean_cell(x: SeedMean, digits: int, seeds: int) -> str:
    """A mean with its error, which zero needs not, and its count where it lacks seeds; n/a without one."""
    if x.count == 0:
        return "n/a"
    error = f" +- {x.error:.{digits}f}" if x.error > 0 else ""
    return f"{x.mean:.{digits}f}{error}" + (f" ({x.count})" if x.count < seeds else "")


def toy_sentences(seeds: Sequence[SeedRecord]) -> list[str]:
    """One sentence a prediction."""
    return [o.sentence for o in outcomes(seeds)]


def write_toy(folder: Path, settings: ToySettings, seeds: Sequence[SeedRecord]) -> None:
    """Writes toy.json and toy.png into a folder.

    Args:
        folder: exists.
        settings: of the run.
        seeds: its records.
    """
    (folder / "toy.json").write_text(dumps(toy_json(settings, seeds)), encoding="utf-8")
    plot_toy(seeds, folder / "toy.png")


def plot_toy(seeds: Sequence[SeedRecord], path: Path) -> None:
    """Draws both panels.

    Args:
        seeds: records of `toy_experiment`.
        path: the PNG to write.
    """
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = toy_figure(seeds)
    fig.savefig(path)
    plt.close(fig)


def toy_figure(seeds: Sequence[SeedRecord]) -> Any:
    """The figure: medians over the seeds, the range between the quartiles shaded for Fourier and the plain MLP."""
    import matplotlib.pyplot as plt

    with plt.rc_context({"font.size": 7, "axes.spines.top": False, "axes.spines.right": False}):
        fig, (above, below) = plt.subplots(2, 1, figsize=(3.4, 4.6), dpi=200, layout="constrained")
        _draw_bits(above, seeds)
        _draw_energy(below, seeds)
        for ax in (above, below):
            ax.grid(True, color="#ececec", linewidth=0.5)
            ax.set_axisbelow(True)
    return fig


def bits_curves(seeds: Sequence[SeedRecord], arm: str) -> Float[np.ndarray, "seeds levels"]:
    """Bits at the drawn levels; nan where a seed does not reach."""
    rows = []
    for seed in seeds:
        points = [CodedPoint(**p) for p in seed["arms"][arm]["points"]]
        rows.append([bits_at(points, level) for level in _DRAWN_LEVELS])
    return np.array(rows)


def _draw_bits(ax: Any, seeds: Sequence[SeedRecord]) -> None:
    for arm, colour in _COLOURS.items():
        rows = bits_curves(seeds, arm)
        common = ~np.isnan(rows).any(axis=0)
        x, rows = _DRAWN_LEVELS[common], rows[:, common]
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


def _draw_energy(ax: Any, seeds: Sequence[SeedRecord]) -> None:
    for arm, colour in _COLOURS.items():
        energy = np.median([seed["arms"][arm]["energy_curve"] for seed in seeds], axis=0)
        ax.plot(ENERGY_COUNTS, energy, _LINES[arm], color=colour, linewidth=1.2)
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
