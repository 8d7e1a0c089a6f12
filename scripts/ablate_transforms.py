"""Prints what every kind of transform is worth: the same model and encoder, the same slopes, other coordinates.

Bits/weight saved at equal KL on text never calibrated on against original and Hadamard coordinates and the best fixed
basis, BD-rate, the bits of stored transforms, training time, and how well the relaxed objective ranks what the hard
encoder finds. Finished cells lie in --cells.

    python scripts/ablate_transforms.py --cells cells --json transforms.json --plots plots \\
        --model ref-llama:docs_valid.txt:blank2

scripts/results/transforms.json comes from this for ref-llama and from `--arms telling` for its other models; its rows
of the two parametrisations of rotations from `--arms parametrisations`.
"""

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from peers.benchmark import Benchmark
from peers.report import OWN_ARM, Cell, curves
from peers.table import ArmVariant, add_arguments, run_table
from scipy.stats import spearmanr
from transform_arms.arms import FIXED_ARMS, LEARNED_ARMS, PARAMETRISATION_ARMS, TELLING_ARMS, TransformArms
from transform_arms.plots import plot_transforms

from rdopt.config.schema import EncodeConfig
from rdopt.sweep.curves import bd_rate, saved_bits_with_error

_LAMS = (5.0, 6.0, 8.0, 24.0, 70.0, 200.0, 600.0)
_COMPARED_AT = (1.5, 2.0, 3.0, 4.0)
_BEYOND = (0.0, 0.002, 0.005)  # bits/weight between relaxed costs whose order is counted
ARM_LISTS = {"telling": TELLING_ARMS, "parametrisations": PARAMETRISATION_ARMS}
ArmCosts = Mapping[tuple[str, float], float]  # (arm, slope) -> J


def chosen(which: str) -> list[str]:
    """The arms that are measured."""
    return list(ARM_LISTS.get(which) or TransformArms.names())


def arm_variants(benchmark: Benchmark, which: str, encode: EncodeConfig, steps: int) -> Iterator[ArmVariant]:
    """Every curve of a model; a cell's target is its slope."""
    arms = TransformArms(benchmark, encode, steps)
    for name in chosen(which):
        settings = {"arm": name, "steps": steps, "states": encode.states, "drift": encode.drift}
        yield ArmVariant(OWN_ARM, name, settings, partial(arms.code, name))


def summary(cells: Sequence[Cell], floor: float) -> list[Cell]:
    """What each arm saves in a model, and how well relaxed costs predict hard ones.

    Args:
        cells: of the model.
        floor: KL below which points do not enter a BD-rate.
    """
    found = {variant: curve for (_, variant), curve in curves(cells, "bpw").items()}
    by_arm = {name: [c for c in cells if c["variant"] == name] for name in found}
    rows = []
    for name, own in by_arm.items():
        row: Cell = {"model": cells[0]["model"], "arm": name, "against": {}}
        for baseline in (x for x in FIXED_ARMS if x in found and x != name):
            rate = bd_rate(found[baseline], found[name], floor)
            saved = {at: saved_bits_with_error(found[baseline], found[name], at) for at in _COMPARED_AT}
            row["against"][baseline] = {
                "bd_rate": None if math.isnan(rate) else rate,
                "saved": {f"{at:g}": list(x) for at, x in saved.items() if not math.isnan(x[0])},
            }
        row["train_seconds"] = float(np.mean([c["train_seconds"] for c in own]))
        row["transform_bits"] = [c["transform_bits"] for c in own]
        row["stored"] = [c["stored"] for c in own if "stored" in c]
        rows.append(row)
    return [*rows, {"model": cells[0]["model"], "prediction": prediction(cells)}]


def prediction(cells: Sequence[Cell]) -> dict[str, Any]:
    """Spearman's rank correlation of relaxed and hard J among the trained arms of one slope, and the error of R.

    Costs of one slope are compared with the costs of that slope; ranks are pooled over the slopes behind their means.
    """
    known = [c for c in cells if c["variant"] in LEARNED_ARMS and c.get("relaxed")]
    relaxed, hard = (
        {(c["variant"], c["target"]): c[kind]["rate"] + c["target"] * c[kind]["distortion"] for c in known}
        for kind in ("relaxed", "hard")
    )
    hard = {key: value - (hard_side(c)) for (key, value), c in zip(hard.items(), known, strict=True)}
    lams = sorted({lam for _, lam in relaxed})
    each, pooled = {}, ([], [])
    for lam in lams:
        keys = [key for key in relaxed if key[1] == lam]
        x, y = np.array([relaxed[k] for k in keys]), np.array([hard[k] for k in keys])
        if len(keys) > 2:
            each[f"{lam:g}"] = rank_correlation(x, y)
        pooled[0].extend(x - x.mean())
        pooled[1].extend(y - y.mean())
    errors = [c["relaxed"]["rate"] / c["hard"]["codes"] - 1 for c in known]
    return {
        "configurations": len(known),
        "rank_correlation": rank_correlation(*pooled) if len(known) > 2 else None,
        "by_slope": each,
        "ordered": {f"{beyond:g}": ordered_pairs(relaxed, hard, beyond) for beyond in _BEYOND},
        "rate_error_mean": float(np.mean(errors)) if errors else None,
        "rate_error_worst": float(np.max(np.abs(errors))) if errors else None,
    }


def rank_correlation(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> float:
    """Spearman's."""
    found: Any = spearmanr(x, y)  # its type has no attributes to a type checker
    return float(found.statistic)


def ordered_pairs(relaxed: ArmCosts, hard: ArmCosts, beyond: float) -> tuple[int, int]:
    """Pairs of arms of one slope whose relaxed costs differ by more than some bits/weight: (in hard order, all)."""
    pairs = [(a, b) for a, b in combinations(relaxed, 2) if a[1] == b[1] and abs(relaxed[a] - relaxed[b]) > beyond]
    return sum((relaxed[a] - relaxed[b]) * (hard[a] - hard[b]) > 0 for a, b in pairs), len(pairs)


def hard_side(cell: Cell) -> float:
    """Bits/weight of a trial encoding beside its codes: tables and scales, which the relaxed rate leaves out."""
    return cell["hard"]["rate"] - cell["hard"]["codes"]


def summary_lines(rows: Sequence[Cell]) -> Iterator[str]:
    """The table."""
    for r in rows:
        if "prediction" in r:
            p = r["prediction"]
            yield (
                f"{r['model']}: relaxed against hard J over {p['configurations']} trained configurations: rank "
                f"correlation {p['rank_correlation']}, by slope {p['by_slope']}, pairs in order (of all) "
                f"by their difference {p['ordered']}; R {p['rate_error_mean']} on average, "
                f"{p['rate_error_worst']} at worst"
            )
            continue
        for baseline, found in r["against"].items():
            rate = "n/a" if found["bd_rate"] is None else f"{found['bd_rate']:+.1f} %"
            saved = "  ".join(f"at {at}: {bits:+.3f} +- {error:.3f}" for at, (bits, error) in found["saved"].items())
            yield f"{r['model']:15s} {r['arm']:40s} against {baseline:9s} BD-rate {rate:>8s}  saved  {saved or 'n/a'}"
        bits = " ".join(f"{x:.4f}" for x in r["transform_bits"])
        yield f"{'':15s} {r['arm']:40s} training {r['train_seconds']:.0f} s, transforms {bits} bits/weight"
        for choice in r["stored"]:
            yield (
                f"{'':15s} {'':40s} stored: {choice['stored']} sites kept, J {choice['saved']:+.4f}; all of them: gain "
                f"{choice['gain']:.4f} before, price {choice['price']:.4f} bits/weight"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing, prints the table, writes JSON and plots on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    parser.set_defaults(targets=list(_LAMS))
    parser.add_argument(
        "--arms", choices=("all", *ARM_LISTS), default="all",
        help="all, the most telling ones, or rotations learned by Cayley against butterflies of Givens angles",
    )
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps of every training")
    parser.add_argument("--states", type=int, default=8, help="states of the trellis")
    parser.add_argument("--plots", type=Path, default=None, help="folder of the plots")
    args = parser.parse_args(argv)
    encode = EncodeConfig(states=args.states)

    def summarize(cells: Sequence[Cell], floor: float) -> list[Cell]:
        if args.plots is not None:
            plot_transforms(cells, args.plots)
        return summary(cells, floor)

    def variants(benchmark: Benchmark) -> Iterator[ArmVariant]:
        return arm_variants(benchmark, args.arms, encode, args.steps)

    return run_table(args, chosen(args.arms), variants, summarize, summary_lines)


if __name__ == "__main__":
    raise SystemExit(main())
