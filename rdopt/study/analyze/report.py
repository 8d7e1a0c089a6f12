"""An analysis as a page of text: figures by basis, KL of rounded networks, verdicts."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal

import numpy as np

from rdopt.study.analyze.analysis import Analysis, Row
from rdopt.study.analyze.figures import BINS, STEP, TOP
from rdopt.study.analyze.networks import EntryNoise, InputNoise, Network, RoundedPart, Rounding
from rdopt.study.predictions import Judgement

# Title of a column -> its figure of a row.
COLUMNS: Mapping[str, Callable[[Row], float]] = {
    "max/rms": lambda row: row["peak"],
    "kurtosis": lambda row: row["kurtosis"],
    ">6 rms": lambda row: row["beyond_6_sigma"],
    "H step": lambda row: row["entropy_step"],
    "Huffman": lambda row: row["huffman_step"],
    "H bins": lambda row: row["entropy_bins"],
    "zeros": lambda row: row["zeros"],
    "top 1 %": lambda row: row["columns"]["top 1"],
    "top 10 %": lambda row: row["columns"]["top 10"],
    "top 25 %": lambda row: row["columns"]["top 25"],
    "dim cols": lambda row: row["columns"]["entropy dimension"],
    "dim rows": lambda row: row["rows"]["entropy dimension"],
    "dim sigma": lambda row: row["inputs"]["entropy dimension"],
    "dim G": lambda row: row["outputs"]["entropy dimension"],
    "curv": lambda row: row["curvature"],
}
RowKey = Literal["kind", "layer"]  # what rows are grouped by


def report_lines(analysis: Analysis) -> Iterator[str]:
    """The page."""
    rows, bases = analysis.block_rows, analysis.bases
    yield f"{analysis.model}; {analysis.text}; {analysis.tokens} tokens scored"
    yield ""
    yield "Figures of the blocks' matrices, means over all of them (norm gains folded: L2 is the same in every basis)"
    yield f"{'basis':12s} {'L2':>9s} {'L inf':>7s} " + " ".join(f"{name:>9s}" for name in COLUMNS)
    for basis in bases:
        yield _means(basis, [r for r in rows if r["basis"] == basis])
    yield from _peaks_by(rows, bases, "kind", "kind of matrix")
    yield from _peaks_by(rows, bases, "layer", "layer, its matrices together")
    yield from _peaks_by(analysis.end_rows, bases, "kind", "end of the network")
    yield from _singular(analysis)
    yield from _rounding(analysis)
    shown = next((r for r in analysis.roundings if r.label == "4 bits"), analysis.roundings[0])
    yield from _errors_by(rows, bases, "kind", f"kind of matrix, {shown.label}", shown)
    yield from _errors_by(rows, bases, "layer", f"layer, {shown.label}", shown)
    yield from _noise(analysis.kl)
    yield ""
    yield "Why the two entropies disagree:"
    yield entropy_sentence(rows)
    yield ""
    yield from verdict_lines(analysis.judgements)


def _means(label: str, rows: Sequence[Row]) -> str:
    """The mean of every column over some rows."""
    l2 = float(np.sqrt(np.sum([r["l2"] ** 2 for r in rows])))
    top = max(r["l_inf"] for r in rows)
    means = " ".join(f"{np.mean([figure(r) for r in rows]):9.4g}" for figure in COLUMNS.values())
    return f"{label:12s} {l2:9.4f} {top:7.3f} {means}"


def _peaks_by(rows: Sequence[Row], bases: Sequence[str], key: RowKey, what: str) -> Iterator[str]:
    """Two of the figures, a line for every value of a key of the rows."""
    yield ""
    yield f"By {what}: max/rms | share of the top 10 % of the columns"
    yield f"{key:6s} " + " ".join(f"{b:>17s}" for b in bases)
    for value in dict.fromkeys(r[key] for r in rows):
        cells = []
        for basis in bases:
            own = [r for r in rows if r[key] == value and r["basis"] == basis]
            peak, top = (np.mean([COLUMNS[title](r) for r in own]) for title in ("max/rms", "top 10 %"))
            cells.append(f"{peak:9.2f} | {top:5.3f}")
        yield f"{value!s:6s} " + " ".join(f"{c:>17s}" for c in cells)


def _singular(analysis: Analysis) -> Iterator[str]:
    """Concentration over singular directions; one basis speaks for all."""
    groups: dict[str, list[Mapping[str, float]]] = {}
    for row in analysis.rows:
        if row["basis"] == analysis.bases[0]:
            groups.setdefault("blocks" if row["layer"] is not None else row["kind"], []).append(row["singular"])
    yield ""
    yield "Singular directions (the same in all bases): share of the top 1/5/10/25 %; effective dimension of 1"
    for name, own in groups.items():
        shares = " ".join(f"{np.mean([s[f'top {k}'] for s in own]):.3f}" for k in TOP)
        entropy, ratio = (np.mean([s[k] for s in own]) for k in ("entropy dimension", "participation"))
        yield f"{name:6s} {shares}; {entropy:.3f} (entropy), {ratio:.3f} (participation)"


def _rounding(analysis: Analysis) -> Iterator[str]:
    """What rounding all blocks costs, and embedding or head alone."""
    titles: Mapping[RoundedPart, str] = {"blocks": "All blocks", "embed": "Only embed", "head": "Only head"}
    for part, title in titles.items():
        rows = analysis.block_rows if part == "blocks" else [r for r in analysis.end_rows if r["kind"] == part]
        roundings = [Rounding(part, r.bits, r.protected) for r in analysis.roundings]
        yield ""
        yield f"{title} rounded at a fixed length: KL in nats/token (D, its estimate; relative output error, mean)"
        yield f"{'basis':12s} " + " ".join(f"{r.label:>28s}" for r in roundings)
        for basis in analysis.bases:
            own = [r for r in rows if r["basis"] == basis]
            cells = (_cost(analysis.kl[Network(basis, rounding)], own, rounding) for rounding in roundings)
            yield f"{basis:12s} " + " ".join(f"{cell:>28s}" for cell in cells)


def _cost(kl: float, rows: Sequence[Row], rounding: Rounding) -> str:
    """KL of a rounded network, D summed over its rounded matrices and their mean output error."""
    estimate = sum(r["kl_estimated"][rounding.label] for r in rows)
    error = np.mean([r["output_error"][rounding.label] for r in rows])
    return f"{kl:9.5f} ({estimate:.5f}; {error:.1e})"


def _errors_by(rows: Sequence[Row], bases: Sequence[str], key: RowKey, what: str, rounding: Rounding) -> Iterator[str]:
    """Errors of one rounding, a line for every value of a key of the rows."""
    yield ""
    yield f"By {what}: relative output error, mean | D in nats/token, sum"
    yield f"{key:6s} " + " ".join(f"{b:>19s}" for b in bases)
    for value in dict.fromkeys(r[key] for r in rows):
        cells = []
        for basis in bases:
            own = [r for r in rows if r[key] == value and r["basis"] == basis]
            error, estimate = (np.array([r[k][rounding.label] for r in own]) for k in ("output_error", "kl_estimated"))
            cells.append(f"{error.mean():9.2e} | {estimate.sum():7.5f}")
        yield f"{value!s:6s} " + " ".join(f"{c:>19s}" for c in cells)


def _noise(kl: Mapping[Network, float]) -> Iterator[str]:
    """Mean KL over the seeds of every noise."""
    yield ""
    yield "Noise of a tenth of every matrix's norm, in original coordinates: mean KL in nats/token"
    for kind, title in ((EntryNoise, "on entries"), (InputNoise, "along directions of the inputs")):
        by_label: dict[str, list[float]] = {}
        for network, value in kl.items():
            if isinstance(network.change, kind):
                by_label.setdefault(network.change.label, []).append(value)
        yield f"  {title}: " + ", ".join(f"{label} {np.mean(values):.5f}" for label, values in by_label.items())


def entropy_sentence(rows: Sequence[Row]) -> str:
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


def verdict_lines(judgements: Sequence[Judgement]) -> Iterator[str]:
    """A line a hypothesis."""
    yield "Hypotheses, their signs written down before measuring; two standard errors decide"
    for judgement in judgements:
        claim, (value, error) = judgement.prediction, judgement.estimate
        yield (
            f"{judgement.verdict:10s} {claim.claim}: {claim.figure}: {value:+.4g} +- {error:.2g} "
            f"(predicted {judgement.expected})"
        )
