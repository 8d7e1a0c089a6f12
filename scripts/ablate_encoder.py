"""Prints what each part of rdopt's encoder is worth: everything on, against one part at a time switched off.

BD-rate in percent of file bits at equal KL on text never calibrated on (positive: the encoder is worse without the
part), and the bits/weight that its absence costs at equal KL. Finished cells lie in --cells.

    python scripts/ablate_encoder.py --cells cells --json ablation.json \\
        --model stories260k:stories_sampled.txt:line --model ref-llama:docs_valid.txt:blank2

scripts/results/encoder_parts.json comes from ref-llama with `--targets 1.2 1.6 2.4 3.3 4.2 5.2`.
"""

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import NamedTuple

import numpy as np
from peers.benchmark import Benchmark
from peers.own import encode_own
from peers.report import Cell, curves
from peers.table import ArmVariant, add_arguments, run_table

from rdopt.checkpoint.families import INPUT_OF, coded_matrices
from rdopt.config.schema import EncodeConfig
from rdopt.sweep.curves import bd_rate, saved_bits_with_error
from rdopt.transforms.aligned import Aligned

EVERYTHING = "everything"
_COMPARED_AT = (2.0, 3.0)


def unchanged(benchmark: Benchmark, model: Aligned) -> Aligned:
    """The model as it is."""
    return model


class Variant(NamedTuple):
    """The encoder with a part switched off.

    Attributes:
        encode: its settings.
        change: what becomes of the model and its moments before it is coded.
        aligned: False codes the model in its own coordinates.
    """

    encode: EncodeConfig
    change: Callable[[Benchmark, Aligned], Aligned] = unchanged
    aligned: bool = True


def variants(finetune: int) -> dict[str, Variant]:
    """Everything, then each part off alone; and what is off by default, on: finetuning of so many steps too."""
    full = EncodeConfig(grid="trellis", states=64)
    return {
        EVERYTHING: Variant(full),
        "alignment off": Variant(full, aligned=False),
        "joint instead of principal axes": Variant(full, joint_axes),
        "feedback, trellis off: rounding": Variant(replace(full, grid="round")),
        "trellis off: scalar grid": Variant(replace(full, grid="feedback")),
        "output feedback off": Variant(replace(full, output="diagonal")),
        "trellis off: 1 state": Variant(replace(full, states=1)),
        "trellis of 8 states": Variant(replace(full, states=8)),
        "rate term off": Variant(replace(full, rdo=0.0)),
        "gains off": Variant(replace(full, gains="none")),
        "drift off": Variant(replace(full, drift="none")),
        "sensitivity off": Variant(full, equal_error),
        "allocation off": Variant(full, equal_matrices),
        "rANS off: Huffman": Variant(replace(full, coder="huffman")),
        "rANS off: adaptive binary": Variant(replace(full, coder="binary")),
        "low-rank component on": Variant(replace(full, structured="svd")),
        "Lloyd-Max grid": Variant(replace(full, grid="lloyd")),
        **({"finetuning on": Variant(replace(full, finetune=finetune))} if finetune else {}),
    }


def joint_axes(benchmark: Benchmark, model: Aligned) -> Aligned:
    """The model in the axes that diagonalise the moments of all its matrices together."""
    return benchmark.in_basis("joint")


def equal_error(benchmark: Benchmark, model: Aligned) -> Aligned:
    """No end-to-end sensitivity: every matrix the same relative error, every row of a matrix the same weight."""
    return _weighted(model, lambda G: np.eye(len(G)))


def equal_matrices(benchmark: Benchmark, model: Aligned) -> Aligned:
    """No slope in common: every matrix the same relative error in its own metric."""
    return _weighted(model, lambda G: G)


def _weighted(model: Aligned, shape: Callable[[np.ndarray], np.ndarray]) -> Aligned:
    """G_k replaced by g_k shape(G_k), the power of the signal a weight the same in every matrix and kept in total.

    Done to the original moments: powers do not change under the gauges of fixed bases, whose maps of the outputs are
    orthogonal, and neither does a multiple of the identity.
    """
    subject, moments = model.subject, model.moments
    G = {name: [np.diag(g) if g.ndim == 1 else g for g in held] for name, held in moments.G.items()}
    power, share, total, weights = {}, {}, 0.0, 0
    for layer, name in coded_matrices(model.arch.num_layers):
        W, sigma = np.asarray(subject.params["blocks"][name][layer], np.float64), moments.sigma[INPUT_OF[name]][layer]
        signal = W @ sigma @ W.T
        power[layer, name], share[layer, name] = float(np.sum(shape(G[name][layer]) * signal)), W.size
        total, weights = total + float(np.sum(G[name][layer] * signal)), weights + W.size
    changed = {
        name: np.stack([
            shape(g) * total * share[layer, name] / (weights * power[layer, name]) for layer, g in enumerate(held)
        ])
        for name, held in G.items()
    }
    return Aligned(subject=subject, moments=moments._replace(G=changed), gauges=model.gauges, tokens=model.tokens)


def arm_variants(benchmark: Benchmark, finetune: int) -> Iterator[ArmVariant]:
    """Every curve of a model."""
    for name, variant in variants(finetune).items():
        model = variant.change(benchmark, benchmark.aligned if variant.aligned else benchmark.plain)
        settings = {**asdict(variant.encode), "aligned": variant.aligned, "moments": variant.change.__name__}
        yield ArmVariant("rdopt", name, settings, partial(encode_own, benchmark, model, variant.encode))


def summary(cells: Sequence[Cell], floor: float) -> list[Cell]:
    """What each part is worth in a model.

    Args:
        cells: of the model.
        floor: KL below which points do not enter a BD-rate.

    Returns:
        rows: BD-rate in percent against everything, and bits/weight lost at equal KL with their standard errors.
    """
    found = {variant: curve for (_, variant), curve in curves(cells, "bpw").items()}
    if EVERYTHING not in found:
        return []
    rows = []
    for name, curve in found.items():
        rate = bd_rate(found[EVERYTHING], curve, floor)
        gains = {at: saved_bits_with_error(found[EVERYTHING], curve, at) for at in _COMPARED_AT}
        rows.append({
            "model": cells[0]["model"],
            "variant": name,
            "bd_rate": None if math.isnan(rate) else rate,
            "lost_bits": {f"{at:g}": [-gain, error] for at, (gain, error) in gains.items() if not math.isnan(gain)},
        })
    return rows


def summary_lines(rows: Sequence[Cell]) -> Iterator[str]:
    """The table of what is lost."""
    for r in rows:
        rate = "n/a" if r["bd_rate"] is None else f"{r['bd_rate']:+.1f} %"
        lost = "  ".join(f"at {at}: {bits:+.3f} +- {error:.3f}" for at, (bits, error) in r["lost_bits"].items())
        yield f"{r['model']:15s} {r['variant']:32s} BD-rate {rate:>8s}  bits/weight lost  {lost or 'no common KL'}"


def main(argv: Sequence[str] | None = None) -> int:
    """Measures what is missing, prints the table and writes JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    args = parser.parse_args(argv)
    names = list(variants(args.finetune))
    return run_table(args, names, lambda benchmark: arm_variants(benchmark, args.finetune), summary, summary_lines)


if __name__ == "__main__":
    raise SystemExit(main())
