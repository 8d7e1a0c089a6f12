"""Asks what training leaves to align: how unequal a model's spectra are, and what other coordinates save of it.

Printed per model: figures of all coded matrices (gains folded) in identity, Hadamard, PCA and joint coordinates, mean
over matrices; bits/weight that PCA and joint coordinates save against identity and Hadamard at equal distortion, by
the analytic rate at two slopes; then the first model less every later one, paired by matrix. The predictions take the
first model for AdamW's and the later ones for Muon's: Muon's spectra are flatter and leave less to align.

    python scripts/compare_optimizers.py --model adamw:docs.txt:blank2 --model muon:docs.txt:blank2 --json spectra.json

The same small model by both optimizers (held-out loss 4.41 and 4.21 nats/token on software documentation):

    python scripts/train_demo_lm.py --text docs.txt --split-on blank2 --tokens 1.2e6 --optimizer adamw --out adamw
    python scripts/train_demo_lm.py --text docs.txt --split-on blank2 --tokens 1.2e6 --optimizer muon --out muon
"""

import argparse
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from optimizers.equal_distortion import (
    COORDINATES,
    in_coordinates,
    matrix_names,
    matrix_spectra,
    matrix_weights,
    per_weight,
    savings,
    terms_by_slope,
)
from optimizers.spectra import Spectra, chance_gain
from outputs import check_new, exit_code, write_json
from peers.benchmark import model_and_text

from rdopt.calibration.backward import second_moments
from rdopt.calibration.subject import open_subject
from rdopt.checkpoint.families import MATRICES, Architecture, block_shapes
from rdopt.config.errors import UserError
from rdopt.config.schema import Config
from rdopt.study.predictions import Estimate, Prediction, mean_of

_LAMS = (24.0, 200.0)
_ALIGNED, _BASELINES = ("pca", "joint"), ("identity", "hadamard")
FIGURES = {
    "column_gain": "columns, bits", "row_gain": "rows, bits", "kurtosis": "kurtosis", "peak": "max/rms",
    "columns": "columns eff.", "columns_pr": "(particip.)", "singular": "sing. eff.", "singular_pr": "(particip.)",
}
FLATTER: Mapping[str, Prediction] = {
    "identity singular": Prediction("Muon's singular values are flatter: effective share, AdamW - Muon", -1),
    "identity singular_pr": Prediction("... by the participation ratio, AdamW - Muon", -1),
    "pca column_gain": Prediction("Muon's columns in PCA axes are flatter: gain in bits, AdamW - Muon", 1),
    "joint column_gain": Prediction("Muon's columns in joint axes are flatter: gain in bits, AdamW - Muon", 1),
}
LESS = "Muon leaves less to align: bits/weight saved by {} against {}, lambda {:g}, AdamW - Muon"


class ModelSpectra(NamedTuple):
    """One model.

    Attributes:
        name: of its folder.
        arch: architecture.
        figures: coordinates -> figure -> value of every matrix.
        saved: (aligned, baseline, lambda) -> bits that every matrix saves.
        weights: entries of every matrix.
    """

    name: str
    arch: Architecture
    figures: dict[str, dict[str, np.ndarray]]
    saved: dict[tuple[str, str, float], np.ndarray]
    weights: np.ndarray


def measure_model(spec: str, args: argparse.Namespace) -> ModelSpectra:
    """Spectra and savings of MODEL[:TEXT:SPLIT]."""
    model, text = model_and_text(spec, args.context, args.sequences)
    subject, corpus = open_subject(Config(model=model, text=text))
    moments = second_moments(subject.params, subject.arch, corpus.calibration, seed=text.seed)
    figures, terms, weights = {}, {}, matrix_weights(subject.params)
    for name, aligned in in_coordinates(subject, moments).items():
        rows = matrix_spectra(aligned)
        figures[name] = {key: np.array([getattr(r, key) for r in rows]) for key in Spectra._fields}
        terms[name] = terms_by_slope(aligned)
    saved = {(a, b, lam): savings(terms[b], terms[a], lam, weights)
             for a in _ALIGNED for b in _BASELINES for lam in args.lams}
    return ModelSpectra(Path(model).name, subject.arch, figures, saved, weights)


def model_lines(found: ModelSpectra) -> Iterator[str]:
    """The tables of one model."""
    chance = np.mean([chance_gain(int(w / n)) for w, n in zip(found.weights, _widths(found.arch), strict=True)])
    yield (f"{found.name}: mean of {len(found.weights)} matrices +- standard error; iid Gaussian columns gain "
           f"{chance:.4f} bits by chance")
    yield f"{'':10s}" + "".join(f"{title:>20s}" for title in FIGURES.values())
    for name, held in found.figures.items():
        cells = [mean_of(held[key]) for key in FIGURES]
        yield f"{name:10s}" + "".join(f"{x.value:11.4f} +- {x.error:.4f}".rjust(20) for x in cells)
    for (aligned, base, lam), bits in found.saved.items():
        yield f"{aligned} saves {per_weight(bits, found.weights)} bits/weight against {base}, lambda {lam:g}"


def _widths(arch: Architecture) -> list[int]:
    """Inputs of every matrix."""
    return [block_shapes(arch)[k][1] for k in MATRICES for _ in range(arch.num_layers)]


def differences(
    first: ModelSpectra, later: ModelSpectra
) -> tuple[dict[str, Estimate], dict[tuple[str, str, float], Estimate]]:
    """First less later of every figure and saving, with errors paired by matrix.

    Raises:
        UserError: their matrices do not match.
    """
    if matrix_names(first.arch) != matrix_names(later.arch) or not np.array_equal(first.weights, later.weights):
        raise UserError(f"{first.name} and {later.name} have matrices of other shapes ({first.arch} and {later.arch}): "
                        "compare models of one architecture.")
    figures = {f"{c} {key}": mean_of(first.figures[c][key] - later.figures[c][key])
               for c in COORDINATES for key in FIGURES}
    saved = {key: per_weight(first.saved[key] - later.saved[key], first.weights) for key in first.saved}
    return figures, saved


def verdicts(first: ModelSpectra, later: ModelSpectra) -> list[dict[str, Any]]:
    """Every prediction with what was found."""
    figures, saved = differences(first, later)
    asked = [(prediction, figures[key]) for key, prediction in FLATTER.items()]
    asked += [(Prediction(LESS.format(*key), 1), found) for key, found in saved.items()]
    return [{"claim": p.claim, "sign": p.sign, **found._asdict(), "verdict": p.verdict(found)} for p, found in asked]


def difference_lines(first: ModelSpectra, later: ModelSpectra, found: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Paired differences of all figures, then the verdicts."""
    figures, _ = differences(first, later)
    yield f"{first.name} less {later.name}, paired by matrix"
    for c in COORDINATES:
        cells = [figures[f"{c} {key}"] for key in FIGURES]
        yield f"{c:10s}" + "".join(str(x).rjust(20) for x in cells)
    for row in found:
        yield f"{row['verdict']:10s} {Estimate(row['value'], row['error'])}  {row['claim']}"


def run(args: argparse.Namespace) -> None:
    """Measures, prints, writes."""
    check_new((args.json,))
    if min(args.lams) <= 0:
        raise UserError(f"--lams holds {min(args.lams):g}, but a slope must be above 0.")
    begun, models = time.perf_counter(), []
    for spec in args.model:
        models.append(measure_model(spec, args))
        print(*model_lines(models[-1]), sep="\n", flush=True)
    pairs = {f"{models[0].name} - {m.name}": verdicts(models[0], m) for m in models[1:]}
    for later, found in zip(models[1:], pairs.values(), strict=True):
        print(*difference_lines(models[0], later, found), sep="\n")
    rows = [{"model": m.name, "matrices": matrix_names(m.arch),
             "figures": {c: {k: v.tolist() for k, v in held.items()} for c, held in m.figures.items()},
             "saved": [{"coordinates": a, "against": b, "lambda": lam, **per_weight(bits, m.weights)._asdict()}
                       for (a, b, lam), bits in m.saved.items()]} for m in models]
    write_json(args.json, {"models": rows, "predictions": pairs})
    print(f"{time.perf_counter() - begun:.0f} s")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the comparison; 0, or 2 after a sentence on standard error."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", action="append", required=True, metavar="MODEL[:TEXT:SPLIT]", help="AdamW's first")
    p.add_argument("--lams", type=float, nargs="+", default=list(_LAMS), help="slopes of the baselines")
    p.add_argument("--sequences", type=int, default=64, help="calibration sequences")
    p.add_argument("--context", type=int, default=256, help="tokens in a sequence")
    p.add_argument("--json", type=Path, help="also write the figures of all matrices to this new file")
    return exit_code(run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
