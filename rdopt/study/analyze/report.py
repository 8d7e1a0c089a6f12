"""An analysis: what it holds, its JSON, and its page of text (figures by basis, KL of rounded networks, verdicts)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, get_args

import numpy as np

from rdopt.study.analyze.figures import BINS, STEP, TOP, Row
from rdopt.study.analyze.networks import Network, RoundedPart, Rounding
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
PARTS: tuple[RoundedPart, ...] = get_args(RoundedPart)


class Analysis(NamedTuple):
    """One model in several coordinate systems: its name, the text in words, how many tokens of it were scored.

    Rows are those of all matrices in all bases, KL is the mean KL(original || network) in nats/token.
    """

    model: str
    text: str
    tokens: int
    rows: Sequence[Row]
    kl: Mapping[Network, float]
    judgements: Sequence[Judgement]

    def rows_of(self, part: str, basis: str | None = None) -> list[Row]:
        """The rows of the "blocks", of "embed" or of "head", in one basis or in all of them."""
        own = (row for row in self.rows if part == ("blocks" if row["layer"] is not None else row["kind"]))
        return [row for row in own if basis in (None, row["basis"])]

    @property
    def bases(self) -> list[str]:
        """The coordinate systems in their order."""
        return list(dict.fromkeys(row["basis"] for row in self.rows_of("blocks")))

    @property
    def roundings(self) -> list[Rounding]:
        """How the blocks were rounded, in order."""
        changes = dict.fromkeys(network.change for network in self.kl)
        return [change for change in changes if isinstance(change, Rounding) and change.part == "blocks"]

    def to_json(self) -> dict[str, Any]:
        """What analysis.json holds."""
        return {
            "model": self.model,
            "text": self.text,
            "tokens": self.tokens,
            "tensors": self.rows,
            "networks": [
                {
                    "basis": network.basis,
                    "kind": "folded" if network.change is None else network.change.kind,
                    "about": "" if network.change is None else network.change.label,
                    "seed": network.seed,
                    "kl": kl,
                }
                for network, kl in self.kl.items()
            ],
            "predictions": [judgement.to_json() for judgement in self.judgements],
        }


def report_lines(analysis: Analysis) -> Iterator[str]:
    """The page."""
    rows, bases = analysis.rows_of("blocks"), analysis.bases
    ends = analysis.rows_of("embed") + analysis.rows_of("head")
    yield f"{analysis.model}; {analysis.text}; {analysis.tokens} tokens scored"
    yield ""
    yield "Figures of the blocks' matrices, means over all of them (norm gains folded: L2 is the same in every basis)"
    yield f"{'basis':12s} {'L2':>9s} {'L inf':>7s} " + " ".join(f"{name:>9s}" for name in COLUMNS)
    for basis in bases:
        yield _means(basis, analysis.rows_of("blocks", basis))
    peaks = "max/rms | share of the top 10 % of the columns"
    yield from _grouped(rows, bases, "kind", f"kind of matrix: {peaks}", 17, _peaks)
    yield from _grouped(rows, bases, "layer", f"layer, its matrices together: {peaks}", 17, _peaks)
    yield from _grouped(ends, bases, "kind", f"end of the network: {peaks}", 17, _peaks)
    yield from _singular(analysis)
    yield from _rounding(analysis)
    shown = next((r for r in analysis.roundings if r.label == "4 bits"), analysis.roundings[0]).label
    errors = f"{shown}: relative output error, mean | D in nats/token, sum"
    yield from _grouped(rows, bases, "kind", f"kind of matrix, {errors}", 19, lambda own: _errors(own, shown))
    yield from _grouped(rows, bases, "layer", f"layer, {errors}", 19, lambda own: _errors(own, shown))
    yield from _noise(analysis.kl)
    yield ""
    yield "Why the two entropies disagree:"
    yield entropy_sentence(rows)
    yield ""
    yield "Hypotheses, their signs written down before measuring; two standard errors decide"
    for judgement in analysis.judgements:
        claim, (value, error) = judgement.prediction, judgement.estimate
        yield (
            f"{judgement.verdict:10s} {claim.claim}: {claim.figure}: {value:+.4g} +- {error:.2g} "
            f"(predicted {judgement.expected})"
        )


def _means(label: str, rows: Sequence[Row]) -> str:
    """The mean of every column over some rows."""
    l2 = float(np.sqrt(np.sum([r["l2"] ** 2 for r in rows])))
    top = max(r["l_inf"] for r in rows)
    means = " ".join(f"{np.mean([figure(r) for r in rows]):9.4g}" for figure in COLUMNS.values())
    return f"{label:12s} {l2:9.4f} {top:7.3f} {means}"


def _grouped(
    rows: Sequence[Row], bases: Sequence[str], key: str, title: str, width: int, cell: Callable[[Sequence[Row]], str]
) -> Iterator[str]:
    """A line for every value of a key of the rows, in it a cell for every basis."""
    yield ""
    yield f"By {title}"
    yield f"{key:6s} " + " ".join(f"{b:>{width}s}" for b in bases)
    for value in dict.fromkeys(r[key] for r in rows):
        cells = (cell([r for r in rows if r[key] == value and r["basis"] == basis]) for basis in bases)
        yield f"{value!s:6s} " + " ".join(f"{c:>{width}s}" for c in cells)


def _peaks(rows: Sequence[Row]) -> str:
    peak, top = (np.mean([COLUMNS[title](r) for r in rows]) for title in ("max/rms", "top 10 %"))
    return f"{peak:9.2f} | {top:5.3f}"


def _errors(rows: Sequence[Row], rounding: str) -> str:
    error, estimate = (np.array([r[k][rounding] for r in rows]) for k in ("output_error", "kl_estimated"))
    return f"{error.mean():9.2e} | {estimate.sum():7.5f}"


def _singular(analysis: Analysis) -> Iterator[str]:
    """Concentration over singular directions; one basis speaks for all."""
    yield ""
    yield "Singular directions (the same in all bases): share of the top 1/5/10/25 %; effective dimension of 1"
    for part in ("embed", "head", "blocks"):
        own = [row["singular"] for row in analysis.rows_of(part, analysis.bases[0])]
        shares = " ".join(f"{np.mean([s[f'top {k}'] for s in own]):.3f}" for k in TOP)
        entropy, ratio = (np.mean([s[k] for s in own]) for k in ("entropy dimension", "participation"))
        yield f"{part:6s} {shares}; {entropy:.3f} (entropy), {ratio:.3f} (participation)"


def _rounding(analysis: Analysis) -> Iterator[str]:
    """What rounding all blocks costs, and embedding or head alone."""
    for part in PARTS:
        roundings = [replace(r, part=part) for r in analysis.roundings]
        title = "All blocks" if part == "blocks" else f"Only {part}"
        yield ""
        yield f"{title} rounded at a fixed length: KL in nats/token (D, its estimate; relative output error, mean)"
        yield f"{'basis':12s} " + " ".join(f"{r.label:>28s}" for r in roundings)
        for basis in analysis.bases:
            rows = analysis.rows_of(part, basis)
            cells = (_cost(analysis.kl[Network(basis, rounding)], rows, rounding.label) for rounding in roundings)
            yield f"{basis:12s} " + " ".join(f"{cell:>28s}" for cell in cells)


def _cost(kl: float, rows: Sequence[Row], rounding: str) -> str:
    """KL of a rounded network, D summed over its rounded matrices and their mean output error."""
    estimate = sum(r["kl_estimated"][rounding] for r in rows)
    error = np.mean([r["output_error"][rounding] for r in rows])
    return f"{kl:9.5f} ({estimate:.5f}; {error:.1e})"


def _noise(kl: Mapping[Network, float]) -> Iterator[str]:
    """Mean KL over the seeds of every noise."""
    yield ""
    yield "Noise of a tenth of every matrix's norm, in original coordinates: mean KL in nats/token"
    for kind, title in (("entries", "on entries"), ("inputs", "along directions of the inputs")):
        by_label: dict[str, list[float]] = {}
        for network, value in kl.items():
            if network.change is not None and network.change.kind == kind:
                by_label.setdefault(network.change.label, []).append(value)
        yield f"  {title}: " + ", ".join(f"{label} {np.mean(values):.5f}" for label, values in by_label.items())


def entropy_sentence(rows: Sequence[Row]) -> str:
    """Both entropies of original and Hadamard coordinates, and the step that explains their difference."""

    def change(figure: Callable[[Row], float]) -> float:
        plain, turned = ([figure(r) for r in rows if r["basis"] == basis] for basis in ("identity", "hadamard"))
        return float(np.mean(turned)) - float(np.mean(plain))

    step, bins = change(lambda row: row["entropy_step"]), change(lambda row: row["entropy_bins"])
    peak = change(lambda row: np.log2(row["peak"]))
    return (
        f"a Hadamard rotation changes the entropy at a step of {STEP:g} rms by {step:+.3f} bits (the marginal's shape "
        f"alone) and with {BINS} bins over the range by {bins:+.3f}; the range itself changes by {peak:+.3f} octaves, "
        f"which moves the bins' width as much: {step:+.3f} - ({peak:+.3f}) = {step - peak:+.3f}."
    )
