"""What a comparison of methods says: its table, and the bits that one arm saves against others at equal KL.

A cell is one file of one arm: model, arm, variant, settings, target, bpw, bpw_ideal, kl, kl_se, ppl, and the KL sum and
token count of every test sequence; or the sentence that says why the size was out of reach.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rdopt.sweep.curves import Curve, bd_rate, saved_bits, saved_bits_with_error

Cell = dict[str, Any]
Name = tuple[str, str]
PUBLISHED, TUNED, TUNED_ALLOCATED = "published", "tuned", "tuned+allocation"
_COMPARED_AT = (2.0, 2.5, 3.0, 3.5, 4.0)
OWN_ARM = "rdopt"


def row(cell: Cell) -> str:
    """One line of the table."""
    head = f"{cell['model']:15s} {cell['arm']:16s} {cell['variant']:17s} {cell['target']:4.2g}"
    if "unreachable" in cell:
        return f"{head}  {cell['unreachable']}"
    return (
        f"{head}  {cell['bpw']:.3f} bits/weight (ideal {cell['bpw_ideal']:.3f})  KL {cell['kl']:.5f} "
        f"+- {cell['kl_se']:.5f}  perplexity {cell['ppl']:.3f}"
    )


def curves(cells: Sequence[Cell], bits: str) -> dict[Name, Curve]:
    """(arm, variant) -> its curve over `bits` ("bpw" or "bpw_ideal")."""
    groups: dict[Name, list[Cell]] = {}
    for cell in cells:
        if "unreachable" not in cell:
            groups.setdefault((cell["arm"], cell["variant"]), []).append(cell)
    out = {}
    for name, group in groups.items():
        group.sort(key=lambda cell: cell[bits])
        sums = np.array([cell["kl_sums"] for cell in group])
        out[name] = Curve(np.array([cell[bits] for cell in group]), sums, np.array(group[0]["counts"]))
    return out


def best_of(
    arms: dict[Name, Curve], than: Name, allowed: Sequence[str]
) -> Name | None:
    """The peer that needs the fewest bits at equal KL, averaged over the sizes that all have in common with `than`.

    Never `than` itself; None without a common size.
    """
    others = [name for name in arms if name != than and not name[0].startswith(OWN_ARM) and name[1] in allowed]
    saved = {name: [_saved(arms[than], arms[name], at) for at in _COMPARED_AT] for name in others}
    saved = {name: gains for name, gains in saved.items() if not np.all(np.isnan(gains))}
    if not saved:
        return None
    common = ~np.any(np.isnan(list(saved.values())), axis=0)
    if not common.any():
        return None
    return max(saved, key=lambda name: float(np.mean(np.array(saved[name])[common])))


def _saved(baseline: Curve, arm: Curve, at: float) -> float:
    return saved_bits((baseline.bpw, baseline.kl()), (arm.bpw, arm.kl()), at)


def summary(cells: Sequence[Cell], floor: float, *, resamples: int = 400) -> list[Cell]:
    """Each arm of one model against the baselines that matter.

    Args:
        cells: of one model.
        floor: KL below which points do not enter a BD-rate.
        resamples: of the bootstrap behind the standard errors.

    Returns:
        rows; "saved_bits" maps a baseline and its bits/weight to bits saved at equal KL in file bytes,
        "saved_bits_ideal" with ideal code lengths on both sides; our own arms have "standard_errors" of the former.
    """
    real, ideal = curves(cells, "bpw"), curves(cells, "bpw_ideal")
    rows = []
    for name in real:
        other = best_of(real, name, (PUBLISHED, TUNED))
        baselines = {
            "best other": other,
            "best other with allocation": best_of(real, name, (PUBLISHED, TUNED, TUNED_ALLOCATED)),
            "watersic-column published": ("watersic-column", PUBLISHED),
            "rdopt-scalar": ("rdopt-scalar", "default"),
        }
        known = {label: b for label, b in baselines.items() if b is not None and b in real and b != name}
        rate = math.nan if other is None else bd_rate(real[other], real[name], floor)
        rows.append({
            "model": cells[0]["model"],
            "arm": name[0],
            "variant": name[1],
            "best_other": None if other is None else " ".join(other),
            "bd_rate_vs_best_other": None if math.isnan(rate) else rate,
            "baselines": {label: " ".join(b) for label, b in known.items()},
            "saved_bits": {label: _gains(real[b], real[name]) for label, b in known.items()},
            "saved_bits_ideal": {label: _gains(ideal[b], ideal[name]) for label, b in known.items()},
        })
        if name[0].startswith(OWN_ARM):
            rows[-1]["standard_errors"] = {
                label: _errors(real[b], real[name], gains, resamples)
                for (label, b), gains in zip(known.items(), rows[-1]["saved_bits"].values(), strict=True)
            }
    return rows


def _gains(baseline: Curve, arm: Curve) -> dict[str, float]:
    gains = {f"{at:g}": _saved(baseline, arm, at) for at in _COMPARED_AT}
    return {at: gain for at, gain in gains.items() if not math.isnan(gain)}


def _errors(baseline: Curve, arm: Curve, gains: dict[str, float], resamples: int) -> dict[str, float]:
    return {at: saved_bits_with_error(baseline, arm, float(at), resamples=resamples)[1] for at in gains}


def summary_lines(rows: Sequence[Cell]) -> Iterator[str]:
    """The gains in words: every baseline for our own arms, one line for each peer; the rest is in the rows."""
    for r in rows:
        rate = r["bd_rate_vs_best_other"]
        shown = "n/a" if rate is None else f"{rate:+.1f} %"
        yield f"{r['model']} {r['arm']} {r['variant']}: BD-rate against {r['best_other']} {shown}"
        for label, errors in r.get("standard_errors", {}).items():
            real, ideal = r["saved_bits"][label], r["saved_bits_ideal"][label]
            parts = [
                f"at {at}: {gain:+.3f} +- {errors[at]:.3f}" + (f" (ideal {ideal[at]:+.3f})" if at in ideal else "")
                for at, gain in real.items()
            ]
            yield f"    saved against {label} [{r['baselines'][label]}]  " + ("  ".join(parts) or "no common KL")
