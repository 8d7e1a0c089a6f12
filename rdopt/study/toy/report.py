"""What the signal experiment leaves: toy.json, toy.png, a table, and a sentence a prediction."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdopt.runs.figures import dumps
from rdopt.study.toy.curve import Mean, mean_of
from rdopt.study.toy.experiment import ARMS, ENERGY_COUNTS, settings_json
from rdopt.study.toy.plot import plot_toy
from rdopt.study.toy.predictions import Seed, outcomes
from rdopt.study.toy.settings import LEVELS, ToySettings

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
    **{f"bits_{level:g}dB": lambda arm, key=f"{level:g}": arm["bits"][key] for level in LEVELS},
    **{f"top_{part}": lambda arm, key=part: arm["concentration"]["top"][key] for part in (1, 5, 10, 25)},
    **{
        name: lambda arm, key=name: arm["concentration"][key]
        for name in ("participation", "entropy_dimension", "kurtosis", "peak", "beyond_6_sigma", "entropy")
    },
}
Summary = dict[str, dict[str, Mean]]


def summarize(seeds: Sequence[Seed]) -> Summary:
    """Arm -> figure -> its mean over the seeds."""
    return {
        arm: {name: mean_of([of(seed["arms"][arm]) for seed in seeds]) for name, of in _FIGURES.items()} for arm in ARMS
    }


def toy_json(settings: ToySettings, seeds: Sequence[Seed]) -> dict[str, Any]:
    """The content of toy.json."""
    tested = [
        {
            "claim": o.prediction.claim,
            "figure": o.prediction.figure,
            "predicted_sign": o.prediction.sign,
            **o.found._asdict(),
            "verdict": o.verdict,
        }
        for o in outcomes(seeds)
    ]
    means = {arm: {k: v._asdict() for k, v in found.items()} for arm, found in summarize(seeds).items()}
    return {
        "settings": settings_json(settings),
        "protocol": PROTOCOL,
        "summary": means,
        "predictions": tested,
        "seeds": list(seeds),
    }


def toy_table(seeds: Sequence[Seed]) -> str:
    """Bits, then concentration and outliers of every arm; a count in brackets where not all seeds reach a level."""
    summary, total = summarize(seeds), len(seeds)
    levels = "".join(f"{f'bits at {level:g} dB':>20s}" for level in LEVELS)
    lines = [f"{'representation':16s}{'numbers':>14s}{'dB uncoded':>14s}{levels}{'of these axes':>15s}"]
    for arm, found in summary.items():
        bits = "".join(f"{shown(found[f'bits_{level:g}dB'], 0, total):>20s}" for level in LEVELS)
        head = f"{arm:16s}{shown(found['coefficients'], 0, total):>14s}{shown(found['snr_unquantized'], 1, total):>14s}"
        lines.append(f"{head}{bits}{shown(found['price'], 0, total):>15s}")
    titles = ("top 1 %", "top 10 %", "participation", "kurtosis", "peak/rms", "beyond 6 rms", "entropy, bits")
    lines += ["", f"{'representation':16s}" + "".join(f"{title:>20s}" for title in titles)]
    for arm, found in summary.items():
        places = {"top_1": 3, "top_10": 3, "participation": 1, "kurtosis": 2, "peak": 2, "beyond_6_sigma": 5}
        cells = [shown(found[name], digits, total) for name, digits in (places | {"entropy": 2}).items()]
        lines.append(f"{arm:16s}" + "".join(f"{cell:>20s}" for cell in cells))
    return "\n".join(lines)


def shown(x: Mean, digits: int, seeds: int) -> str:
    """A mean with its error, which zero needs not, and its count where it lacks seeds; n/a without one."""
    if x.count == 0:
        return "n/a"
    error = f" +- {x.error:.{digits}f}" if x.error > 0 else ""
    return f"{x.mean:.{digits}f}{error}" + (f" ({x.count})" if x.count < seeds else "")


def toy_sentences(seeds: Sequence[Seed]) -> list[str]:
    """One sentence a prediction."""
    return [o.sentence for o in outcomes(seeds)]


def write_toy(folder: Path, settings: ToySettings, seeds: Sequence[Seed]) -> None:
    """Writes toy.json and toy.png into a folder.

    Args:
        folder: exists.
        settings: of the run.
        seeds: its records.
    """
    (folder / "toy.json").write_text(dumps(toy_json(settings, seeds)), encoding="utf-8")
    plot_toy(seeds, ENERGY_COUNTS, folder / "toy.png")
