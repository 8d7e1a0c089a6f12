"""What a sweep leaves: curve.json (one shape everywhere), curve.csv, curve.png, and the tables."""

import csv
import math
from collections.abc import Sequence
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from rdopt.config.schema import Config
from rdopt.sweep.arms import ARMS
from rdopt.sweep.curves import Curve, bd_rate, pareto, saved_bits_with_error
from rdopt.sweep.points import Point

# What curve.json leaves to curve.csv and to the points' own files; every other field of a point is in its results.
_UNLISTED = {
    *("arm", "bpw_relaxed", "distortion", "train_seconds", "encode_seconds", "decode_seconds", "kl_sums", "counts")
}
RESULTS = tuple(f.name for f in fields(Point) if f.name not in _UNLISTED)
RATES = (1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 5.0, 6.0)


def by_arm(points: Sequence[Point]) -> dict[str, list[Point]]:
    """The points of each arm, sorted by bits/weight."""
    names = dict.fromkeys(p.arm for p in points)
    return {name: sorted((p for p in points if p.arm == name), key=lambda p: p.bpw) for name in names}


def curve_json(points: Sequence[Point], config: Config, text: str) -> dict[str, Any]:
    """The content of curve.json: parallel lists per arm, sorted by bits/weight."""
    arms = [
        {
            "name": name,
            "description": ARMS[name].description,
            "results": {key: [getattr(p, key) for p in group] for key in RESULTS},
        }
        for name, group in by_arm(points).items()
    ]
    evaluate = config.evaluate
    protocol = (
        f"KL(original || decoded) in nats/token and perplexity on the test part of the text, context "
        f"{evaluate.context}, stride {evaluate.stride}, {int(points[0].counts.sum())} scored tokens; "
        "bpw: file bits that rebuild the coded matrices per coded weight; bpw_all: file bits per parameter, "
        f"embedding and head {'coded too' if config.encode.embeddings == 'coded' else 'in 16 bit'}"
    )
    return {"model": config.model, "text": text, "protocol": protocol, "arms": arms}


def curve_csv(points: Sequence[Point]) -> str:
    """Every point's scalars as CSV with a header."""
    out = StringIO()
    writer = csv.DictWriter(out, list(points[0].scalars()), lineterminator="\n")
    writer.writeheader()
    writer.writerows(p.scalars() for group in by_arm(points).values() for p in group)
    return out.getvalue()


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


def gains(points: Sequence[Point], noise_floor: float) -> list[dict[str, Any]]:
    """Each arm against each baseline (identity, hadamard): BD-rate in percent and bits saved at equal KL.

    "saved" maps bits/weight of the baseline to [bits saved, standard error].
    """
    curves = {
        name: Curve(np.array([p.bpw for p in group]), np.stack([p.kl_sums for p in group]), group[0].counts)
        for name, group in by_arm(points).items()
    }
    rows = []
    for baseline in ("identity", "hadamard"):
        for name, curve in curves.items():
            if baseline not in curves or name in (baseline, "identity"):
                continue
            saved = {rate: saved_bits_with_error(curves[baseline], curve, rate) for rate in RATES}
            possible = {rate: list(pair) for rate, pair in saved.items() if not math.isnan(pair[0])}
            percent = bd_rate(curves[baseline], curve, noise_floor)
            rows.append({"arm": name, "against": baseline, "bd_rate": percent, "saved": possible})
    return rows


def point_table(points: Sequence[Point]) -> str:
    """The points as text: * marks the Pareto front over all arms."""
    front = pareto(np.array([p.bpw for p in points]), np.array([p.kl for p in points]))
    on_front = {id(p) for p, keep in zip(points, front, strict=True) if keep}
    head = f"{'arm':17s} {'lambda':>8s} {'bpw':>8s} {'ideal':>8s} {'relaxed':>8s} {'bpw_all':>8s}"
    lines = [head + f" {'KL':>9s} {'D':>9s} {'ppl':>8s} {'bytes':>9s} {'s':>5s}"]
    for group in by_arm(points).values():
        for p in group:
            relaxed, star = "" if math.isnan(p.bpw_relaxed) else f"{p.bpw_relaxed:.4f}", " *" * (id(p) in on_front)
            lines.append(
                f"{p.arm:17s} {p.lam:8.4g} {p.bpw:8.4f} {p.bpw_estimated:8.4f} {relaxed:>8s} {p.bpw_all:8.4f}"
                f" {p.kl:9.5f} {p.distortion:9.5f} {p.ppl:8.3f} {p.bytes:9d} {p.seconds:5.0f}{star}"
            )
    return "\n".join(lines)


def gain_table(rows: Sequence[dict[str, Any]]) -> str:
    """The gains as text, "n/a" where the protocol does not allow a figure."""
    lines = [f"{'arm':17s} {'against':10s} {'BD-rate':>9s}  bits/weight saved at equal KL (+- standard error)"]
    for row in rows:
        rate = "n/a" if math.isnan(row["bd_rate"]) else f"{row['bd_rate']:+.1f} %"
        saved = "  ".join(f"at {r:g}: {g:+.3f} +- {e:.3f}" for r, (g, e) in row["saved"].items())
        lines.append(f"{row['arm']:17s} {row['against']:10s} {rate:>9s}  {saved or 'n/a'}")
    return "\n".join(lines)
