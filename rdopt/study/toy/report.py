"""What the signal experiment leaves: toy.json, toy.png (at column width), a table, and a sentence a prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float

from rdopt.runs.figures import dumps
from rdopt.study.figures import TOPS
from rdopt.study.toy.coding import CodedPoint, bits_at
from rdopt.study.toy.experiment import ENERGY_COUNTS, TOY_ARMS
from rdopt.study.toy.predictions import SeedMean, SeedRecord, mean_over_seeds, outcomes
from rdopt.study.toy.settings import HIDDEN_LAYERS, REFERENCE_DB, SAMPLES, SNR_AIMS, SNR_LEVELS, ToySettings

PROTOCOL = (
    "bits: of a file with everything that rebuilds the numbers, at an SNR in dB between the samples of the signal and "
    "the decoded representation; axes are free in pca and learned, rounded and counted in pca-stored and "
    "learned-stored; price: their bits; top: energy share of the largest percents of the numbers in steps; "
    "participation: (sum e)^2 / sum e^2 of the energies; kurtosis, peak and beyond_6_sigma: of the numbers over the "
    "root mean square of their matrix; entropy: bits a number at the steps of 20 dB. Means over the seeds with "
    "standard errors."
)
_STYLES = {  # colour and line
    "fourier": ("#0072b2", "-"),
    "mlp": ("#222222", "-"),
    "hadamard": ("#8a8a8a", "--"),
    "pca": ("#cc79a7", "-."),
    "learned": ("#d55e00", ":"),
}
_NAMES = {
    "mlp": "MLP (solid)",
    "hadamard": "Hadamard (dashed)",
    "pca": "principal axes (dash-dotted)",
    "learned": "learned axes (dotted)",
}
_DRAWN_LEVELS = np.linspace(5.0, 23.0, 37)  # dB


def figures_of(arm: Mapping[str, Any]) -> dict[str, float]:
    """The figures of an arm's record that are averaged over the seeds."""
    concentration = arm["concentration"]
    return {
        "coefficients": float(concentration["coefficients"]),
        "snr_unquantized": arm["snr_unquantized"],
        "price": arm["price"],
        **{f"bits_{level:g}dB": arm["bits"][f"{level:g}"] for level in SNR_LEVELS},
        **{f"top_{percent}": concentration["top"][percent] for percent in TOPS},
        **{k: v for k, v in concentration.items() if k not in ("coefficients", "top")},
    }


def summarize(seeds: Sequence[SeedRecord]) -> dict[str, dict[str, SeedMean]]:
    """Arm -> figure -> its mean over the seeds."""
    rows = {arm: [figures_of(seed["arms"][arm]) for seed in seeds] for arm in TOY_ARMS}
    return {arm: {k: mean_over_seeds([row[k] for row in own]) for k in own[0]} for arm, own in rows.items()}


def toy_json(settings: ToySettings, seeds: Sequence[SeedRecord]) -> dict[str, Any]:
    """The content of toy.json."""
    fixed = {
        "samples": SAMPLES,
        "layers": HIDDEN_LAYERS,
        "levels_dB": SNR_LEVELS,
        "ladder_dB": SNR_AIMS,
        "reference_dB": REFERENCE_DB,
        "energy_counts": ENERGY_COUNTS,
    }
    return {
        "settings": {**asdict(settings), **fixed},
        "protocol": PROTOCOL,
        "summary": {arm: {k: v._asdict() for k, v in own.items()} for arm, own in summarize(seeds).items()},
        "predictions": [
            {"claim": p.claim, "figure": p.figure, "predicted_sign": p.sign, **mean._asdict(), "verdict": verdict}
            for p, mean, verdict in outcomes(seeds)
        ],
        "seeds": list(seeds),
    }


def toy_table(seeds: Sequence[SeedRecord]) -> str:
    """Bits, then concentration and outliers of every arm; a count in brackets where not all seeds reach a level."""
    summary = summarize(seeds)
    bits = [(f"bits at {level:g} dB", f"bits_{level:g}dB", 0, 20) for level in SNR_LEVELS]
    tables = (
        [("numbers", "coefficients", 0, 14), ("dB uncoded", "snr_unquantized", 1, 14), *bits,
         ("of these axes", "price", 0, 15)],
        [("top 1 %", "top_1", 3, 20), ("top 10 %", "top_10", 3, 20), ("participation", "participation", 1, 20),
         ("kurtosis", "kurtosis", 2, 20), ("peak/rms", "peak", 2, 20), ("beyond 6 rms", "beyond_6_sigma", 5, 20),
         ("entropy, bits", "entropy", 2, 20)],
    )  # title, figure, digits, width
    blocks = []
    for columns in tables:
        lines = [f"{'representation':16s}" + "".join(f"{title:>{width}s}" for title, _, _, width in columns)]
        for arm, own in summary.items():
            cells = (f"{mean_cell(own[k], digits, len(seeds)):>{width}s}" for _, k, digits, width in columns)
            lines.append(f"{arm:16s}" + "".join(cells))
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def mean_cell(x: SeedMean, digits: int, seeds: int) -> str:
    """A mean with its error, which zero needs not, and its count where it lacks seeds; n/a without one."""
    if x.count == 0:
        return "n/a"
    error = f" +- {x.error:.{digits}f}" if x.error > 0 else ""
    return f"{x.mean:.{digits}f}{error}" + (f" ({x.count})" if x.count < seeds else "")


def toy_sentences(seeds: Sequence[SeedRecord]) -> list[str]:
    """Claim, verdict and figure of every prediction."""
    return [
        f"{p.claim}: {verdict} ({p.figure} {mean:+.3f} +- {error:.3f}, predicted "
        f"{'positive' if p.sign > 0 else 'negative'}, {count} seeds)."
        for p, (mean, error, count), verdict in outcomes(seeds)
    ]


def write_toy(folder: Path, settings: ToySettings, seeds: Sequence[SeedRecord]) -> None:
    """Writes toy.json and toy.png into an existing folder."""
    (folder / "toy.json").write_text(dumps(toy_json(settings, seeds)), encoding="utf-8")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig = toy_figure(seeds)
    fig.savefig(folder / "toy.png")
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


def _bits_curves(seeds: Sequence[SeedRecord], arm: str) -> Float[np.ndarray, "seeds levels"]:
    """Bits at the drawn levels; nan where a seed does not reach."""
    coded = [[CodedPoint(**p) for p in seed["arms"][arm]["points"]] for seed in seeds]
    return np.array([[bits_at(points, level) for level in _DRAWN_LEVELS] for points in coded])


def _draw_bits(ax: Any, seeds: Sequence[SeedRecord]) -> None:
    for arm, (colour, line) in _STYLES.items():
        rows = _bits_curves(seeds, arm)
        common = ~np.isnan(rows).any(axis=0)
        x, rows = _DRAWN_LEVELS[common], rows[:, common]
        if not len(x):
            continue
        ax.plot(x, np.median(rows, axis=0), line, color=colour, linewidth=1.2)
        if arm in ("fourier", "mlp"):
            ax.fill_between(x, *np.quantile(rows, (0.25, 0.75), axis=0), color=colour, alpha=0.15, linewidth=0)
    ax.set_yscale("log")
    ax.set_ylim(200, 60_000)
    ax.set_xlabel("signal-to-noise ratio of the decoded signal, dB")
    ax.set_ylabel("file, bits (price of the axes left out)")
    _name_curves(ax, (0.98, 0.23), 0.66)


def _draw_energy(ax: Any, seeds: Sequence[SeedRecord]) -> None:
    for arm, (colour, line) in _STYLES.items():
        energy = np.median([seed["arms"][arm]["energy_curve"] for seed in seeds], axis=0)
        ax.plot(ENERGY_COUNTS, energy, line, color=colour, linewidth=1.2)
    ax.set_xscale("log")
    ax.set_ylim(0, 1.02)
    ax.set_xlabel("largest coefficients or parameters, number")
    ax.set_ylabel("share of the energy (in steps)")
    _name_curves(ax, (0.20, 0.86), 0.58)


def _name_curves(ax: Any, fourier: tuple[float, float], top: float) -> None:
    """Names in the colours of the curves: Fourier's at a place, the others, which lie on one another, below `top`."""
    ax.text(*fourier, "Fourier", color=_STYLES["fourier"][0], transform=ax.transAxes, ha="right", va="bottom")
    for row, (arm, name) in enumerate(_NAMES.items()):
        y = top - 0.075 * row
        ax.text(0.98, y, name, color=_STYLES[arm][0], transform=ax.transAxes, ha="right", va="top")
