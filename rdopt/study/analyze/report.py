"""An analysis as a page of text: figures by basis, KL of rounded networks, verdicts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from rdopt.study.analyze.figures import BINS, STEP
from rdopt.study.analyze.variants import ENDS

COLUMNS: Mapping[str, tuple[str, str | None]] = {
    "max/rms": ("peak", None),
    "kurtosis": ("kurtosis", None),
    ">6 rms": ("beyond_6_sigma", None),
    "H step": ("entropy_step", None),
    "Huffman": ("huffman_step", None),
    "H bins": ("entropy_bins", None),
    "zeros": ("zeros", None),
    "top 1 %": ("columns", "top 1"),
    "top 10 %": ("columns", "top 10"),
    "top 25 %": ("columns", "top 25"),
    "dim cols": ("columns", "entropy dimension"),
    "dim rows": ("rows", "entropy dimension"),
    "dim sigma": ("inputs", "entropy dimension"),
    "dim G": ("outputs", "entropy dimension"),
    "curv": ("curvature", None),
}


def report_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """The page."""
    rows = [r for r in result["tensors"] if r["layer"] is not None]
    bases = list(dict.fromkeys(r["basis"] for r in rows))
    yield f"{result['model']}; {result['text']}; {result['tokens']} tokens scored"
    yield ""
    yield "Figures of the blocks' matrices, means over all of them (norm gains folded: L2 is the same in every basis)"
    yield f"{'basis':12s} {'L2':>9s} {'L inf':>7s} " + " ".join(f"{name:>9s}" for name in COLUMNS)
    for basis in bases:
        own = [r for r in rows if r["basis"] == basis]
        yield _line(basis, own)
    yield from _by(rows, bases, "kind", "kind of matrix")
    yield from _by(rows, bases, "layer", "layer, its matrices together")
    yield from _by([r for r in result["tensors"] if r["layer"] is None], bases, "kind", "end of the network")
    yield from _singular(result, bases[0])
    yield from _rounding(result, bases)
    shown = _shown_length(list(rows[0]["output_error"]))
    yield from _errors_by(rows, bases, "kind", f"kind of matrix, {shown}", shown)
    yield from _errors_by(rows, bases, "layer", f"layer, {shown}", shown)
    yield from _noise(result["networks"])
    yield ""
    yield "Why the two entropies disagree:"
    yield entropy_sentence(rows)
    yield ""
    yield from verdict_lines(result["predictions"])


def _value(row: Mapping[str, Any], key: tuple[str, str | None]) -> float:
    found = row[key[0]]
    return found if key[1] is None else found[key[1]]


def _line(label: str, rows: Sequence[Mapping[str, Any]]) -> str:
    l2 = float(np.sqrt(np.sum([r["l2"] ** 2 for r in rows])))
    top = max(r["l_inf"] for r in rows)
    means = " ".join(f"{np.mean([_value(r, key) for r in rows]):9.4g}" for key in COLUMNS.values())
    return f"{label:12s} {l2:9.4f} {top:7.3f} {means}"


def _by(rows: Sequence[Mapping[str, Any]], bases: Sequence[str], key: str, what: str) -> Iterator[str]:
    """Two of the figures, a line for every value of a key of the rows."""
    yield ""
    yield f"By {what}: max/rms | share of the top 10 % of the columns"
    yield f"{key:6s} " + " ".join(f"{b:>17s}" for b in bases)
    for value in dict.fromkeys(r[key] for r in rows):
        cells = []
        for basis in bases:
            own = [r for r in rows if r[key] == value and r["basis"] == basis]
            peak, top = (np.mean([_value(r, COLUMNS[c]) for r in own]) for c in ("max/rms", "top 10 %"))
            cells.append(f"{peak:9.2f} | {top:5.3f}")
        yield f"{value!s:6s} " + " ".join(f"{c:>17s}" for c in cells)


def _singular(result: Mapping[str, Any], basis: str) -> Iterator[str]:
    """Concentration over singular directions; one basis speaks for all."""
    parts: dict[str, list[Mapping[str, float]]] = {}
    for row in result["tensors"]:
        if row["basis"] == basis:
            parts.setdefault("blocks" if row["layer"] is not None else row["kind"], []).append(row["singular"])
    yield ""
    yield "Singular directions (the same in all bases): share of the top 1/5/10/25 %; effective dimension of 1"
    for name, own in parts.items():
        shares = " ".join(f"{np.mean([s[f'top {k}'] for s in own]):.3f}" for k in (1, 5, 10, 25))
        entropy, ratio = (np.mean([s[k] for s in own]) for k in ("entropy dimension", "participation"))
        yield f"{name:6s} {shares}; {entropy:.3f} (entropy), {ratio:.3f} (participation)"


def _rounding(result: Mapping[str, Any], bases: Sequence[str]) -> Iterator[str]:
    """What rounding all blocks costs, and embedding or head alone."""
    networks = {(n["basis"], n["kind"], n["about"]): n["kl"] for n in result["networks"]}
    blocks = [r for r in result["tensors"] if r["layer"] is not None]
    ends = {kind: [r for r in result["tensors"] if r["kind"] == kind] for kind in ENDS}
    parts = [("All blocks", "rounded", blocks), *((f"Only {k}", ENDS[k], rows) for k, rows in ends.items())]
    kinds = list(blocks[0]["output_error"])
    for title, network, rows in parts:
        yield ""
        yield f"{title} rounded at a fixed length: KL in nats/token (D, its estimate; relative output error, mean)"
        yield f"{'basis':12s} " + " ".join(f"{k:>28s}" for k in kinds)
        for basis in bases:
            own = [r for r in rows if r["basis"] == basis]
            yield f"{basis:12s} " + " ".join(f"{_cost(networks, own, network, about):>28s}" for about in kinds)


def _cost(
    networks: Mapping[tuple[str, str, str], float], rows: Sequence[Mapping[str, Any]], network: str, about: str
) -> str:
    """KL of one network in the basis of some rows, D summed over them and their mean output error."""
    estimate = sum(r["kl_estimated"][about] for r in rows)
    error = np.mean([r["output_error"][about] for r in rows])
    return f"{networks[rows[0]['basis'], network, about]:9.5f} ({estimate:.5f}; {error:.1e})"


def _shown_length(kinds: Sequence[str]) -> str:
    """The length of codes that tables by kind and layer show: 4 bits where they are there."""
    return "4 bits" if "4 bits" in kinds else kinds[0]


def _errors_by(
    rows: Sequence[Mapping[str, Any]], bases: Sequence[str], key: str, what: str, about: str
) -> Iterator[str]:
    """Errors of one rounding, a line for every value of a key of the rows."""
    yield ""
    yield f"By {what}: relative output error, mean | D in nats/token, sum"
    yield f"{key:6s} " + " ".join(f"{b:>19s}" for b in bases)
    for value in dict.fromkeys(r[key] for r in rows):
        cells = []
        for basis in bases:
            own = [r for r in rows if r[key] == value and r["basis"] == basis]
            error, estimate = (np.array([r[k][about] for r in own]) for k in ("output_error", "kl_estimated"))
            cells.append(f"{error.mean():9.2e} | {estimate.sum():7.5f}")
        yield f"{value!s:6s} " + " ".join(f"{c:>19s}" for c in cells)


def _noise(networks: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    yield ""
    yield "Noise of a tenth of every matrix's norm, in original coordinates: mean KL in nats/token"
    for kind in ("entries", "inputs"):
        found: dict[str, list[float]] = {}
        for n in networks:
            if n["kind"] == kind:
                found.setdefault(n["about"], []).append(n["kl"])
        label = "on entries" if kind == "entries" else "along directions of the inputs"
        yield f"  {label}: " + ", ".join(f"{about} {np.mean(kl):.5f}" for about, kl in found.items())


def entropy_sentence(rows: Sequence[Mapping[str, Any]]) -> str:
    """Both entropies of original and Hadamard coordinates, and the step that explains their difference."""
    mean = {
        (b, k): float(np.mean([r[k] if k != "log peak" else np.log2(r["peak"]) for r in rows if r["basis"] == b]))
        for b in ("identity", "hadamard")
        for k in ("entropy_step", "entropy_bins", "log peak")
    }
    step, bins, peak = (mean["hadamard", k] - mean["identity", k] for k in ("entropy_step", "entropy_bins", "log peak"))
    return (
        f"a Hadamard rotation changes the entropy at a step of {STEP:g} rms by {step:+.3f} bits (the marginal's shape "
        f"alone) and with {BINS} bins over the range by {bins:+.3f}; the range itself changes by {peak:+.3f} octaves, "
        f"which moves the bins' width as much: {step:+.3f} - ({peak:+.3f}) = {step - peak:+.3f}."
    )


def verdict_lines(predictions: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """A line a hypothesis."""
    yield "Hypotheses, their signs written down before measuring; two standard errors decide"
    for p in predictions:
        yield (
            f"{p['verdict']:10s} {p['claim']}: {p['figure']}: {p['value']:+.4g} +- {p['error']:.2g} "
            f"(predicted {p['predicted']})"
        )
