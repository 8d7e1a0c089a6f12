"""Prints the memory and time that `rdopt analyze` takes on a synthetic Llama of any size, in a process of its own.

The default has TinyLlama's shape: 1.1 billion weights, 22 blocks, in bfloat16. The weights are Gaussian; every column
has a spread of its own (lognormal) and every matrix a few large entries, so that bases differ. Joint and learned axes
are left out: their solve grows with the cube of the width.

    python scripts/bench_analyze.py --work scratch --json analyze.json
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from outputs import check_new, exit_code, write_json
from synthetic_llama import llama_config, write_synthetic

from rdopt.checkpoint.folder import open_checkpoint
from rdopt.config.errors import UserError

_LIMIT_GIB = 8.0  # GiB that a model of this size has to fit in


def peak_gib() -> float:
    """The largest resident set of the children that ended."""
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 2**30


def run(args: argparse.Namespace) -> None:
    """Makes the model, analyzes it, prints the peak."""
    check_new((args.json,))
    args.work.mkdir(parents=True, exist_ok=True)
    model = args.work / "model"
    config = llama_config(args.hidden, args.ffn, args.layers, args.heads, args.kv_heads, args.vocab)
    write_synthetic(model, config, args.seed)
    parameters, begun = open_checkpoint(model).num_parameters, time.perf_counter()
    words = ["analyze", model, "--out", args.work / "analysis", "--bases", args.bases, "--analyze.bits", args.bits,
             "--sequences", args.sequences, "--seq-len", args.context, "--context", args.context,
             "--stride", args.context, "--max-tokens", args.max_tokens]
    command = [sys.executable, "-c", "from rdopt.cli.main import run; run()"]
    ended = subprocess.run([*command, *map(str, words)], check=False)
    seconds = time.perf_counter() - begun
    if ended.returncode:
        raise UserError(f"rdopt analyze ended with exit code {ended.returncode}: see its message above.")
    found = json.loads((args.work / "analysis" / "analysis.json").read_text())
    peak = peak_gib()
    print(f"{parameters:,} parameters, {args.layers} blocks, {len(found['networks'])} networks beside the original: "
          f"peak {peak:.2f} GiB of {_LIMIT_GIB:g}, {seconds:.0f} s")
    write_json(args.json, {"parameters": parameters, "peak_gib": peak, "seconds": seconds, "bases": args.bases,
                           "networks": len(found["networks"]), "tokens": found["tokens"]})


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0, or 2 after a sentence on standard error."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--work", type=Path, required=True, help="folder of the model and its analysis; continued")
    for name, default, text in (
        ("hidden", 2048, "width of the residual stream"), ("ffn", 5632, "hidden channels"), ("layers", 22, "blocks"),
        ("heads", 32, "of queries"), ("kv-heads", 4, "of keys and values"), ("vocab", 32000, "rows of the embedding"),
        ("sequences", 8, "calibration sequences"), ("context", 256, "tokens in a sequence and in a window"),
        ("max-tokens", 512, "test tokens"), ("seed", 0, "of the weights"),
    ):
        p.add_argument(f"--{name}", type=int, default=default, help=text)
    p.add_argument("--bases", default="identity,hadamard,random,pca,pca-act", help="coordinate systems")
    p.add_argument("--bits", default="3,4,8", help="lengths of codes")
    p.add_argument("--json", type=Path, help="also write the figures to this new file")
    return exit_code(run, p.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
