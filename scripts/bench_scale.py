"""Prints seconds, peak memory (beside what --dry-run says) and disk of every stage on growing synthetic Llamas.

Each stage is a command in a process of its own. A model of ten times the depth must not take more memory, and ten times
the time; log-log slopes over depth and width say how it grows. Finished stages lie in --work.

    python scripts/bench_scale.py --work scratch --json scale.json --plot scale.png
    python scripts/bench_scale.py --work scratch --shapes 8b-2,8b-4 --stages moments,encode,decode --memory 8

scripts/results/scale.json comes from this.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from outputs import check_new, exit_code, save_picture, write_json
from synthetic_llama import llama_config, write_synthetic

from rdopt.calibration.moments import FULL_WIDTH
from rdopt.checkpoint.folder import open_checkpoint
from rdopt.cli.parser import build_parser, resolve
from rdopt.cli.sizes import needs_of
from rdopt.config.errors import UserError

Row = dict[str, Any]


class Shape(NamedTuple):
    """hidden, ffn, layers, heads, kv_heads and vocab of a Llama."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int


SHAPES = {
    "512-2": Shape(512, 1408, 2, 8, 4, 2048),
    "512-8": Shape(512, 1408, 8, 8, 4, 2048),
    "512-32": Shape(512, 1408, 32, 8, 4, 2048),
    "1024-2": Shape(1024, 2816, 2, 16, 8, 2048),
    "2048-2": Shape(2048, 5632, 2, 32, 8, 2048),
    "4096-2": Shape(4096, 11264, 2, 32, 8, 2048),
    "smollm2-135m": Shape(576, 1536, 30, 9, 3, 49152),
    "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
    "8b-2": Shape(4096, 14336, 2, 32, 8, 128256),
    "8b-4": Shape(4096, 14336, 4, 32, 8, 128256),
}
GROWTH = tuple(name for name in SHAPES if name.split("-")[0].isdigit())
STAGES = ("moments", "train", "encode", "decode", "eval")


def words_of(stage: str, args: argparse.Namespace, work: Path) -> list[str]:
    """The command line of a stage; `work` holds the model and what the stages before left."""
    model, moments, file = work / "model", work / "moments", work / "file.rdopt.safetensors"
    machine = [] if args.memory is None else ["--memory", args.memory]
    text = ["--seq-len", args.context, "--sequences", args.sequences]
    windows = ["--context", args.context, "--stride", args.context, "--max-tokens", args.max_tokens]
    words = {
        "moments": ["moments", model, "--out", moments, *text],
        "train": ["train", model, "--out", work / "run", "--moments", moments, *text, "--steps", 3, "--lam", 20],
        "encode": ["encode", model, "--out", file, "--moments", moments, "--lam", 20, *text, *windows,
                   "--encode.drift_sequences", args.drift_sequences],
        "decode": ["decode", file, "--out", work / "decoded", "--dtype", "bfloat16"],
        "eval": ["eval", file, "--reference", model, *text, *windows],
    }[stage]
    return [*map(str, words), *([] if stage == "decode" else map(str, machine))]


def run_stage(name: str, stage: str, args: argparse.Namespace) -> Row:
    """Seconds, peak of resident memory and bytes on disk of a stage.

    Raises:
        UserError: the command failed.
    """
    work = args.work / name
    words = words_of(stage, args, work)
    parsed, rest = build_parser().parse_known_args(words)
    said = needs_of(parsed, resolve(parsed, rest))
    before, begun = folder_bytes(work), time.perf_counter()
    command = [sys.executable, "-c", "from rdopt.cli.main import run; run()", *words]
    child = subprocess.Popen(command)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise UserError(f"rdopt {stage} of {name} ended with exit code {child.returncode}: see its message above.")
    unit = 1 if sys.platform == "darwin" else 2**10
    return {
        "shape": name,
        "stage": stage,
        "layers": SHAPES[name].layers,
        "hidden": SHAPES[name].hidden,
        "parameters": open_checkpoint(work / "model").num_parameters,
        "seconds": time.perf_counter() - begun,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gib": usage.ru_maxrss * unit / 2**30,
        "disk_gib": (folder_bytes(work) - before) / 2**30,
        "said_peak_gib": said.peak / 2**30,
        "said_disk_gib": sum(said.disk.values()) / 2**30,
    }


def products(shape: Shape, stage: str, args: argparse.Namespace) -> float | None:
    """Floating-point operations of the matrix products that a stage cannot do without; None where others dominate.

    Moments: each block forward and backward, the head likewise, and two symmetric Gram products of every matrix's
    inputs and outputs, of which the inputs are shared. Evaluation: both models forward.
    """
    d, f, kv = shape.hidden, shape.ffn, shape.hidden // shape.heads * shape.kv_heads
    block, head = 2 * d * d + 2 * d * kv + 3 * d * f, d * shape.vocab
    full = [width for width in (f, f) if width <= FULL_WIDTH]
    grams = sum(width**2 for width in (d, d, d, f, d, kv, kv, d, d, *full))  # inputs of four groups, then outputs
    if stage == "moments":
        tokens = args.sequences * args.context
        return tokens * (shape.layers * (6.0 * block + 2 * grams) + 6 * head)
    return args.max_tokens * 2 * 2.0 * (shape.layers * block + head) if stage == "eval" else None


def product_rate() -> float:
    """Floating-point operations a second of a float32 matrix product in full precision on the default device."""
    x = jnp.ones((4096, 4096), jnp.float32)
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST))
    product(x, x).block_until_ready()
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        product(x, x).block_until_ready()
        seconds.append(time.perf_counter() - begun)
    return 2 * 4096.0**3 / statistics.median(seconds)


def folder_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def slopes(rows: Sequence[Row], along: str) -> Iterator[tuple[str, str, float]]:
    """(stage, figure, log-log slope) of the growth shapes along "layers" at one width, or "hidden" at one depth."""
    other = {"layers": ("hidden", 512), "hidden": ("layers", 2)}[along]
    for stage in dict.fromkeys(row["stage"] for row in rows):
        some = [r for r in rows if r["stage"] == stage and r["shape"] in GROWTH and r[other[0]] == other[1]]
        ends = sorted(some, key=lambda r: r[along])
        if len(ends) > 1:
            first, last = ends[0], ends[-1]
            for figure in ("seconds", "peak_gib"):
                yield stage, figure, math.log(last[figure] / first[figure]) / math.log(last[along] / first[along])


def draw(fig: Any, rows: Sequence[Row]) -> None:
    """Seconds and peak memory over the parameters, a line a stage."""
    for axis, figure, label in zip(fig.subplots(1, 2), ("seconds", "peak_gib"), ("seconds", "peak GiB"), strict=True):
        for stage in dict.fromkeys(row["stage"] for row in rows):
            some = sorted((r["parameters"], r[figure]) for r in rows if r["stage"] == stage)
            axis.plot(*zip(*some, strict=True), "o-", markersize=2, linewidth=0.7, label=stage)
        axis.set(xscale="log", yscale="log", xlabel="parameters", title=label)
    fig.axes[0].legend(frameon=False)


def run(args: argparse.Namespace) -> None:
    """Every stage of every shape that is not yet measured."""
    check_new((args.json, args.plot))
    rows, rate = [], product_rate()
    print(f"{jax.devices()[0].device_kind}: {rate / 1e9:.0f} GFLOP/s in float32 products", flush=True)
    for name in args.shapes.split(","):
        if name not in SHAPES:
            raise UserError(f"the shape {name!r} is none of {', '.join(SHAPES)}: choose among them.")
        write_synthetic(args.work / name / "model", llama_config(*SHAPES[name]))
        for stage in args.stages.split(","):
            done = args.work / name / f"{stage}.json"
            if not done.is_file():
                write_json(done, run_stage(name, stage, args))
            row, work = json.loads(done.read_text(encoding="utf-8")), products(SHAPES[name], stage, args)
            row["floor"] = None if work is None else work / rate
            print(
                f"{name:16s} {stage:8s} {row['seconds']:8.1f} s  ({row['processor_seconds']:.0f} s of processors)  "
                f"peak {row['peak_gib']:.2f} GiB (said {row['said_peak_gib']:.2f})  disk {row['disk_gib']:.3f} GiB "
                f"(said {row['said_disk_gib']:.3f})"
                + ("" if row["floor"] is None else f"  {row['seconds'] / row['floor']:.2f} times its products"),
                flush=True,
            )
            rows.append(row)
    found = [(along, *slope) for along in ("layers", "hidden") for slope in slopes(rows, along)]
    for along, stage, figure, slope in found:
        print(f"{stage:8s} {figure:8s} grows with {along} to the power {slope:.2f}")
    write_json(args.json, {"device": jax.devices()[0].device_kind, "rows": rows, "slopes": found})
    save_picture(args.plot, lambda fig: draw(fig, rows), 1.8)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0, or 2 after a sentence on standard error."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True, help="folder of models and outputs; continued")
    p.add_argument("--shapes", default=",".join(GROWTH), help=f"of {', '.join(SHAPES)}")
    p.add_argument("--stages", default=",".join(STAGES), help="commands, in this order")
    p.add_argument("--memory", help="GiB that a command may keep in memory")
    p.add_argument("--sequences", type=int, default=32, help="calibration sequences")
    p.add_argument("--drift-sequences", type=int, default=8, help="of them measure the drift")
    p.add_argument("--context", type=int, default=256, help="tokens in a sequence and in a window")
    p.add_argument("--max-tokens", type=int, default=4096, help="test tokens")
    p.add_argument("--json", type=Path, help="also write the figures to this new file")
    p.add_argument("--plot", type=Path, help="also draw them into this new PNG")
    return exit_code(run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
