"""What stored transforms gain before side information and what they cost, against the width of the layer.

Every group of matrices that share an input gets its own transform: block-diagonal rotations, layers of learned pairs,
a butterfly. Gains are those of high rate, in bits/weight, beside what the same fit gains on iid Gaussian weights
(chance); prices are those of the coded angles and of the order of the channels. Llama folders are taken in joint axes,
which use up the free gauges; other tensors in their own coordinates. Ends with width 4096. Run again, it measures only
what the JSON file lacks.

    python scripts/price_stored.py --model FOLDER --model FOLDER --tensors FILE.safetensors --json price.json

scripts/results/stored_price.json comes from `--model stories260k --model ref-llama --model ref-llama-muon --tensors
all-MiniLM-L6-v2/model.safetensors`.
"""

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import matplotlib
import numpy as np
from safetensors.numpy import load_file
from stored_price.price import (
    BLOCK_WIDTHS,
    BlockRotations,
    Grouping,
    InputGroup,
    PairRotations,
    chance_group,
    fit_all,
    group_of,
    price_of,
)
from stored_price.wide import WIDE_LAYER, PriceRow, whole_layer_rows, wide_rows

from rdopt.checkpoint.families import MATRICES_OF
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.operator.params import load_params
from rdopt.study.labels import name_ends
from rdopt.transforms.bases import starting_gauges
from rdopt.transforms.gauges.fold import fold
from rdopt.transforms.matrices.joint import FLOOR

_DRAWN = {  # form: colour, label
    BlockRotations(32, "by correlation"): ("#0072b2", "blocks of 32"),
    PairRotations(4): ("#d55e00", "pairs, 4 layers"),
}


def llama_groups(folder: Path, floor: float) -> Iterator[InputGroup]:
    """The input groups of a Llama-family folder in joint axes."""
    checkpoint = open_checkpoint(folder)
    params = load_params(checkpoint)
    params, _ = fold(params, checkpoint.arch, starting_gauges("joint", params, checkpoint.arch))
    for kind, names in MATRICES_OF.items():
        for layer in range(checkpoint.arch.num_layers):
            yield group_of(kind, [np.asarray(params["blocks"][k][layer], np.float64) for k in names], floor)


def tensor_groups(file: Path, floor: float) -> Iterator[InputGroup]:
    """The input groups of a BERT's encoder layers as they are: query, key and value share one."""
    groups: dict[tuple[str, str], list[np.ndarray]] = {}
    for name, W in load_file(file).items():
        match = re.search(r"layer\.(\d+)\.(.*)\.weight$", name)
        if match and W.ndim == 2 and min(W.shape) >= 64:
            groups.setdefault((kind_of(match[2]), match[1]), []).append(W.astype(np.float64))
    for (kind, _), matrices in sorted(groups.items()):
        yield group_of(kind, matrices, floor)


def kind_of(name: str) -> str:
    """The Llama group that a BERT's matrix corresponds to; its own name where there is none."""
    if re.search(r"\.(query|key|value)$", name):
        return "attn"
    known = {"attention.output.dense": "o", "intermediate.dense": "mlp", "output.dense": "down"}
    return known.get(name, name)


def measure_groups(
    source: str, groups: Sequence[InputGroup], floor: float, steps: int, seed: int
) -> Iterator[PriceRow]:
    """A row per kind of group and form of transform."""
    for kind in dict.fromkeys(g.kind for g in groups):
        members = [g for g in groups if g.kind == kind]
        fits = [fit_all(g, steps) for g in members]
        chance = fit_all(chance_group(members[0], np.random.default_rng(seed), floor), steps)
        sizes = [g.size for g in members]
        for form in fits[0]:
            price = price_of([f[form] for f in fits], sizes)
            yield {
                "source": source, "kind": kind, "transform": form.name, "n": members[0].shapes[0][1],
                "rows": sum(m for m, _ in members[0].shapes), "weights": sum(sizes), **price._asdict(),
                "net": price.net, "chance": chance[form].gain / sizes[0],
            }  # fmt: skip


def price_lines(rows: Sequence[PriceRow]) -> Iterator[str]:
    """The measured table: the best grouping of each block, all other forms."""
    yield f"{'':16s}{'kind':6s}{'n':>6s}{'rows':>6s}  {'transform':30s}  gain          chance  price   bits  net"
    for r in rows:
        if r["transform"] in winners(rows, r["source"], r["kind"]):
            yield (
                f"{r['source']:16s}{r['kind']:6s}{r['n']:6d}{r['rows']:6d}  {r['transform']:30s}{r['gain']:+.4f}"
                f"+-{r['error']:.4f} {r['chance']:.4f}  {r['price']:.4f}  {r['bits']:4d}  {r['net']:+.4f}"
            )


def winners(rows: Sequence[PriceRow], source: str, kind: str) -> set[str]:
    """Per width of a block the grouping that leaves most; every other form."""
    here = {r["transform"]: r["net"] for r in rows if r["source"] == source and r["kind"] == kind}
    by_width = [[BlockRotations(width, how).name for how in get_args(Grouping)] for width in BLOCK_WIDTHS]
    best = {max(names, key=lambda name: here[name]) for names in by_width}
    return best | (here.keys() - {name for names in by_width for name in names})


def wide_lines(rows: Sequence[PriceRow]) -> Iterator[str]:
    """The table of the large network."""
    yield f"{'kind':6s}{'n':>6s}{'rows':>6s}  {'transform':30s}above chance     slope an octave   chance  price   net"
    for r in rows:
        yield (
            f"{r['kind']:6s}{r['n']:6d}{r['rows']:6d}  {r['transform']:30s}{r['value']:+.4f}+-{r['error']:.4f}"
            f"  {r['slope']:+.4f}+-{r['slope_error']:.4f}  {r['chance']:.4f}  {r['price']:.4f}  {r['net']:+.4f}"
        )


def plot(rows: Sequence[PriceRow], wide: Sequence[PriceRow], path: Path) -> None:
    """Gain and price against width, a panel a kind of group; the large network hollow, with its error."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(2, 2, figsize=(6.4, 6.4), dpi=160, layout="constrained")
    for ax, (kind, shapes) in zip(axes.flat, WIDE_LAYER.items(), strict=True):
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ends = []
        for form, (colour, label) in _DRAWN.items():
            drawn = [r for r in (*rows, *wide) if r["kind"] == kind and r["transform"] == form.name]
            ends += [(f"{what}, {label}", n, end, colour) for what, n, end in draw_form(ax, drawn, colour)]
        ax.set_title(", ".join(MATRICES_OF[kind]), fontsize=9)
        ax.set_xticks(sorted({r["n"] for r in rows if r["kind"] == kind} | {shapes[0][1]}))
        ax.set_yticks([0.001, 0.003, 0.01, 0.03, 0.1, 0.3], minor=False)
        ax.set_ylim(0.0008, 0.6)
        ax.set_xlim(right=40 * shapes[0][1])
        ax.spines.bottom.set_bounds(ax.get_xlim()[0], shapes[0][1])
        if ends:
            name_ends(ax, ends, "right")
        ax.yaxis.set_minor_formatter("")
        ax.xaxis.set_major_formatter("{x:.0f}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.grid(True, color="#e6e6e6", linewidth=0.6)
        ax.spines[["top", "right"]].set_visible(False)
        ax.tick_params(labelsize=8)
    fig.supxlabel("inputs of the layer; line: gain, dashes: price; hollow: extrapolated, standard error", fontsize=8)
    fig.supylabel("bits/weight, high rate", fontsize=8)
    fig.savefig(path)
    plt.close(fig)


def draw_form(ax: Any, rows: Sequence[PriceRow], colour: str) -> Iterator[tuple[str, float, float]]:
    """Gain (line) and price (dashes) of one form; yields where each ends."""
    widths = sorted({r["n"] for r in rows})
    for what, line, marker, of in (("gain", "-", "o", gain_of), ("price", "--", "s", lambda r: r["price"])):
        means = [float(np.mean([of(r) for r in rows if r["n"] == n])) for n in widths]
        ax.plot(widths, means, line, color=colour, linewidth=1.2)
        for r in rows:
            face = "white" if "value" in r else colour
            ax.plot(r["n"], of(r), marker, color=colour, markerfacecolor=face, markersize=4)
        if widths:
            yield what, widths[-1], means[-1]
    for r in rows:
        if "value" in r:
            ax.errorbar(r["n"], gain_of(r), r["error"], color=colour, linewidth=1, capsize=2, zorder=1)


def gain_of(r: PriceRow) -> float:
    """Gain before side information; extrapolated where the row is."""
    return r["value"] + r["chance"] if "value" in r else r["gain"]


def finished(path: Path | None, settings: PriceRow) -> list[PriceRow]:
    """The rows that a run with the same settings left."""
    if path is None or not path.exists():
        return []
    before = json.loads(path.read_text())
    if before["settings"] != settings:
        raise SystemExit(f"{path} was measured with {before['settings']}, not {settings}; choose another file.")
    return before["measured"]


def save(path: Path | None, settings: PriceRow, rows: Sequence[PriceRow], wide: Sequence[PriceRow]) -> None:
    """Writes all rows."""
    if path is not None:
        path.write_text(json.dumps({"settings": settings, "measured": rows, "large": wide}, indent=1) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Prints both tables; writes JSON and the plot on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, action="append", default=[], help="a Llama-family folder; repeatable")
    parser.add_argument("--tensors", type=Path, action="append", default=[], help="a BERT's safetensors; repeatable")
    parser.add_argument("--floor", type=float, default=FLOOR, help="power below which a column costs nothing")
    parser.add_argument("--steps", type=int, default=20, help="of Adam for the butterfly; 0 leaves it out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    parser.add_argument("--plot", type=Path, help="PNG")
    args = parser.parse_args(argv)
    settings = {"floor": args.floor, "steps": args.steps, "seed": args.seed}
    rows = finished(args.json, settings)
    print(f"bits/weight at high rate, floor {args.floor:g}; gain +- standard error over layers; net: rounded - price")
    for path, read, axes in [
        *((path, llama_groups, "joint axes") for path in args.model),
        *((path, tensor_groups, "its own coordinates") for path in args.tensors),
    ]:
        source = path.name if path.is_dir() else path.parent.name
        if source not in {r["source"] for r in rows}:
            rows += measure_groups(source, list(read(path, args.floor)), args.floor, args.steps, args.seed)
            save(args.json, settings, rows, [])
        print(f"{source}: {axes}", *price_lines([r for r in rows if r["source"] == source]), sep="\n", flush=True)
    wide = list(wide_rows(rows, args.floor, args.seed))
    print(*wide_lines([*wide, *whole_layer_rows(wide)]), sep="\n")
    save(args.json, settings, rows, wide)
    if args.plot:
        plot(rows, wide, args.plot)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
